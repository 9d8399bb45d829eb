"""Tiny training runs for tests: their flags, their metrics, and running one in a rank."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron.log import get_logger

SHAPE = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "32",
    "--ffn-hidden-size",
    "64",
    "--init-method-std",
    "0.1",
    "--tokenizer-type",
    "ByteTokenizer",
    "--make-vocab-size-divisible-by",
    "1",
]
MOE = ["--num-experts", "4", "--moe-ffn-hidden-size", "32", "--expert-interval", "2"]
EP2 = ("--moe-expert-parallel-size", "2")


def flags(data: str, out: Path, iters: int = 20, *more: str) -> list[str]:
    return [
        *SHAPE,
        *MOE,
        "--data-path",
        data,
        "--split",
        "80,15,5",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--train-iters",
        str(iters),
        "--lr",
        "5e-3",
        "--min-lr",
        "5e-4",
        "--lr-warmup-fraction",
        "0.1",
        "--eval-interval",
        "10",
        "--eval-iters",
        "2",
        "--log-interval",
        "1",
        "--save",
        str(out / "checkpoints"),
        "--metrics-file",
        str(out / "metrics.jsonl"),
        "--gate",
        "threshold",
        "--threshold",
        "0.8",
        "--bf16",
        "--hidden-dropout",
        "0.05",
        *more,
    ]


def with_gate(flags: list[str], *gate: str) -> list[str]:
    """Return flags with the gate and its options replaced by those in `gate`."""
    start = flags.index("--gate")
    stop = flags.index("--bf16")
    return [*flags[:start], *gate, *flags[stop:]]


def metrics(out: Path, kind: str = "train") -> list[dict]:
    """Return the metrics rows of a kind (train, eval or test) of a run."""
    from megatron.training.metrics_file import read_metrics

    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]


def copy_dataset(prefix: str, copy: Path) -> str:
    """Copy a dataset, because a blend may not name one twice; the prefix of the copy."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prefix + suffix, f"{copy}{suffix}")
    return str(copy)


def set_rank_variables() -> None:
    """Set the environment of a rank of the pool to what the launcher would set."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=rank)


def train(argv: list[str], build_task: Callable | None = None) -> None:
    """Train in a rank of the pool, as the launcher would start it.

    Args:
        build_task: as in `pretrain.train`.
    """
    from megatron import pretrain

    set_rank_variables()
    pretrain.train(pretrain.parse_flags(argv), build_task=build_task)


def logged_train(argv: list[str], build_task: Callable | None = None) -> list[str]:
    """Train as `train`, and return the log lines of this rank."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = get_logger()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(argv, build_task)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return messages
