"""Tests of benchmarks/gate_cost.py: its arithmetic, and the sizes that it compares."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gate_cost


def test_constant_compute_is_not_proportional():
    """Neither constant compute nor compute that grows faster than demand holds.

    Published code computes the same rows whatever the tokens choose.
    """
    experts = [2.0, 4.0, 8.0, 12.0]
    for times, holds in (
        ([10.0] * 4, [False, False, True, False]),
        ([2.0, 4.0, 8.0, 12.0], [True] * 4),
        ([2.3, 4.2, 8.0, 11.9], [True] * 4),
        ([k * k for k in experts], [False, False, False, True]),
    ):
        rows = gate_cost.against_line(
            experts, {f"{k}": [t, 2 * t, t] for k, t in zip(experts, times, strict=True)}
        )
        assert [row.holds for row in rows] == holds, times
        assert all(row.ratio >= 1 and row.low == row.high for row in rows)


def test_gate_cost_compares_equal_widths():
    """Gates with one expert per token have as many active hidden units as the others."""
    x, ids = gate_cost.make_inputs()
    for name in ("topk", *gate_cost.SINGLE):
        layer = gate_cost.make_layer(name)
        num_experts, width, _ = layer.experts.w1.shape
        routed, _ = gate_cost.experts_per_token(layer, x, ids)
        assert routed * width == gate_cost.TOPK * gate_cost.WIDTH
        assert num_experts * width == gate_cost.EXPERTS * gate_cost.WIDTH
