"""The task files of the Children's Book Test on hand-made examples in the dataset's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import harness_tasks as tasks
from megatron.evaluation.task_suite import OWN_TASKS, RunOptions, TaskSuite, known_tasks
from megatron.evaluation.tasks.cbt.preprocess_cbt import ordinary_text, to_choices

STORY = ["The fox ran .", "`` I do n't know , '' said the dog ."]
EXAMPLES = [
    {
        "sentences": STORY,
        "question": "`` XXXXX is late , '' he said .",
        "answer": "Fox",
        "options": ["Dog", "Fox", "cat"],
    },
    {
        "sentences": STORY,
        "question": "Then the XXXXX was gone !",
        "answer": "dog",
        "options": ["dog", "sea", "moon"],
    },
]


def test_blanks_and_quotes_are_restored():
    assert to_choices(EXAMPLES[0]) == {
        "context": 'The fox ran. "I don\'t know," said the dog. "',
        "choices": [f'{word} is late," he said.' for word in ("Dog", "Fox", "cat")],
        "gold": 1,
    }
    assert to_choices(EXAMPLES[1]) == {
        "context": 'The fox ran. "I don\'t know," said the dog. Then the',
        "choices": [f" {word} was gone!" for word in ("dog", "sea", "moon")],
        "gold": 0,
    }
    tokens = "the boys ' -LRB- old -RRB- ` hut ' : we 'll see"
    assert ordinary_text(tokens) == "the boys' (old) 'hut': we'll see"


@pytest.mark.parametrize("change", [{"question": "no blank"}, {"answer": "other"}])
def test_example_without_answer_is_refused(change):
    with pytest.raises(ValueError, match="allowed: a question with XXXXX, and one of its"):
        to_choices({**EXAMPLES[0], **change})


def test_local_examples_equal_direct_computation(tmp_path: Path):
    """The task file itself, with other data."""
    data = tmp_path / "cbt.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    files = {split: str(data) for split in ("train", "validation", "test")}
    task = {
        "include": str(OWN_TASKS / "cbt" / "cbt_cn.yaml"),
        "task": "local_cbt",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (tmp_path / "local_cbt.yaml").write_text(json.dumps(task))
    suite = TaskSuite(["local_cbt"], "--tasks", [str(tmp_path)])
    model = tasks.tiny_model()
    harness = tasks.harness_model(model)
    options = RunOptions(bootstrap_iters=0, log_samples=True)
    found = suite.run(harness, ["local_cbt"], options)
    right = 0
    for example, sample in zip(EXAMPLES, found["samples"]["local_cbt"], strict=True):
        parts = to_choices(example)
        scores = [
            tasks.continuation_score(model, parts["context"], choice)[0]
            for choice in parts["choices"]
        ]
        answers = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert answers == pytest.approx(scores, rel=1e-5)
        right += scores.index(max(scores)) == parts["gold"]
    assert found["results"]["local_cbt"]["acc,none"] == right / len(EXAMPLES)


def test_own_tasks_are_found_by_name():
    manager = known_tasks(with_harness=False)
    assert manager.all_groups == ["cbt"]
    assert manager.all_subtasks == ["cbt_cn", "cbt_ne", "cbt_p", "cbt_v"]
