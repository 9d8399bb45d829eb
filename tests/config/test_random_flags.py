"""Random command lines: each runs, or ends with one line that the user can act on."""

import os
from pathlib import Path

import pytest

from helpers import random_flags, runs
from megatron.config import cli
from megatron.exit_codes import classify_error
from megatron.model.builder import build_model, size_table
from megatron.model.meta_device import meta_device
from megatron.moe.gate import available_gates, gate_config_class
from megatron.parallel.groups import Groups

COMMANDS = 500
BUILT = 200
BATCH = 25


def _build(argv: list[str]) -> None:
    """Parse flags, and build the model without its values."""
    config = cli.parse(argv, gate_config_class, available_gates)
    with meta_device():
        model = build_model(
            config.model,
            config.moe,
            config.gate_options,
            vocab_size=config.model.vocab_size or 257,
            seed=config.train.seed,
            groups=Groups(),
            attention=config.attention,
            rotary=config.rotary,
        )
    size_table(model)


def _train(argv: list[str], folder: str) -> str:
    """Train in a rank; return the error that a program would print, or ""."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        runs.train(argv)
        return ""
    except (ValueError, OSError, RuntimeError) as error:
        message, code = classify_error(error)
        if message is None or code != 2:
            raise
        return str(message)
    finally:
        os.chdir(before)


def check_message(message: str, argv: list[str]) -> None:
    assert message and "\n" not in message and len(message) < 700, (message, argv)


def check_files(folder: Path, failed: bool, argv: list[str]) -> None:
    """Check that checkpoints are complete, and that nothing else looks like one."""
    for checkpoint in folder.rglob("iter_*"):
        assert (checkpoint / "manifest.json").is_file(), (checkpoint, argv)
    assert not list(folder.rglob("*.tmp")), argv
    if failed:
        assert not list(folder.rglob("*.safetensors")), argv


def test_random_flags_parse_and_build(data):
    """Many command lines, up to the model without values; a third of them is valid at least.

    The early check refuses none that the complete one accepts.
    """
    built = 0
    for seed in range(BUILT):
        argv = random_flags.command_line(seed, data)
        try:
            early = ""
            cli.refuse_early(argv)
        except ValueError as error:
            early = str(error)
        try:
            _build(argv)
            assert not early, f"seed {seed}: {argv}"
        except ValueError as error:
            message, code = classify_error(error)
            assert code == 2, f"seed {seed}: {argv}"
            check_message(str(message), argv)
        else:
            built += 1
    assert BUILT / 3 < built < BUILT


@pytest.mark.parametrize(
    "flag",
    [
        "--save",
        "--tensorboard-dir",
        "--wandb-project p --wandb-save-dir",
        "--profile --profile-dir",
        "--data-cache-path",
    ],
)
@pytest.mark.parametrize("path", ["file.txt", "file.txt/below"])
def test_file_in_place_of_a_directory(flag, path, data, tmp_path, ranks1):
    """The commands above found a message that named neither the flag nor what is allowed."""
    random_flags.make_folder(tmp_path / "run")
    argv = [*random_flags.base(data), *flag.split(), path]
    (message,) = ranks1.run(_train, argv, str(tmp_path / "run"), timeout=30)
    assert message == (
        f"{flag.split()[-1]} is {path!r}; allowed: the path of a directory, which is made if it "
        "is missing. file.txt is a file."
    )


def test_directory_in_place_of_a_file(data, tmp_path, ranks1):
    random_flags.make_folder(tmp_path / "run")
    argv = [*random_flags.base(data), "--metrics-file", "folder"]
    (message,) = ranks1.run(_train, argv, str(tmp_path / "run"), timeout=30)
    assert message == (
        "--metrics-file is 'folder'; allowed: the path of a file. folder is a directory."
    )


@pytest.mark.filterwarnings("ignore:.*future:UserWarning")
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.slow] if first else [])
        for first in range(0, COMMANDS, BATCH)
    ],
)
def test_random_flags_train(first, data, tmp_path, ranks1):
    """Train one or two steps, each within half a minute, in the order of the seeds."""
    trained = 0
    for seed in range(first, first + BATCH):
        folder = tmp_path / str(seed)
        random_flags.make_folder(folder)
        argv = random_flags.command_line(seed, data)
        (message,) = ranks1.run(_train, argv, str(folder), timeout=30)
        if message:
            check_message(message, argv)
        else:
            trained += 1
        check_files(folder, bool(message), argv)
    assert trained > BATCH / 20
