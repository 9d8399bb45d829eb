"""Normalisation layers against a loop."""

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.model.norm import build_norm


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_equals_a_loop(kind):
    norm = build_norm(ModelConfig(hidden_size=8, normalization=kind, norm_epsilon=0.1)).double()
    torch.manual_seed(0)
    for p in norm.parameters():
        p.data.normal_()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = norm(x)
    for b in range(3):
        for s in range(5):
            row = x[b, s] if kind == "RMSNorm" else x[b, s] - sum(x[b, s]) / 8
            expected = row / (sum(v * v for v in row) / 8 + 0.1) ** 0.5 * norm.weight
            if kind == "LayerNorm":
                expected = expected + norm.bias
            torch.testing.assert_close(y[b, s], expected)
