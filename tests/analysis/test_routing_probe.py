"""The probe of routing during training: its rows against the recorded assignments and weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers import engines, runs
from megatron.config.schema import LoggingConfig

LAYER = "layers.1.ffn"
"""the MoE layer of the tiny runs"""


def flags(data: str, out: Path, gate: list[str], *more: str) -> list[str]:
    """4 steps with a checkpoint and a probe every 2, in fp32, with dropout."""
    argv = runs.flags(data, out, 4, "--eval-interval", "2", "--save-interval", "2", *more)
    return [flag for flag in runs.with_gate(argv, *gate) if flag != "--bf16"]


def train_with_raw_assignments(argv: list[str]) -> list[list[set[int]]]:
    """Train in a rank; return each token's set of choices, for each snapshot of the probe."""
    from unittest import mock

    from megatron.analysis import routing_probe

    snapshots = []
    original = routing_probe.TokenChoices.of

    def of(record):
        token_A, expert_A, _ = record.assignments()
        sets = [set() for _ in range(record.num_positions)]
        for token, expert in zip(token_A.tolist(), expert_A.tolist(), strict=True):
            sets[token].add(expert)
        snapshots.append(sets)
        return original(record)

    with mock.patch.object(routing_probe.TokenChoices, "of", of):
        runs.train(argv)
    return snapshots


def expected_coactivation(sets: list[set[int]], num_experts: int = 4) -> list[list[float]]:
    counts = [
        [sum(i in s and j in s for s in sets) for j in range(num_experts)]
        for i in range(num_experts)
    ]
    return [[count / max(1, row[i]) for count in row] for i, row in enumerate(counts)]


def cosines(rows: torch.Tensor) -> list[float]:
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    return [float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i, j in pairs]


