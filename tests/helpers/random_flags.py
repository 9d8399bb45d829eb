"""Random command lines of short trainings, made from the schema of the configuration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import runs
from megatron.config.flags import Flag, flags_of
from megatron.config.schema import SECTIONS
from megatron.config.values import format_flag
from megatron.moe.gate import available_gates, gate_config_class

INTEGERS = (-1, 0, 1, 2, 3, 4, 8, 16)
NUMBERS = (-1.0, 0.0, 1e-8, 1e-3, 0.5, 1.0, 2.0, 1e30)
LARGEST = 2**63 - 1
TEXTS = ("", "missing", "folder", "file.txt")
NO_TASK = ("missing.yaml",)
"""A path, because a name is looked up in thousands of files"""
SMALL = {
    "num_workers": (-1, 0),  # the ranks of tests cannot start processes
    "timeout_minutes": (-1.0, 0.0, 0.5, 10.0),  # a shorter one ends the process of the test
    "exit_duration_in_mins": (-1.0, 0.0, 10.0),
    "train_iters": (-1, 0, 1, 2),
    "train_samples": (-1, 0, 1, 4),
    "train_tokens": (-1, 0, 1, 100),
    "rampup_batch_size": ((), (2, 2, 4), (1, 1), (2, 2, 2, 2), (-1, 2, 2)),
    "split": ("", "1", "80,15,5", "1,1", "a,b,c", "-1,1,1", "0,0,0", "1e9,1,1"),
    "gate": ("nope", "topk", "hash", "peer"),
    "train_data_path": ((), ("missing",), ("0.5", "missing"), ("0.5",)),
    "data_path": ((), ("missing",), ("1", "missing", "x")),
    "eval_tasks": ((), NO_TASK),
}
"""Values of fields for which those of the type would take long, or say little"""
MAY_BE_LARGE = """
    seed eval_interval log_interval save_interval keep_last keep_every load_step exit_interval
    max_bad_steps loss_spike_window profile_step_start profile_step_end lr_warmup_iters
    lr_warmup_tokens lr_decay_iters lr_decay_tokens moe_min_capacity moe_first_k_dense
    expert_interval moe_expert_parallel_size topk n_group topk_group streaming_shuffle_samples
"""
"""Integers that are neither the size of a tensor nor the length of a run"""


def section_flags() -> list[Flag]:
    return [flag for section, cls in SECTIONS.items() for flag in flags_of(cls, section)]


def gate_flags(gate: str) -> list[Flag]:
    return list(flags_of(gate_config_class(gate), "gate_options"))


def base(data: str) -> list[str]:
    """Return the flags of a training of one step of a small dense model."""
    words = [*runs.SHAPE, "--data-path", data, "--micro-batch-size", "2", "--train-iters", "1"]
    return [*words, "--split", "80,15,5", "--eval-iters", "1", "--seq-length", "16"]


def command_line(seed: int, data: str) -> list[str]:
    """Return the flags of a training of one or two steps with up to four random flags.

    Most of them come with what they need to have an effect.

    Args:
        data: prefix of token files.
    """
    rng = random.Random(seed)
    words = base(data)
    known = section_flags()
    if rng.random() < 0.6:
        gate = rng.choice(available_gates())
        words += ["--gate", gate, "--num-experts", str(rng.choice((1, 2, 4, 8)))]
        known += gate_flags(gate)
    by_name = {flag.name: flag for flag in known}
    for flag in rng.sample(known, rng.randint(1, 4)):
        if rng.random() < 0.8:
            words += _needed(flag, by_name, rng)
        words += _words(flag, _value(flag, rng), rng)
    return words


def _needed(flag: Flag, by_name: dict[str, Flag], rng: random.Random) -> list[str]:
    """Return words that set what a flag needs."""
    words = []
    for need in flag.needs:
        for needed in need.settings[:1]:
            other = by_name[needed.name]
            values: Sequence[Any] = needed.values or (4, 0.5, True, "folder", ("folder",))
            if needed.name == "eval_tasks":
                values = (NO_TASK,)
            fitting = [value for value in values if _fits(other, value)]
            words += _words(other, rng.choice(fitting), rng)
    return words


def _fits(flag: Flag, value: Any) -> bool:
    if flag.type.is_list:
        return isinstance(value, tuple)
    return type(value) is flag.type.base


def _value(flag: Flag, rng: random.Random) -> Any:
    """Return a random value of a flag's type, in one of twenty cases of another one."""
    if flag.name in SMALL:
        return rng.choice(SMALL[flag.name])
    if rng.random() < 0.05:
        return rng.choice(("", "x", "1.5", "nan", "-"))
    if flag.choices:
        return rng.choice(flag.choices)
    values = {int: INTEGERS, float: NUMBERS, str: TEXTS, bool: (False, True)}[flag.type.base]
    if flag.name in MAY_BE_LARGE.split():
        values = (*INTEGERS, LARGEST)
    if flag.type.is_list:
        return tuple(rng.choices(values, k=rng.randint(0, 3)))
    return rng.choice(values)


def _words(flag: Flag, value: Any, rng: random.Random) -> list[str]:
    spelling = rng.choice(flag.spellings)
    if flag.type.base is bool and not isinstance(value, bool):
        return [f"{spelling}={value}"]
    return format_flag(spelling, value)


def make_folder(folder: Path) -> None:
    """Write the files that command lines name."""
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("not what a flag expects\n")
