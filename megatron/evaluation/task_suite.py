"""Tasks of lm-evaluation-harness: found by name, loaded with their data sets, and run."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.config.fields import require
from megatron.optional_packages import import_optional
from megatron.parallel import rng

OWN_TASKS = Path(__file__).parent / "tasks"
"""Task files of this package, which are found like those of the harness"""
# The seeds that the harness starts every evaluation with.
_PYTHON_SEED = 0
_SEED = 1234
_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Data sets that are files of the user, not names on the Hugging Face Hub"""


@dataclass(frozen=True)
class RunOptions:
    """How tasks are run."""

    limit: float | None = None
    """examples of each task: a number of 1 or more, or a fraction; None: all"""
    bootstrap_iters: int = 1000
    """resamples for the standard errors of metrics that have no formula, such as perplexity; 0:
    no standard errors"""
    log_samples: bool = False
    """whether the results contain every prompt and answer"""
    chat_template: bool = False
    """whether prompts are messages of a conversation, solved examples among them"""
    system_instruction: str | None = None
    """first message, or first line, of every prompt"""


class TaskSuite:
    """Tasks with their data sets, in this process.

    Args:
        names: tasks, groups or tags, or paths of task files.
        flag: flag that names them, for messages.
        include_paths: folders with further task files, searched recursively; one of them
            replaces a task of the same name.
        num_fewshot: solved examples before each question; None: each task's own number. Tasks
            whose files set 0 keep it, as in the harness.

    Attributes:
        loaded: for each name its tasks, groups and the names in each group, as the harness's
            `TaskManager.load` returns them.

    Raises:
        ValueError: lm_eval is not installed, a name is unknown, a task or its data set cannot
            be loaded, or there are no names.
    """

    def __init__(
        self,
        names: Sequence[str],
        flag: str,
        include_paths: Sequence[str] = (),
        num_fewshot: int | None = None,
    ):
        require(bool(names), flag, "", "one task or more, such as lambada_openai,hellaswag")
        for folder in include_paths:
            require(os.path.isdir(folder), "a folder of task files", folder, "a directory")
        self.num_fewshot = num_fewshot
        manager = _task_manager(names, flag, include_paths)
        self.loaded: dict[str, dict[str, Any]] = {}
        for name in names:
            with _explained(flag, name), _quiet(), _seeded():
                self.loaded[name] = manager.load([name])
            if num_fewshot is not None:
                _set_num_fewshot(self.loaded[name], num_fewshot)

    def run(self, model: Any, names: Sequence[str], options: RunOptions) -> dict[str, Any]:
        """Run the tasks of some names with a model of the harness.

        Returns:
            The harness's results: "results" by task and group, with keys such as "acc,none" and
            "acc_stderr,none", and what describes the tasks.

        Raises:
            ValueError: two names have a task in common.
        """
        from lm_eval.evaluator import evaluate

        tasks = self._merged(names)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        with _quiet(), _seeded():
            return evaluate(
                model,
                tasks,
                limit=options.limit,
                bootstrap_iters=options.bootstrap_iters,
                log_samples=options.log_samples,
                system_instruction=options.system_instruction,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
            )

    def tasks_of(self, name: str) -> list[str]:
        """Return what the results of a name are found under: a group has one of its own, a tag
        stands for its tasks."""
        loaded = self.loaded[name]
        if name in loaded["groups"]:
            return [name]
        return list(loaded["tasks"])

    def _merged(self, names: Sequence[str]) -> dict[str, Any]:
        merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        owners: dict[str, str] = {}
        for name in names:
            for task in self.loaded[name]["tasks"]:
                other = owners.setdefault(task, name)
                if other != name:
                    raise ValueError(
                        f"the task {task} belongs to both {other} and {name}; allowed: once. "
                        "Evaluate them one after the other"
                    )
            for part, found in merged.items():
                found |= self.loaded[name][part]
        return merged


def known_tasks(include_paths: Sequence[str] = (), with_harness: bool = True) -> Any:
    """Return the harness's `TaskManager` over its task files, ours and those of some folders."""
    from lm_eval.tasks import TaskManager

    folders = [OWN_TASKS, *map(Path, include_paths)]
    return TaskManager(include_path=folders, include_defaults=with_harness)


