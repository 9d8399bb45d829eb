"""A checkpoint of an earlier version of this program resumes bit for bit.

`written_before/` holds a checkpoint after three of six iterations, on two ranks with sharded
experts, ZeRO 1, bf16 and a gate with state (deepseek_v3), and the metrics of iterations 4 to 6. The
training data are those of the `data` fixture.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from helpers import engines, runs
from megatron.checkpoint.directory import find_newest_valid, select_checkpoints
from megatron.checkpoint.manifest import find_problems
from megatron.training.metrics_file import read_metrics

WRITTEN_BEFORE = Path(__file__).parent / "written_before"
CHECKPOINTS = WRITTEN_BEFORE / "checkpoints"
EXPECTED = json.loads((WRITTEN_BEFORE / "expected.json").read_text())
# Wall-clock times differ from run to run.
TIMES = {"tokens_per_s", "step_time_ms", "elapsed_s"}
TOLERANCE = 1e-3
"""Relative difference of losses where the kernels of torch differ: bf16 has 8 bits"""


def same_kernels() -> bool:
    """Return whether torch computes with the kernels that wrote the expected values."""
    return (
        torch.__version__ == EXPECTED["torch"]
        and torch.backends.cpu.get_cpu_capability() == EXPECTED["cpu_capability"]
    )


def tensors_sha256(folder: Path) -> str:
    """Return a hash of all tensors of the newest checkpoint of a directory, with their names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(engines.full_tensors(folder).items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


@pytest.fixture(scope="module")
def resumed(data, ranks2, tmp_path_factory) -> Path:
    """Resume the old checkpoint with the flags of its own run.json. Returns the output."""
    out = tmp_path_factory.mktemp("resumed")
    argv = [
        *("--config", str(CHECKPOINTS / "iter_0000003/run.json")),
        *("--load", str(CHECKPOINTS)),
        *("--data-path", data),
        *("--save", str(out / "checkpoints")),
        *("--metrics-file", str(out / "metrics.jsonl")),
        "--grad-reduce-in-bf16",  # what that version did
    ]
    ranks2.run(runs.train, argv, timeout=300)
    return out


def test_old_checkpoint_is_valid():
    found = find_newest_valid(
        select_checkpoints(CHECKPOINTS),
        lambda entry: find_problems(entry.path, entry.manifest),
    )
    assert found.manifest["iteration"] == 3 and found.problems == []


def test_old_checkpoint_resumes_bit_for_bit(resumed):
    """All metrics but times are equal: loss, gradient norm, load of the experts, gate biases."""
    rows = read_metrics(resumed / "metrics.jsonl")
    expected = read_metrics(WRITTEN_BEFORE / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [4, 5, 6]
    for row, old in zip(rows, expected, strict=True):
        names = old.keys() - TIMES
        assert names <= row.keys()
        if same_kernels():
            assert {name: row[name] for name in names} == {name: old[name] for name in names}
        for name in ("loss", "grad_norm", "lr"):
            assert row[name] == pytest.approx(old[name], rel=TOLERANCE)


def test_resumed_run_saves_same_tensors(resumed):
    """Weights, moments, and buffers after iteration 6 are equal bit by bit."""
    assert engines.latest(resumed / "checkpoints") == "iter_0000006"
    if same_kernels():
        assert tensors_sha256(resumed / "checkpoints") == EXPECTED["tensors_sha256_after_6"]
