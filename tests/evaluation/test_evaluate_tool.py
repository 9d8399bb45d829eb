"""tools/evaluate.py on a sharded checkpoint."""

from __future__ import annotations

import json
import math

import pytest

from helpers import harness_tasks as tasks
from helpers.hf_folders import save_model
from helpers.tools_in_ranks import run_tool

NAMES = ["local_choice", "local_last_word", "local_pages", "local_answers"]


def flags(load, folder: str, *more: str) -> list[str]:
    return ["--load", str(load), "--tasks", ",".join(NAMES), "--include-path", folder, *more]


def test_ranks_share_examples(small_checkpoint, ranks1, ranks2, tmp_path):
    """Two ranks share the experts, too; figures are those of one rank, and rank 0 reports."""
    folder = tasks.write_tasks(tmp_path / "tasks")
    found = []
    for number, ranks in enumerate((ranks1, ranks2)):
        output = tmp_path / f"{number}.json"
        argv = flags(small_checkpoint, folder, "--batch-size", "2", "--output", str(output))
        argv += ["--log-samples", "--bootstrap-iters", "10"]
        printed = ranks.run(run_tool, "evaluate", argv)
        assert all(f"|{name}" in printed[0] for name in NAMES)
        assert printed[1:] == [""] * number
        found.append(json.loads(output.read_text()))
    one, two = found
    assert one["iteration"] == 10 and one["tokenizer"] == "ByteTokenizer"
    for name in NAMES:
        figures = [_numbers(content["results"][name]) for content in found]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)
        assert len(one["samples"][name]) == one["n-samples"][name]["effective"]
    assert one["results"]["local_pages"]["byte_perplexity,none"] > 1
    assert one["results"]["local_last_word"]["perplexity_stderr,none"] > 0


def _numbers(results: dict) -> dict[str, float]:
    return {key: value for key, value in results.items() if not isinstance(value, str)}


def test_limit_and_shots_reach_tasks(small_checkpoint, ranks1, tmp_path):
    folder = tasks.write_tasks(tmp_path / "tasks")
    output = tmp_path / "out.json"
    argv = flags(small_checkpoint, folder, "--limit", "1", "--output", str(output))
    ranks1.run(run_tool, "evaluate", [*argv, "--bootstrap-iters", "0"])
    content = json.loads(output.read_text())
    assert [content["n-samples"][name]["effective"] for name in NAMES] == [1, 1, 1, 1]
    assert content["results"]["local_choice"]["acc_stderr,none"] == "N/A"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--limit", "0"], "--limit is 0.0; allowed: a positive integer, or a fraction"),
        (["--limit", "1.5"], "--limit is 1.5; allowed: a positive integer, or a fraction"),
        (["--num-fewshot", "-1"], "--num-fewshot is -1; allowed: 0 or more"),
        (["--bootstrap-iters", "1"], "--bootstrap-iters is 1; allowed: 0, or 2 or more"),
        (
            ["--apply-chat-template"],
            "--apply-chat-template is True; allowed: for a tokenizer wi",
        ),
        (["--log-samples"], "--log-samples is True; allowed: only with --output FILE"),
        (["--output", "/none/a.json"], "--output is '/none/a.json'; allowed: the path of"),
        (["--output", "/"], "--output is '/'; allowed: the path of a file"),
        (["--batch-size", "0"], "--batch-size is 0; allowed: a positive integer"),
    ],
)
def test_bad_flags_are_refused(small_checkpoint, ranks1, tmp_path, more, message):
    folder = tasks.write_tasks(tmp_path / "tasks")
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(run_tool, "evaluate", flags(small_checkpoint, folder, *more))


def test_tasks_can_be_listed(capsys, tmp_path, monkeypatch, repo):
    monkeypatch.syspath_prepend(str(repo))
    from megatron.evaluation import task_suite
    from tools import evaluate

    own = task_suite.known_tasks  # the harness's own files take long to parse
    monkeypatch.setattr(task_suite, "known_tasks", lambda paths: own(paths, False))
    folder = tasks.write_tasks(tmp_path / "tasks")
    assert evaluate.main(["--list-tasks", "--include-path", folder]) == 0
    names = capsys.readouterr().out.splitlines()
    assert {"cbt", "cbt_ne", "local_pages"} <= set(names)
    with pytest.raises(SystemExit):
        evaluate.parse(["--tasks", "piqa"])
    assert "--load and --tasks are needed" in capsys.readouterr().err


def test_folder_of_transformers_is_evaluated(ranks2, tmp_path, monkeypatch):
    """Two ranks share its experts; figures are those of its own class."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model(tmp_path / "mixtral", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(tasks, "POSITIONS", model.config.max_position_embeddings)
    pages = [document["page"] for document in tasks.DOCUMENTS]
    rows = [[0, *tokenizer(page)["input_ids"]] for page in pages]
    nll = -sum(tasks.text_score(model, row)[0] for row in rows)
    bits = nll / sum(len(page.encode()) for page in pages) / math.log(2)
    output = tmp_path / "out.json"
    argv = ["--load", str(folder), "--tasks", "local_pages", "--output", str(output)]
    argv += ["--include-path", tasks.write_tasks(tmp_path / "tasks")]
    ranks2.run(run_tool, "evaluate", argv)
    content = json.loads(output.read_text())
    assert content["load"] == str(folder) and content["iteration"] is None
    found = content["results"]["local_pages"]["bits_per_byte,none"]
    assert found == pytest.approx(bits, rel=1e-5)
