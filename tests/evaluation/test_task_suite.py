"""Tasks by name: those that users ask for, errors of names, files and data sets, few-shot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
import pytest

from helpers import harness_tasks as tasks
from megatron.evaluation.task_suite import RunOptions, TaskSuite, known_tasks

OFFERED = {
    "lambada": ["lambada_openai"],
    "hellaswag": ["hellaswag"],
    "piqa": ["piqa"],
    "blimp": ["blimp"],
    "arc": ["arc_easy", "arc_challenge"],
    "mmlu/default": ["mmlu"],
    "openbookqa": ["openbookqa"],
    "winogrande": ["winogrande"],
    "siqa": ["social_iqa"],
    "commonsense_qa": ["commonsense_qa"],
    "race": ["race"],
}
"""Tasks of the documentation by the folder of the harness that has their files"""


def load(*names: str, **options) -> TaskSuite:
    return TaskSuite(names, "--tasks", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tasks.write_tasks(tmp_path_factory.mktemp("suite"))


def test_unknown_name_is_refused(monkeypatch):
    """With the names that are close, which the harness has under the documented names.

    Not all files of the harness are parsed: there are thousands.
    """
    root = Path(lm_eval.__file__).parent / "tasks"
    manager = known_tasks([str(root / folder) for folder in OFFERED], with_harness=False)
    names = [name for names in OFFERED.values() for name in names]
    assert set(names) <= set(manager.all_tasks)
    monkeypatch.setattr("megatron.evaluation.task_suite.known_tasks", lambda *a, **k: manager)
    with pytest.raises(ValueError) as caught:
        load("helaswag")
    assert str(caught.value).startswith(
        "--tasks is 'helaswag'; allowed: a task, group or tag of the harness, or a file. "
        "Similar names: hellaswag"
    )
    with pytest.raises(ValueError, match="file. `python tools/evaluate.py --list-tasks` shows"):
        load("?")


def test_missing_data_set_is_named(monkeypatch):
    """A task of a group: its data set, and how to get it."""
    import datasets

    def unreachable(path, name, **options):
        raise ConnectionError(f"Couldn't reach {path} on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError) as caught:
        load("cbt")
    assert str(caught.value) == (
        "--tasks cbt: the data set cam-cst/cbt of its task cbt_cn cannot be loaded "
        "(ConnectionError: Couldn't reach cam-cst/cbt on the Hub). It comes from the Hugging "
        "Face Hub: with network access run python -c 'import datasets; "
        'datasets.load_dataset("cam-cst/cbt", "CN")\', and copy ~/.cache/huggingface (HF_HOME) '
        "to this machine"
    )


def test_broken_task_files_are_named(tmp_path):
    path = tasks.write_task(tmp_path, "lost", {"doc_to_text": ""}, [{"a": 1}])
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(ValueError, match=f"--tasks {path}: the data files of its task lost .*"):
        load(str(path))
    path = tasks.write_task(tmp_path, "wrong", {"output_type": "none"}, [{"a": 1}])
    with pytest.raises(
        ValueError, match=f"--tasks {path}: the task cannot be loaded .ValueError: "
    ):
        load(str(path))
    with pytest.raises(
        ValueError, match="a folder of task files is '/none'; allowed: a direct"
    ):
        load("local_choice", include_paths=["/none"])
    with pytest.raises(ValueError, match="--tasks is ''; allowed: one task or more"):
        load()


def test_task_of_two_names_is_refused(folder):
    path = f"{folder}/local_choice.yaml"
    suite = load("local_choice", path, include_paths=[folder])
    with pytest.raises(
        ValueError, match="the task local_choice belongs to both local_choice and"
    ):
        suite.run(None, ["local_choice", path], RunOptions())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"--tasks a,b needs .* 'moe-megatron\[eval\]'"):
        load("a", "b")


def test_number_of_shots_is_set(folder, tmp_path):
    """But not for a task that is made for none."""
    tasks.write_task(
        tmp_path,
        "no_shots",
        {"doc_to_text": "x", "doc_to_target": "{{a}}", "num_fewshot": 0},
        [{"a": "b"}],
    )
    names = ("local_choice", "no_shots")
    suite = load(*names, include_paths=[folder, str(tmp_path)], num_fewshot=2)
    shots = [suite.loaded[name]["tasks"][name].get_config("num_fewshot") for name in names]
    assert shots == [2, 0]


def test_results_of_group_have_its_name(folder):
    group = {"group": "locals", "task": ["local_choice", "local_pages"]}
    Path(folder, "locals.yaml").write_text(json.dumps(group))
    suite = load("locals", "local_answers", include_paths=[folder])
    assert suite.tasks_of("locals") == ["locals"]
    assert suite.tasks_of("local_answers") == ["local_answers"]
    assert list(suite.loaded["locals"]["tasks"]) == ["local_choice", "local_pages"]


def test_example_in_tree_needs_no_network(monkeypatch, repo):
    """Its data are found from the repository's root, and each answer is a choice."""
    monkeypatch.chdir(repo)
    path = "examples_deepspeed/MoE/evaluation/python_lines.yaml"
    suite = load(path)
    (task,) = suite.loaded[path]["tasks"].values()
    assert len(task.eval_docs) == 24
    for question in task.eval_docs:
        assert len(set(question["choices"])) == 3
        assert 0 <= question["answer"] < 3
