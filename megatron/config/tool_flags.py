"""Flags that several programs in tools/ have, and checks of their values."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.config.fields import require


def add_load_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that name the model of a program: --load, --load-step and --gate-path.

    Args:
        required: whether the program needs a model whatever its other flags are.
    """
    parser.add_argument(
        "--load",
        required=required,
        help="directory of checkpoints (--save of the training run), or a Hugging Face folder",
    )
    parser.add_argument(
        "--load-step",
        type=int,
        default=0,
        help="iteration of the checkpoint; 0: the newest (default)",
    )
    parser.add_argument(
        "--gate-path",
        nargs="+",
        action="extend",
        default=[],
        help="files with the model's gate, if it is neither built-in nor installed",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def require_output_file(path: str) -> None:
    """Raise ValueError if the file of --output could not be written at the end of a program."""
    require(
        Path(path).parent.is_dir() and not Path(path).is_dir(),
        "--output",
        path,
        "the path of a file in a folder that exists",
    )
