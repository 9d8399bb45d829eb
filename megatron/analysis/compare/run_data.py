"""Looks for the data of a run before it starts."""

from __future__ import annotations

import os
from functools import cache

from megatron.config.fields import require
from megatron.config.schema import DataConfig, RunConfig
from megatron.data.data_args import read_data_args
from megatron.data.indexed.reader import read_index
from megatron.data.sampling.blend import parse_blend


def check_data(config: RunConfig) -> None:
    """Check that the files that a run's flags name exist and can be read.

    Streamed sources are checked only if they are plain paths: patterns and data sets of
    Hugging Face are resolved by the run.

    Raises:
        ValueError: no data are named, or a file is corrupt.
        FileNotFoundError: one is missing.
    """
    data = read_data_args(config.data)
    if data.mock_data:
        return
    require(
        bool(data.data_path or data.train_data_path or data.streaming_data_path),
        "--data-path",
        "",
        "the data of the training: --data-path, --train-data-path, --streaming-data-path or "
        "--mock-data",
    )
    for prefix in _prefixes(data):
        _check_prefix(prefix)
    for _, source in parse_blend(data.streaming_data_path, "--streaming-data-path"):
        is_plain = not source.startswith("hf:") and not any(c in source for c in "*?[")
        if is_plain and not os.path.exists(source):
            raise FileNotFoundError(f"--streaming-data-path names {source}, which is missing")


def _prefixes(data: DataConfig) -> list[str]:
    """Return the prefixes of all token files of a run, without the weights."""
    flags = {
        "--data-path": data.data_path,
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    for name, words in data.named_valid_sets.items():
        flags[f"--valid-sets {name}="] = words
    prefixes = []
    for flag, words in flags.items():
        prefixes += [prefix for _, prefix in parse_blend(words, flag)]
    return prefixes


@cache
def _check_prefix(prefix: str) -> None:
    """Raise unless `<prefix>.idx` is valid and `<prefix>.bin` exists."""
    read_index(prefix)
    if not os.path.exists(f"{prefix}.bin"):
        raise FileNotFoundError(f"{prefix}.bin is missing; {prefix}.idx is there")
