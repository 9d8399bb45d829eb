"""Rows of metrics, which the metric writers receive.

A row is a dict: `kind` (train, eval, eval/NAME for a named validation set, test), `iteration`,
and metrics with their units in their names, as scalars or, per layer, as lists:

    loss perplexity aux_loss lr grad_norm tokens_per_s global_batch_size
    consumed_samples consumed_tokens
    experts_per_token_before_capacity experts_per_token load_imbalance_max_over_mean
    dropped_assignment_fraction tokens_with_drops_fraction top1_probability
    skipped_steps bad_steps loss_spikes elapsed_s step_time_ms, and <name>_by_layer

The row of kind `run` describes the run instead, see `megatron.training.run_row`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MetricsRow = dict[str, Any]

RUN_KIND = "run"
"""`kind` of the row that describes a run instead of its metrics"""


def scalars(row: MetricsRow) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every metric, one per element of a list."""
    for name, value in row.items():
        tag = f"{row['kind']}/{name}"
        if isinstance(value, (list, tuple)):
            for i, element in enumerate(value):
                if element is not None:  # a layer without this metric
                    yield f"{tag}/{i}", element
        elif name not in ("kind", "iteration"):
            yield tag, value
