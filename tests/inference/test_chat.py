"""Conversations: chat templates against transformers, what is dropped, and reading lines."""

from __future__ import annotations

import json
import os
import threading

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron.config.tokenizer import TokenizerConfig
from megatron.inference.chat import (
    Conversation,
    LineReader,
    find_chat_template,
    find_end_tokens,
)
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.huggingface import build_huggingface

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """The files of a byte-level tokenizer with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def conversation_of(folder, max_positions: int, max_new_tokens: int = 4) -> Conversation:
    model = str(folder / "tokenizer.json")
    tokenizer = build_huggingface(
        TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=model), 1
    )
    template = find_chat_template([folder / "none", folder])
    assert template.end_tokens == {257}
    return Conversation(tokenizer, template, max_positions, max_new_tokens)


def test_template_marks_messages(folder):
    """Special tokens of the template are tokens, and answers are part of the next prompt."""
    chat = conversation_of(folder, 100)
    tokens = chat.prompt("hi")
    decode = chat.tokenizer.decode
    assert tokens.count(256) == 2 and tokens.count(257) == 1
    assert decode(tokens) == "<|start|>user hi<|end|><|start|>assistant "
    chat.add_answer("yes")
    assert decode(chat.prompt("go")) == (
        "<|start|>user hi<|end|><|start|>assistant yes<|end|><|start|>user go<|end|>"
        "<|start|>assistant "
    )


def test_template_may_be_a_file(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert find_chat_template([folder]) is None
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = conversation_of(folder, 100)
    assert chat.tokenizer.decode(chat.prompt("a")).startswith("<|start|>user a<|end|>")


def test_oldest_messages_are_dropped(folder):
    """Where the answer would not fit; a message that is too long by itself is refused."""
    chat = conversation_of(folder, 45)
    chat.prompt("first")
    chat.add_answer("one")
    shown = chat.tokenizer.decode(chat.prompt("second"))
    assert shown.startswith("<|start|>user second") and len(chat.messages) == 1
    chat.add_answer("two")
    with pytest.raises(ValueError, match="number of tokens of the prompt 'xxx.* is 117"):
        chat.prompt("x" * 99)
    assert chat.tokenizer.decode(chat.prompt("a")).startswith("<|start|>user a<")


def test_message_without_template_is_a_prompt():
    chat = Conversation(ByteTokenizer(), None, 4, 2)
    assert chat.prompt("ab") == [97, 98]
    chat.add_answer("c")
    assert chat.prompt("d") == [100]
    with pytest.raises(ValueError, match="is 5; allowed: 1 to the model's 4 positions"):
        chat.prompt("abcde")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": 3}', {3}),
        ('{"eos_token_id": [3, 5]}', {3, 5}),
        ("{}", set()),
        ("3", set()),
    ],
)
def test_end_tokens_are_those_of_generation_config(content, expected, tmp_path):
    assert find_end_tokens([tmp_path]) == set()
    (tmp_path / "generation_config.json").write_text(content)
    assert find_end_tokens([tmp_path]) == expected


def test_broken_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not JSON"):
        find_end_tokens([tmp_path])


def test_lines_are_read_as_they_come():
    reading, writing = os.pipe()
    reader = LineReader(reading)
    assert reader.next_line(0.0) == ""
    os.write(writing, "one\ntwö".encode())
    assert reader.next_line(60.0) == "one"
    assert reader.next_line(0.0) == ""
    thread = threading.Thread(target=os.write, args=(writing, b"\n\xff\n\nend"))
    thread.start()
    assert [reader.next_line(60.0) for _ in range(3)] == ["twö", "\ufffd", ""]
    thread.join()
    os.close(writing)
    assert [reader.next_line(60.0) for _ in range(3)] == ["end", None, None]
    os.close(reading)
