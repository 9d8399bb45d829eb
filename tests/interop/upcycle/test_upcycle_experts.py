"""Noise and neurons that are drawn again."""

from __future__ import annotations

import torch

from megatron.interop.upcycle.dense_ffn import DenseFFN
from megatron.interop.upcycle.experts import ExpertChange

HIDDEN = 64
WIDTH = 100


def make_expert() -> DenseFFN:
    generator = torch.Generator().manual_seed(2)
    first = 0.5 + 0.1 * torch.randn(WIDTH, HIDDEN, generator=generator)
    up = 0.3 * torch.randn(WIDTH, HIDDEN, generator=generator)
    down = -1 + 0.2 * torch.randn(HIDDEN, WIDTH, generator=generator)
    return DenseFFN(first, up, down)


def matrices(ffn: DenseFFN) -> list[torch.Tensor]:
    """Return the matrices with neurons as rows."""
    return [ffn.first_WD, ffn.up_WD, ffn.down_DW.T]


def test_no_change_is_an_exact_copy():
    expert = make_expert()
    for old, new in zip(
        matrices(expert), matrices(ExpertChange().apply(expert, "a")), strict=True
    ):
        assert torch.equal(old, new)


def test_scale_multiplies_the_down_projection():
    expert = make_expert()
    scaled = ExpertChange(scale=4.0).apply(expert, "a")
    assert torch.equal(scaled.down_DW, 4 * expert.down_DW)
    assert torch.equal(scaled.first_WD, expert.first_WD)


def test_noise_is_relative_to_each_matrix():
    expert = make_expert()
    changed = ExpertChange(noise_std=0.1).apply(expert, "a")
    for old, new in zip(matrices(expert), matrices(changed), strict=True):
        # 6,400 samples: the standard error of the deviation is 1 / sqrt(2 x 6400) of it.
        assert abs((new - old).std() / (0.1 * old.std()) - 1) < 5 / (2 * 6400) ** 0.5


def test_drop_changes_the_same_neurons_everywhere():
    expert = make_expert()
    changed = ExpertChange(drop_ratio=0.305).apply(expert, "a")
    changed_rows = []
    for old, new in zip(matrices(expert), matrices(changed), strict=True):
        changed_rows.append((old != new).any(1).nonzero().flatten().tolist())
    assert changed_rows[0] == changed_rows[1] == changed_rows[2]
    assert len(changed_rows[0]) == 30


def test_drop_keeps_mean_and_deviation():
    """Of the neurons that are replaced, in each matrix: here they differ from the others."""
    expert = make_expert()
    changed = ExpertChange(drop_ratio=0.5).apply(expert, "a")
    rows = (expert.first_WD != changed.first_WD).any(1)
    for old, new in zip(matrices(expert), matrices(changed), strict=True):
        error = old[rows].std() / (50 * HIDDEN) ** 0.5
        assert abs(new[rows].mean() - old[rows].mean()) < 5 * error
        assert abs(new[rows].std() / old[rows].std() - 1) < 5 / (2 * 50 * HIDDEN) ** 0.5


def test_experts_change_differently_and_repeatably():
    expert = make_expert()
    change = ExpertChange(noise_std=0.1, drop_ratio=0.2)
    first = change.apply(expert, "0.0.0")
    assert torch.equal(first.down_DW, change.apply(expert, "0.0.0").down_DW)
    assert not torch.equal(first.down_DW, change.apply(expert, "0.0.1").down_DW)


def test_drop_of_layer_without_gate_works():
    expert = make_expert()
    changed = ExpertChange(drop_ratio=1.0).apply(
        DenseFFN(expert.first_WD, None, expert.down_DW), "a"
    )
    assert changed.up_WD is None
    assert not (changed.first_WD == expert.first_WD).any()