def _task_manager(names: Sequence[str], flag: str, include_paths: Sequence[str]) -> Any:
    """Return a task manager that knows all names.

    The thousands of task files of the harness, which take seconds to parse, are left out if the
    names are in the other folders or files, with the members of groups.
    """
    import_optional("lm_eval.tasks", "eval", f"{flag} {','.join(names)}")
    for name in names:
        is_path = name.endswith((".yaml", ".yml")) or os.sep in name
        require(not is_path or os.path.isfile(name), flag, name, "the path of a task file")
    manager = known_tasks(include_paths, with_harness=False)
    if all(_is_complete(manager, name) or os.path.isfile(name) for name in names):
        return manager
    manager = known_tasks(include_paths)
    for name in names:
        if name in manager.all_tasks or os.path.isfile(name):
            continue
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        advice = "`python tools/evaluate.py --list-tasks` shows all."
        if close:
            advice = f"Similar names: {' '.join(close)}. {advice}"
        require(False, flag, name, "a task, group or tag of the harness, or a file", advice)
    return manager


def _is_complete(manager: Any, name: str) -> bool:
    """Whether a task manager knows a task, or a group with all its members."""
    if name in manager.all_groups:
        members = manager.task_index[name].cfg["task"]
        return all(isinstance(part, str) and _is_complete(manager, part) for part in members)
    return name in manager.all_subtasks


def _set_num_fewshot(loaded: dict[str, Any], number: int) -> None:
    """Set the number of examples of all tasks but those that are made for none."""
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=number)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Start the random streams as the harness does, and restore them at the end."""
    with rng.preserved():
        random.seed(_PYTHON_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        yield


@contextlib.contextmanager
def _explained(flag: str, name: str) -> Iterator[None]:
    """Turn any error of loading a task into one line that says what to do."""
    try:
        yield
    except Exception as error:  # data sets and task files raise all kinds
        raise ValueError(_loading_problem(flag, name, error)) from error


def _loading_problem(flag: str, name: str, error: Exception) -> str:
    """Describe why a task could not be loaded."""
    lines = str(error).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0][:300]}"
    task = _task_in_traceback(error)
    if task is None:
        return f"{flag} {name}: the task cannot be loaded ({reason}). Correct its file"
    path = task.DATASET_PATH
    where = "" if task.config.task == name else f" of its task {task.config.task}"
    if path in _FILE_FORMATS:
        files = (task.config.dataset_kwargs or {}).get("data_files")
        return (
            f"{flag} {name}: the data files{where} {files} cannot be loaded ({reason}). "
            "Relative paths begin in the working directory"
        )
    arguments = ", ".join(json.dumps(part) for part in (path, task.DATASET_NAME) if part)
    return (
        f"{flag} {name}: the data set {path}{where} cannot be loaded ({reason}). It comes from "
        "the Hugging Face Hub: with network access run python -c 'import datasets; "
        f"datasets.load_dataset({arguments})', and copy ~/.cache/huggingface (HF_HOME) to this "
        "machine"
    )


def _task_in_traceback(error: Exception) -> Any:
    """Return the task whose data set was being loaded; None: it had not come that far.

    A group loads many tasks, and the errors of data sets do not name them.
    """
    from lm_eval.api.task import ConfigurableTask

    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigurableTask) and frame.f_code.co_name == "download":
            return owner
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the harness prints to stderr, and hide its progress bars unless on a terminal.

    Its warnings are about settings that task files leave to their defaults. Standard errors are
    computed in this process: one with process groups is not forked.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():
            stack.enter_context(_without_progress_bars())
        yield


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of the harness and of data sets, which would fill a log file."""
    import datasets
    from lm_eval.api import model, task

    modules = (model, task)
    bars = [module.tqdm for module in modules]
    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for module, bar in zip(modules, bars):
        module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        for module, bar in zip(modules, bars):
            module.tqdm = bar
        if not were_hidden:
            datasets.enable_progress_bars()
