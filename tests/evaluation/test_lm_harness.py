"""The harness's language model: local tasks against a direct computation, batches, windows."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from helpers import harness_tasks as tasks
from megatron.config.tokenizer import TokenizerConfig
from megatron.evaluation.lm_harness import prefix_token
from megatron.evaluation.task_suite import RunOptions, TaskSuite
from megatron.inference.chat import find_chat_template
from megatron.tokenizer.build import build_tokenizer

OPTIONS = RunOptions(bootstrap_iters=0)


def results_of(suite: TaskSuite, harness, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, without the names of filters."""
    found = suite.run(harness, names, OPTIONS)["results"]
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in found[task].items()
            if metric.endswith(",none") and "_stderr" not in metric
        }
        for task in names
    }


def test_local_tasks_equal_direct_computation(tmp_path):
    """All kinds of requests, contexts and continuations longer than the model has positions."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    names = ["local_choice", "local_last_word", "local_pages"]
    suite = TaskSuite(names, "--tasks", [folder])
    found = results_of(suite, tasks.harness_model(), names)
    expected = tasks.expected_results(tasks.tiny_model())
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    # A suite can be run more than once.
    again = results_of(suite, tasks.harness_model(batch_size=1), names)
    for name in names:
        assert again[name] == pytest.approx(found[name], rel=1e-5), name
    # The questions tell models apart.
    assert 0 < found["local_choice"]["acc"] < 1


@pytest.mark.parametrize("stop_early", [False, True])
def test_generated_text_equals_direct_computation(tmp_path, monkeypatch, stop_early):
    """Up to a stop string, the end-of-document token or the number of tokens."""
    model = tasks.tiny_model()
    texts = [tasks.greedy_text(model, prompt["prompt"]) for prompt in tasks.PROMPTS]
    assert all(texts) and len(set(texts)) == len(texts)
    if stop_early:  # at the last characters of what the first prompt would give
        monkeypatch.setattr(tasks, "STOPS", [texts[0][2:4]])
        texts = [tasks.greedy_text(model, prompt["prompt"]) for prompt in tasks.PROMPTS]
        assert len(texts[0]) == 2
    records = [
        {**prompt, "answer": text} for prompt, text in zip(tasks.PROMPTS, texts, strict=True)
    ]
    records.append({"prompt": "another", "answer": "something else"})
    path = tasks.write_task(tmp_path, "texts", tasks.generation_settings(), records)
    suite = TaskSuite([str(path)], "--tasks")
    options = RunOptions(bootstrap_iters=0, log_samples=True)
    found = suite.run(tasks.harness_model(model, 2), [str(path)], options)
    assert found["results"]["texts"]["exact_match,none"] == pytest.approx(2 / 3)
    answers = [sample["filtered_resps"][0] for sample in found["samples"]["texts"]]
    assert answers[:2] == texts


def chat_folder(folder) -> str:
    """Write the files of a byte-level tokenizer with a chat template; return its folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_prompts_are_conversations(tmp_path):
    """Special tokens of the template are tokens, and solved examples earlier messages."""
    chat = tmp_path / "chat"
    chat.mkdir()
    config = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=chat_folder(chat))
    tokenizer = build_tokenizer(config)
    model = tasks.tiny_model()
    harness = tasks.harness_model(
        model, tokenizer=tokenizer, template=find_chat_template([chat])
    )
    questions = [{"q": "x?", "a": ["y", "z"]}, {"q": "u?", "a": ["v", "w"]}]
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{a}}",
        "doc_to_target": 0,
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    }
    path = str(tasks.write_task(tmp_path, "chat_choice", settings, questions))
    suite = TaskSuite([path], "--tasks", num_fewshot=1)
    options = RunOptions(
        bootstrap_iters=0, log_samples=True, chat_template=True, system_instruction="be"
    )
    found = suite.run(harness, [path], options)
    second = found["samples"]["chat_choice"][1]
    context = "s:be<|end|>u:x?<|end|>a:y<|end|>u:u?<|end|>a:"
    assert second["arguments"][0][0] == context
    tokens = []
    for text in context.split("<|end|>"):
        tokens += [*tokenizer.encode(text).tolist(), 256]
    expected = []
    for answer in ("v", "w"):
        row = [*tokens[:-1], *tokenizer.encode(answer).tolist()]
        expected.append(tasks.token_logprobs(model, row[-tasks.POSITIONS - 1 :])[-1][0])
    scores = [float(answer[0]) for answer in second["filtered_resps"]]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_text_without_any_beginning_is_refused():
    tokenizer = tasks.byte_tokenizer()
    assert prefix_token(tokenizer) == tokenizer.eod
    tokenizer.eod = None
    with pytest.raises(
        ValueError, match="a text without context needs an end-of-document token"
    ):
        prefix_token(tokenizer)
    tokenizer.bos = 7
    assert prefix_token(tokenizer) == 7


def test_bad_requests_are_refused(tmp_path):
    settings = tasks.generation_settings()
    settings["generation_kwargs"] = {"max_gen_toks": tasks.POSITIONS}
    path = str(tasks.write_task(tmp_path, "long", settings, tasks.PROMPTS))
    with pytest.raises(ValueError, match="tokens that a task generates is 40; allowed: fewer"):
        TaskSuite([path], "--tasks").run(tasks.harness_model(), [path], OPTIONS)
    settings = {"output_type": "loglikelihood", "doc_to_text": "a", "doc_to_target": ""}
    settings |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    path = str(tasks.write_task(tmp_path, "empty", settings, [{"x": "y"}]))
    with pytest.raises(ValueError, match="the continuation of a task is ''; allowed: a text"):
        TaskSuite([path], "--tasks").run(tasks.harness_model(), [path], OPTIONS)