def weights_of(folder: Path, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' weights [E, P] and those of the router of a checkpoint."""
    from megatron.checkpoint.shards import CheckpointReader

    reader = CheckpointReader(folder / "checkpoints" / f"iter_{iteration:07d}")
    experts = []
    routers = []
    for name, shape in sorted(reader.shapes.items()):
        tensor = reader.read("weight", name).view(shape).double()
        if ".experts." in name:
            experts.append(tensor.flatten(1))
        elif ".gate." in name:
            routers.append(tensor)
    (router,) = routers
    return torch.cat(experts, dim=1), router


@pytest.mark.parametrize(
    "stage, more", [("1", ["--recompute-activations"]), ("3", [])], ids=["zero1", "zero3"]
)
def test_rows_equal_naive_computation_on_two_ranks(data, ranks2, tmp_path, stage, more):
    """Sets of both ranks together; experts are sharded over the ranks."""
    argv = flags(
        data,
        tmp_path,
        ["--gate", "threshold", "--threshold", "0.8"],
        *runs.EP2,
        "--zero-stage",
        stage,
        *more,
    )
    by_rank = ranks2.run(train_with_raw_assignments, argv)
    # Snapshots: the start, which is the first row, and those of steps 2 and 4.
    snapshots = [first + second for first, second in zip(*by_rank, strict=True)]
    rows = runs.metrics(tmp_path, "probe")
    assert [row["iteration"] for row in rows] == [0, 2, 4] and len(snapshots) == 3
    assert len(snapshots[0]) == 16 * 32  # samples of 32 tokens
    assert "routing_churn" not in rows[0] and "router_drift" not in rows[0]
    for number, (row, sets) in enumerate(zip(rows, snapshots, strict=True)):
        (matrix,) = row["coactivation"]
        for found, expected in zip(matrix, expected_coactivation(sets), strict=True):
            assert found == pytest.approx(expected, abs=5e-5)  # 4 significant digits
        if number == 0:
            continue
        before = snapshots[number - 1]
        pairs = list(zip(before, sets, strict=True))
        churn = sum(1 - len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
        assert 0 < row["routing_churn"] == pytest.approx(churn, rel=1e-6)
        # The last checkpoint is that of the previous probe here, or the initial weights.
        saturation = sum(len(a & b) / len(a) for a, b in pairs) / len(pairs)
        assert row["router_saturation"] == pytest.approx(saturation, rel=1e-6)
        assert row["churn_steps"] == row["saturation_steps"] == 2
        experts, router = weights_of(tmp_path, row["iteration"])
        similarity = cosines(experts)
        mean = sum(similarity) / len(similarity)
        assert row["expert_similarity_mean"] == pytest.approx(mean, abs=1e-6)
        assert row["expert_similarity_max"] == pytest.approx(max(similarity), abs=1e-6)
        similarity = cosines(router)
        mean = sum(similarity) / len(similarity)
        assert row["router_similarity_mean"] == pytest.approx(mean, abs=1e-6)
        assert row["router_similarity_max_by_layer"] == [
            pytest.approx(max(similarity), abs=1e-6)
        ]
    _, before = weights_of(tmp_path, 2)
    drift = float((router - before).norm() / before.norm())
    assert 0 < rows[2]["router_drift"] == pytest.approx(drift, rel=1e-5)


@pytest.mark.parametrize(
    "gate",
    [
        ["--gate", "deepseek_v3", "--topk", "2"],
        ["--gate", "expert_choice", "--topk", "2", "--hidden-dropout", "0.1"],
    ],
    ids=["deepseek_v3", "expert_choice"],
)
def test_probe_changes_no_training(data, ranks1, tmp_path, gate):
    """Weights, moments, gate state and the log are those of a run without a probe."""
    with_probe, without = tmp_path / "with", tmp_path / "without"
    ranks1.run(runs.train, flags(data, with_probe, gate))
    ranks1.run(runs.train, flags(data, without, gate, "--routing-probe-samples", "0"))
    assert len(runs.metrics(with_probe, "probe")) == 3 and not runs.metrics(without, "probe")
    sums = [engines.tensors_sha256(out / "checkpoints") for out in (with_probe, without)]
    assert sums[0] == sums[1]
    names = ("loss", "experts_per_token", "load_imbalance_max_over_mean")
    for kind in ("train", "eval"):
        found, expected = (
            [[row.get(name) for name in names] for row in runs.metrics(out, kind)]
            for out in (with_probe, without)
        )
        assert found == expected


def test_resumed_run_continues_its_rows(data, ranks1, tmp_path):
    """The weights of the checkpoint are the reference; the interval is the probe's own."""
    more = ["--routing-probe-interval", "1", "--routing-probe-samples", "3"]
    gate = ["--gate", "topk", "--topk", "2"]
    full, parts = tmp_path / "full", tmp_path / "parts"
    ranks1.run(runs.train, flags(data, full, gate, *more))
    ranks1.run(runs.train, flags(data, parts, gate, *more, "--exit-interval", "2"))
    load = ["--load", str(parts / "checkpoints")]
    ranks1.run(runs.train, flags(data, parts, gate, *more, *load))
    rows, expected = runs.metrics(parts, "probe"), runs.metrics(full, "probe")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["saturation_steps"] for row in expected[1:]] == [1, 2, 1, 2]
    for found, row in zip(rows, expected, strict=True):
        del found["probe_time_ms"], row["probe_time_ms"]
        assert found == row
    sums = [engines.tensors_sha256(out / "checkpoints") for out in (full, parts)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    "gate",
    [
        ["--gate", "peer", "--num-experts", "16", "--peer-num-heads", "2", "--peer-topk", "2"],
        ["--gate", "hash"],
        ["--gate", "moepp", "--topk", "2"],
    ],
    ids=["peer", "hash", "moepp"],
)
def test_gates_without_a_value_have_no_metric(data, ranks2, tmp_path, gate):
    """PEER has too many pairs of experts, and hash no router; no value is made up."""
    argv = flags(data, tmp_path, gate, *runs.EP2, "--train-iters", "2")
    ranks2.run(runs.train, argv)
    first, last = runs.metrics(tmp_path, "probe")
    name = gate[1]
    assert ("expert_similarity_mean" in last) == (name != "peer")
    assert ("router_similarity_mean" in last) == (name == "moepp")
    assert ("router_drift" in last) == (name != "hash")
    assert last["router_saturation"] == 1 - last["routing_churn"] == 1 or name != "hash"
    numbers = [value for value in last.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))


def test_run_without_validation_has_no_probe(data, ranks1, tmp_path):
    argv = flags(data, tmp_path, ["--gate", "topk"], "--split", "100,0,0", "--train-iters", "1")
    ranks1.run(runs.train, argv)
    assert runs.metrics(tmp_path) and not runs.metrics(tmp_path, "probe")


@pytest.mark.parametrize("name", ["routing_probe_samples", "routing_probe_interval"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(
        ValueError, match=f"--{name.replace('_', '-')} is -1; allowed: 0 or more"
    ):
        LoggingConfig(**{name: -1})
