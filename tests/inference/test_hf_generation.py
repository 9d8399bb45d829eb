"""tools/generate_text.py on Hugging Face folders, against transformers' own generation."""

from __future__ import annotations

import json

import pytest
import torch
from test_generate_text import _generate

from helpers.hf_folders import save_model
from megatron.inference.transcript import visible

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in fp32 whose tokenizer has a chat template."""
    path = save_model(tmp_path_factory.mktemp("hf") / "mixtral", "mixtral")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": TEMPLATE})
    )
    return path


@pytest.fixture
def expected(folder):
    """A function that continues tokens greedily with transformers, without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    padding = list(range(257, model.config.vocab_size))

    def generate(tokens: list[int], number: int) -> list[int]:
        options = {"max_new_tokens": number, "do_sample": False, "suppress_tokens": padding}
        row = model.generate(torch.tensor([tokens]), **options)
        return row[0, len(tokens) :].tolist()

    return generate


@pytest.fixture
def tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_folder_is_continued_as_transformers_does(
    folder, expected, tokenizer, ranks2, tmp_path
):
    """Several prompts on two ranks that share the experts."""
    prompts = ["a", "some words", "def f(x):"]
    output = tmp_path / "out.jsonl"
    argv = [
        "--load",
        str(folder),
        "--greedy",
        "--max-new-tokens",
        "12",
        "--output",
        str(output),
    ]
    assert ranks2.run(_generate, [*argv, "--prompt", *prompts]) == [[], []]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for prompt, row in zip(prompts, rows, strict=True):
        assert row["tokens"] == expected(tokenizer.encode(prompt), 12)


def test_lines_are_a_conversation(folder, expected, tokenizer, ranks1):
    """The second prompt has the first message and its answer."""
    argv = ["--load", str(folder), "--greedy", "--max-new-tokens", "4", "--interactive"]
    (answers,) = ranks1.run(_generate, argv, "hi\ngo\n")
    messages = []
    for message, (shown, answer) in zip(["hi", "go"], answers, strict=True):
        messages.append({"role": "user", "content": message})
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        new = expected(tokens, 4)
        text = tokenizer.decode(new).removesuffix("<|end|>")
        assert shown == message and answer == visible(text)
        messages.append({"role": "assistant", "content": text})
