"""FLOPs in the training rows of a run on two ranks."""

from __future__ import annotations

import pytest

from helpers import runs
from megatron.model.builder import build_run_config_model
from megatron.model.flops import ExpertUse, ModelFlops
from megatron.model.meta_device import meta_device
from megatron.pretrain import parse_flags


def test_training_rows_have_measured_flops(finished, data):
    """They follow the experts per token of each row, and the speed is that of one rank."""
    config = parse_flags(runs.flags(data, finished, 20, *runs.EP2))
    with meta_device():
        flops = ModelFlops.of(build_run_config_model(config, 257))
    rows = runs.metrics(finished)
    assert len(rows) == 20
    for row in rows:
        (layer,) = flops.moe_layers
        routed = row["experts_per_token_by_layer"][0]
        expected = sum(part.total for part in flops.fixed.values())
        expected += routed * layer.assignment.total
        assert row["flops_per_token"] == pytest.approx(expected, rel=1e-8)
        speed = expected * row["tokens_per_s"] / 2 / 1e12
        assert row["tflops_per_s"] == pytest.approx(speed, rel=1e-7)
        assert ExpertUse.of_metrics(row).routed == (routed,)
    assert len({row["flops_per_token"] for row in rows}) > 1, "the number of experts changes"
    assert not any("flops_per_token" in row for row in runs.metrics(finished, "eval"))
