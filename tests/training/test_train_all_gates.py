"""Every gate trains a tiny model on two ranks that shard its experts, through the flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import runs
from megatron.moe.gate import available_gates

PEER = [
    "--peer-num-experts",
    "64",
    "--peer-num-heads",
    "4",
    "--peer-topk",
    "4",
    "--peer-query-size",
    "16",
]
# All layers are MoE layers, so that the width of dense layers in SHAPE would have no effect.
MOE = ["--num-experts", "4", "--moe-ffn-hidden-size", "32", "--ffn-hidden-size", "0"]


def _train(argv: list[str]) -> dict[str, int]:
    """Train in a rank; return how many of its experts never changed, by parameter.

    Without weight decay an expert stays as it is only if its gradients are 0 in every step.
    """
    from megatron.moe.layer_sums import find_moe_layers
    from megatron.training.trainer import Trainer

    original, unchanged = Trainer.run, {}

    def watched(self: Trainer) -> None:
        tables = {
            f"{i}.{name}": p
            for i, layer in enumerate(find_moe_layers(self.engine.model))
            for name, p in layer.named_parameters()
            if name.startswith("experts.w")
        }
        before = {name: p.detach().clone() for name, p in tables.items()}
        original(self)
        unchanged.update(
            {
                name: int((p.detach() == before[name]).flatten(1).all(1).sum())
                for name, p in tables.items()
            }
        )

    Trainer.run = watched
    try:
        runs.train(argv)
    finally:
        Trainer.run = original
    return unchanged


def flags(gate: str, data: str, out: Path, *more: str) -> list[str]:
    return [
        *runs.SHAPE,
        *(PEER if gate == "peer" else MOE),
        *runs.EP2,
        "--gate",
        gate,
        "--data-path",
        data,
        "--split",
        "80,15,5",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--lr",
        "8e-3",
        "--weight-decay",
        "0",
        "--eval-iters",
        "0",
        "--bf16",
        "--metrics-file",
        str(out / "metrics.jsonl"),
        *more,
    ]


@pytest.mark.parametrize("gate", available_gates())
def test_every_gate_trains(gate, data, tmp_path, ranks2):
    """The loss falls by two nats in 30 steps, and every expert receives gradients."""
    unchanged = ranks2.run(
        _train,
        flags(gate, data, tmp_path, "--train-iters", "30", "--log-interval", "5"),
        timeout=300,
    )
    lines = runs.metrics(tmp_path)
    assert lines[0]["loss"] - lines[-1]["loss"] > 2.0, (lines[0]["loss"], lines[-1]["loss"])
    assert all(
        line["skipped_steps"] == 0 and line["dropped_assignment_fraction"] == 0
        for line in lines
    )
    for rank, tables in enumerate(unchanged):
        assert len(tables) >= 2 and not any(tables.values()), f"rank {rank}: {tables}"


def test_expert_threshold_keeps_mean_experts(data, tmp_path, ranks2):
    """After its warm-up a token has k experts on average, within 5 %, while the router learns."""
    options = ["--topk", "1", "--threshold-warmup-steps", "10", "--log-interval", "10"]
    argv = flags("expert_threshold", data, tmp_path, "--train-iters", "60", *options)
    ranks2.run(runs.train, argv, timeout=300)
    lines = runs.metrics(tmp_path)
    means = [line["experts_per_token"] for line in lines]
    assert len(means) == 6 and means[0] == 1.0, "the warm-up has exactly k"
    assert sum(means[1:]) / 5 == pytest.approx(1.0, rel=0.05), means
    assert any(mean != 1.0 for mean in means[1:]), "the number of experts varies"
    assert lines[-1]["load_imbalance_max_over_mean"] < 1.3


@pytest.mark.parametrize("gate", ["deepseek_v3", "remoe", "peer", "threshold", "topk"])
def test_gate_state_survives_resume(gate, data, tmp_path, ranks2):
    """Three steps and three after a resume equal six: losses and metrics, to the last bit."""
    options = {
        "deepseek_v3": ["--bias-update-speed", "0.1"],
        "remoe": ["--lambda-init", "0.1"],
        "peer": [],
        "threshold": ["--threshold-target", "2", "--entropy-coeff", "1e-3"],
        "topk": ["--bias-rule", "quantile", "--bias-on", "logit", "--simbal-coeff", "1e-3"],
    }[gate]
    full, halves = tmp_path / "full", tmp_path / "halves"
    for folder in (full, halves):
        folder.mkdir()
    always = ["--train-iters", "6", "--log-interval", "1", *options]
    ranks2.run(runs.train, flags(gate, data, full, *always), timeout=300)
    save = ["--save", str(halves / "checkpoints")]
    ranks2.run(
        runs.train,
        flags(gate, data, halves, *always, *save, "--exit-interval", "3"),
        timeout=300,
    )
    ranks2.run(
        runs.train, flags(gate, data, halves, *always, *save, "--load", save[1]), timeout=300
    )
    timing = {"tokens_per_s", "tflops_per_s", "step_time_ms", "elapsed_s"}
    for a, b in zip(runs.metrics(full), runs.metrics(halves), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
