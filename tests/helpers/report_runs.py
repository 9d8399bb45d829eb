"""Write the files of runs, with every metric that a report shows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SEQUENCE = 4096
"""tokens per iteration"""


def train_row(iteration: int, rng: random.Random, **more: Any) -> dict[str, Any]:
    """Return a training row of a model with two MoE layers of 4 experts."""
    decay = math.exp(-iteration / 300)
    loads = []
    for _ in range(2):
        load_E = [1 + decay * rng.random() for _ in range(4)]
        loads.append([share / sum(load_E) for share in load_E])
    imbalance = max(4 * max(load_E) for load_E in loads)
    return {
        "kind": "train",
        "iteration": iteration,
        "loss": 4 + 5 * decay + 0.05 * rng.random(),
        "aux_loss": 0.01 * (1 + decay),
        "lr": 1e-3,
        "grad_norm": 1 + decay * rng.random(),
        "tokens_per_s": 2500 + 400 * rng.random(),
        "step_time_ms": 1500 + 100 * rng.random(),
        "skipped_steps": 0,
        "bad_steps": 0,
        "loss_spikes": 0,
        "consumed_tokens": iteration * SEQUENCE,
        "flops_per_token": 6e7,
        "experts_per_token": 2.5 - decay,
        "experts_per_token_by_layer": [2.4 - decay, 2.6 - decay],
        "experts_per_token_histogram": [0.0, 0.3, 0.4, 0.2, 0.1],
        "load_imbalance_max_over_mean": imbalance,
        "load_cv": 0.3 * decay,
        "max_violation": imbalance - 1,
        "dead_expert_fraction": 0.0,
        "load_entropy": math.log(4) - 0.1 * decay,
        "router_entropy": 1.2 - 0.3 * (1 - decay),
        "dropped_assignment_fraction": 0.0,
        "load_by_expert": loads,
        "gate_mass_by_expert": [load_E[::-1] for load_E in loads],
        **more,
    }


def eval_row(iteration: int, rng: random.Random, kind: str = "eval", **more: Any) -> dict:
    """Return the row of an evaluation."""
    return {
        "kind": kind,
        "iteration": iteration,
        "loss": 4.1 + 5 * math.exp(-iteration / 300) + 0.05 * rng.random(),
        "consumed_tokens": iteration * SEQUENCE,
        **more,
    }


def probe_row(iteration: int, **more: Any) -> dict:
    """Return a row of the routing probe; the first has nothing to compare with."""
    decay = math.exp(-iteration / 300)
    changes = {
        "routing_churn": 0.5 * decay,
        "router_saturation": 1 - 0.6 * decay,
        "router_drift": 0.1 * decay,
        "churn_steps": 50,
        "saturation_steps": 50,
    }
    return {
        "kind": "probe",
        "iteration": iteration,
        "consumed_tokens": iteration * SEQUENCE,
        **(changes if iteration else {}),
        "coactivation_mean": 0.3 - 0.1 * decay,
        "coactivation_max": 0.6 - 0.1 * decay,
        "expert_similarity_mean": 0.01 + 0.001 * (1 - decay),
        "expert_similarity_max": 0.05 + 0.001 * (1 - decay),
        "router_similarity_mean": 0.02 + 0.001 * (1 - decay),
        "router_similarity_max": 0.08 + 0.001 * (1 - decay),
        "probe_time_ms": 20.0,
        **more,
    }


def start_row(seed: int, gate: str = "topk", iteration: int = 0, **train: Any) -> dict:
    """Return the row of a start of a run."""
    return {
        "kind": "run",
        "iteration": iteration,
        "command": ["pretrain_gpt.py", "--gate", gate, "--seed", str(seed), "--data", "a b's"],
        "config": {
            "model": {"num_layers": 4},
            "moe": {"num_experts": 4, "gate": gate},
            "train": {"seed": seed, "train_iters": 0, "save": f"runs/{gate}{seed}", **train},
        },
        "world_size": 2,
        "device": "cpu",
        "version": "1.0",
        "total_parameters": 12_345_678,
        "active_parameters_min": 4_000_000,
        "active_parameters_max": 6_000_000,
        "started": "2026-01-02T03:04:05Z",
    }


def rows_of_run(
    seed: int, gate: str = "topk", iterations: int = 200, shift: float = 0.0
) -> list[dict[str, Any]]:
    """Return the rows of a run that logs every 10 iterations and evaluates every 50.

    Args:
        shift: added to all losses.
    """
    rng = random.Random(f"{gate} {seed}")
    rows = [start_row(seed, gate), eval_row(0, rng), probe_row(0)]
    for iteration in range(10, iterations + 1, 10):
        rows.append(train_row(iteration, rng))
        if iteration % 50 == 0:
            rows.append(eval_row(iteration, rng))
            rows.append(eval_row(iteration, rng, "eval/code"))
            rows.append(probe_row(iteration))
    rows.append(eval_row(iterations, rng, "test"))
    for row in rows:
        if "loss" in row:
            row["loss"] += shift
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the metrics file of a run, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder
