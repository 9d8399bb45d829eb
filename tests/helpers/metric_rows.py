"""Rows of metrics for tests of metric writers."""

from __future__ import annotations

import math

TRAIN = {
    "kind": "train",
    "iteration": 10,
    "loss": 5.125,
    "aux_loss": 0.01,
    "lr": 3e-4,
    "grad_norm": 1.5,
    "tokens_per_s": 16384.0,
    "consumed_samples": 80,
    "consumed_tokens": 81920,
    "experts_per_token_before_capacity": 3.25,
    "experts_per_token": 3.0,
    "load_imbalance_max_over_mean": 1.75,
    "dropped_assignment_fraction": 0.0125,
    "skipped_steps": 1,
    "elapsed_s": 65.4,
    "step_time_ms": 500.0,
    "experts_per_token_by_layer": [2.0, 4.0],
}
EVAL = {
    "kind": "eval",
    "iteration": 10,
    "loss": 4.0,
    "perplexity": math.exp(4),
    "elapsed_s": 3700.0,
}
