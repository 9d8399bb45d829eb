"""Rotary positions against complex multiplication, and the precision of their table."""

import cmath

import pytest
import torch

from megatron.config.schema import ModelConfig, RotaryConfig
from megatron.model.rotary import Rotary, build_rotary


def turned(x_K: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """Rotate channels i and i + K/2, as one complex number, by position * base^(-2i/K)."""
    half = len(x_K) // 2
    out = torch.empty_like(x_K)
    for i in range(half):
        z = complex(x_K[i], x_K[i + half]) * cmath.exp(
            1j * position * base ** (-2 * i / len(x_K))
        )
        out[i], out[i + half] = z.real, z.imag
    return out


@pytest.mark.parametrize("given", [False, True])
def test_rotation_equals_complex_multiplication(given):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    position_ids = torch.randint(0, 16, (2, 7)) if given else None
    y = Rotary(6, 16, 100.0)(7, position_ids).apply(x)
    assert y.dtype == torch.float64
    for b in range(2):
        for h in range(3):
            for s in range(7):
                position = int(position_ids[b, s]) if given else s
                torch.testing.assert_close(
                    y[b, h, s], turned(x[b, h, s], position, 100.0), rtol=0, atol=5e-6
                )


def test_scores_depend_on_distance_only():
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8)
    rotary = Rotary(8, 64)

    def score(p, r):
        return (
            rotary(1, torch.tensor([[p]])).apply(q) * rotary(1, torch.tensor([[r]])).apply(k)
        ).sum()

    torch.testing.assert_close(score(5, 2), score(60, 57), rtol=1e-4, atol=1e-5)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_table_stays_fp32_after_casts():
    expected = Rotary(8, 32, 1000.0)
    for cast in (lambda r: r.bfloat16(), lambda r: r.half(), lambda r: r.double()):
        rotary = cast(Rotary(8, 32, 1000.0))
        assert rotary.cos_PR.dtype == rotary.sin_PR.dtype == torch.float32
        assert torch.equal(rotary.cos_PR, expected.cos_PR) and torch.equal(
            rotary.sin_PR, expected.sin_PR
        )
    with torch.device("meta"):
        rotary = Rotary(8, 32, 1000.0)
    assert rotary.cos_PR.is_meta
    rotary.to_empty(device="cpu")
    assert torch.equal(rotary.cos_PR, expected.cos_PR)
    assert not rotary.state_dict(), "the table should not be saved"


def test_bf16_is_rotated_in_fp32():
    torch.manual_seed(2)
    x = torch.randn(1, 2, 9, 8).bfloat16()
    rotation = Rotary(8, 9)(9)
    assert torch.equal(rotation.apply(x), rotation.apply(x.float()).bfloat16())


def test_share_of_a_head_is_rotated():
    x = torch.randn(1, 2, 9, 8)
    config = ModelConfig(kv_channels=8, seq_length=9, rotary_base=100.0)
    y = build_rotary(config, RotaryConfig(rotary_percent=0.5))(9).apply(x)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], Rotary(4, 9, 100.0)(9).apply(x[..., :4]))
