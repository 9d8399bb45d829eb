"""The file `latest`: an edit goes back, and only an edit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from helpers import engines, handmade
from megatron import log
from megatron.checkpoint import directory, loader
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.checkpoint.inspect import resolve_checkpoint
from megatron.checkpoint.latest import LatestRecord, read_latest, read_latest_record
from megatron.config.checkpoint import CheckpointConfig
from megatron.parallel.groups import Groups


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a directory of checkpoints 10, 20 and 30."""
    for iteration in (10, 20, 30):
        handmade.checkpoint(tmp_path / "c", handmade.weights(a=(6,)), 1, iteration=iteration)
    return tmp_path / "c"


def candidates(folder: Path, step: int = 0) -> list[int]:
    """Return the iterations of the candidates, in the order of preference."""
    selection = directory.select_checkpoints(folder, step)
    return [entry.manifest["iteration"] for entry in selection.candidates]


@pytest.mark.parametrize("end", ["", "\n", " \r\n"])
def test_edited_latest_goes_back(end, folder):
    (folder / "latest").write_text(f"iter_0000020{end}")
    selection = directory.select_checkpoints(folder)
    assert candidates(folder) == [20, 10] and selection.problems == []
    assert selection.note == (
        f"{folder}/latest was edited to iter_0000020: iter_0000030, completed later, will not be "
        "used"
    )
    assert resolve_checkpoint(folder).name == "iter_0000020"
    assert find_verified_checkpoint(folder).path.name == "iter_0000020"


def test_load_step_is_stronger_than_latest(folder):
    (folder / "latest").write_text("iter_0000010")
    assert candidates(folder, 30) == [30] and candidates(folder, 20) == [20]


def test_edited_latest_is_logged(folder, capsys):
    log.setup()
    (folder / "latest").write_text("iter_0000010")
    options = CheckpointConfig(load=str(folder))
    assert loader.find_checkpoint(options, Groups()).path.name == "iter_0000010"
    assert re.search(
        r"latest was edited to iter_0000010: iter_0000030, iter_0000020, completed later",
        capsys.readouterr().out,
    )


def test_damaged_choice_falls_back_to_older(folder):
    """The later checkpoints are those that the user rejected."""
    (folder / "latest").write_text("iter_0000020")
    handmade.damage(folder / "iter_0000020/rank_00000.safetensors")
    options = CheckpointConfig(load=str(folder))
    assert loader.find_checkpoint(options, Groups()).path.name == "iter_0000010"


def test_next_save_follows_the_edit(folder):
    """Later checkpoints stay until --keep-last or a save of their iteration removes them."""
    (folder / "latest").write_text("iter_0000010")
    handmade.checkpoint(folder, handmade.weights(a=(6,)), 1, iteration=15)
    assert (folder / "latest").read_text() == "iter_0000015"
    assert candidates(folder) == [15, 30, 20, 10]
    assert directory.select_checkpoints(folder).note == ""


def test_replaced_checkpoint_is_logged(folder, capsys):
    log.setup()
    (folder / "latest").write_text("iter_0000010")
    handmade.checkpoint(folder, handmade.weights(a=(6,)), 1, iteration=20)
    out = capsys.readouterr().out
    assert f"{folder}/iter_0000020 of an earlier save is replaced" in out
    assert candidates(folder) == [20, 30, 10]


def test_older_name_without_record_is_a_problem(folder):
    """A version without latest.json wrote the directory, or it was not copied."""
    (folder / "latest.json").unlink()
    assert directory.select_checkpoints(folder).problems == []
    (folder / "latest").write_text("iter_0000010")
    assert candidates(folder) == [30, 20, 10]
    assert directory.select_checkpoints(folder).problems == [
        f"{folder}/latest names iter_0000010, but iter_0000030 was completed later, and no "
        "latest.json shows whether the name was edited; --load-step 10 resumes from it"
    ]


def test_missing_latest_means_newest(folder):
    (folder / "latest").unlink()
    assert candidates(folder) == [30, 20, 10] and read_latest(folder) == ""
    assert directory.select_checkpoints(folder).problems == []


@pytest.mark.parametrize(
    "content, problem",
    [
        ("iter_0000099", "names iter_0000099, which does not exist"),
        ("x" * 200, r"holds 'x{200}', which is not the name of a checkpoint"),
        ("x" * 5000, "cannot be read: it is longer than 4096 bytes"),
        ("iter_0000010\niter_0000020", r"holds 'iter_0000010\\niter_0000020', which is not"),
        ("../c/iter_0000010", "which is not the name of a checkpoint"),
        ("a\0b", r"holds 'a\\x00b', which is not"),
    ],
)
def test_wrong_name_is_a_problem(content, problem, folder):
    (folder / "latest").write_text(content)
    assert candidates(folder) == [30, 20, 10]
    (found,) = directory.select_checkpoints(folder).problems
    assert re.search(f"{folder}/latest {problem}|{problem}", found) and "\n" not in found


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"checkpoint": 3, "serial": 3}', '{"checkpoint": "a"}', "9" * 5000],
)
def test_malformed_record_is_ignored(content, folder):
    assert read_latest_record(folder) == LatestRecord("iter_0000030", 3)
    (folder / "latest.json").write_text(content)
    assert read_latest_record(folder) is None and candidates(folder) == [30, 20, 10]


def test_inspection_marks_the_choice(folder):
    (folder / "latest").write_text("iter_0000020")
    done = handmade.run("inspect_checkpoint.py", folder)
    assert re.search(r"(?m)^  latest +iter_0000020 ", done.stdout)
    (folder / "latest").write_text("iter_0000030")
    done = handmade.run("inspect_checkpoint.py", folder)
    assert re.search(r"(?m)^  newest +iter_0000030 ", done.stdout)


def _continue(config) -> str:
    """Run on a rank: one step after the loaded checkpoint, and a save."""
    run = engines.Run(config)
    try:
        run.steps(1)
        run.save()
        return run.source.path.name
    finally:
        run.close()


def test_run_continues_from_the_choice(ranks1, tmp_path):
    config = engines.config_of("topk", 1, 1, save=str(tmp_path / "c"))
    ranks1.run(engines.train, config, 1)
    resume = engines.loading(config, tmp_path / "c", tmp_path / "c")
    for _ in range(2):
        ranks1.run(_continue, resume)
    (tmp_path / "c/latest").write_text("iter_0000001")
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    for folder in ("c", "copy"):
        resume = engines.loading(config, tmp_path / folder, tmp_path / folder)
        assert ranks1.run(_continue, resume) == ["iter_0000001"]
        assert candidates(tmp_path / folder) == [2, 3, 1]
