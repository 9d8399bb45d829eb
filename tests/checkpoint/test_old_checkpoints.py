"""A checkpoint of every format version can be read, and the oldest resumes bit for bit.

`versions/<format version>/` holds a checkpoint, and in expected.json what was true of it. That of
version 1 was saved after three of six iterations, on two ranks with sharded experts, ZeRO 1, bf16
and a gate with state (deepseek_v3), with the metrics of iterations 4 to 6. The training data are
those of the `data` fixture. That of version 2 is of `helpers.engines`, of 27 kB; later ones are
those of `helpers.stored_version`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import engines, runs
from megatron import log
from megatron.checkpoint import loader
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.format_version import FORMAT_VERSION
from megatron.model.builder import build_model
from megatron.parallel.groups import Groups
from megatron.training.metrics_file import read_metrics

VERSIONS = Path(__file__).parent / "versions"
WRITTEN_BEFORE = VERSIONS / "1"
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


def test_every_version_has_a_stored_checkpoint():
    names = sorted(path.name for path in VERSIONS.iterdir())
    assert names == [str(version) for version in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_checkpoint_of_every_version_is_read(version, capsys):
    """Its files are valid, and configuration, progress and tensors are what they were."""
    log.setup()
    folder = VERSIONS / str(version)
    expected = json.loads((folder / "expected.json").read_text())
    options = CheckpointConfig(load=str(folder / "checkpoints"))
    loaded = loader.find_checkpoint(options, Groups())
    assert capsys.readouterr().out == "", "it has no problems"
    written = json.loads((loaded.path / "manifest.json").read_text()).get("version", 1)
    assert written == version
    assert loaded.progress.iteration == expected["iteration"]
    assert engines.tensors_sha256(folder / "checkpoints") == expected["tensors_sha256"]
    config = loaded.metadata.config
    model = build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=loaded.metadata.identity["tokenizer_vocab_size"],
        seed=1,
        groups=Groups(),
    )
    loaded.load_weights(model, Groups())
    for name, tensor in model.state_dict().items():
        state_key = "buffer" if name in loaded.reader.buffers else "weight"
        stored = engines.full_tensors(folder / "checkpoints")[f"{state_key}/{name}"]
        assert torch.equal(tensor, stored), name


@pytest.mark.parametrize("version", range(2, FORMAT_VERSION + 1))
def test_checkpoint_of_newer_versions_resumes(version, ranks1):
    folder = VERSIONS / str(version)
    expected = json.loads((folder / "expected.json").read_text())
    options = CheckpointConfig(load=str(folder / "checkpoints"))
    config = loader.find_checkpoint(options, Groups()).metadata.config
    resumed = ranks1.run(engines.train, engines.loading(config, folder / "checkpoints"), 0, 2)
    assert resumed[0][1] == pytest.approx(expected["losses_after"], rel=TOLERANCE)


def test_old_checkpoint_resumes_bit_for_bit(resumed):
    """All metrics but times are equal: loss, gradient norm, load of the experts, gate biases."""
    rows = runs.metrics(resumed)
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
        assert (
            engines.tensors_sha256(resumed / "checkpoints")
            == EXPECTED["tensors_sha256_after_6"]
        )
