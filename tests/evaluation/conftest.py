"""A small checkpoint in fp32 whose experts two ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import runs


@pytest.fixture(scope="session")
def small_checkpoint(data, tmp_path_factory, ranks2) -> Path:
    """Train 10 iterations in fp32, where figures of one and two ranks differ by rounding only;
    returns the directory of checkpoints."""
    out = tmp_path_factory.mktemp("small_checkpoint")
    argv = [*runs.flags(data, out, 10, *runs.EP2), "--eval-iters", "0", "--split", "100,0,0"]
    argv = runs.with_gate(argv, "--gate", "topk", "--topk", "2")
    ranks2.run(runs.train, [flag for flag in argv if flag != "--bf16"], timeout=300)
    return out / "checkpoints"
