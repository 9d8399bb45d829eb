"""Sizes of experts for equal parameters: against counting the models that they give."""

from __future__ import annotations

import pytest

from helpers import runs
from megatron.analysis.compare.cell_size import cell_size
from megatron.analysis.compare.matching import ExpertSizes, matched_sizes
from megatron.pretrain import parse_flags

REFERENCE = ExpertSizes(num_experts=16, width=128)


@pytest.mark.parametrize(
    ("mean", "num_experts", "width"),
    [(4, 16, 128), (8, 32, 64), (2, 8, 256), (1, 4, 512), (3.2, 13, 160), (5, 20, 102)],
)
def test_sizes_by_hand(mean, num_experts, width):
    """4 of 16 experts of width 128: 512 active and 2,048 hidden units in all."""
    assert matched_sizes(REFERENCE, 4, mean) == ExpertSizes(num_experts, width)


def test_width_is_a_multiple():
    found = matched_sizes(REFERENCE, 4, 3.7, multiple=8)
    assert found == ExpertSizes(num_experts=15, width=136)  # 512 / 3.7 = 138.4


@pytest.mark.parametrize("mean", [1.5, 2.9, 3.7, 4.4, 7.1])
def test_models_of_these_sizes_match(mean):
    """The parameters of real models, with the mean that the gate has: both within rounding."""

    def size(experts: ExpertSizes):
        flags = [*runs.SHAPE, "--mock-data", "--train-iters", "1", "--expert-interval", "2"]
        sizes = ["--num-experts", experts.num_experts, "--moe-ffn-hidden-size", experts.width]
        return cell_size(parse_flags([*flags, *map(str, sizes)]))

    found = matched_sizes(REFERENCE, 4, mean)
    ours = size(found)
    reference = size(REFERENCE)
    routers = 32 * abs(found.num_experts - REFERENCE.num_experts)
    # Half a hidden unit for each expert that is used, and half an expert, in one layer.
    assert abs(ours.active(mean) - reference.active(4)) <= 64 * mean / 2 + routers
    assert abs(ours.total - reference.total) <= 64 * found.width / 2 + routers


@pytest.mark.parametrize("mean", [0.0, -1.0, float("nan"), float("inf")])
def test_means_are_positive(mean):
    with pytest.raises(ValueError, match=r"^experts_per_token is .*; allowed: a positive"):
        matched_sizes(REFERENCE, 4, mean)
    with pytest.raises(ValueError, match=r"^reference_experts_per_token is"):
        matched_sizes(REFERENCE, mean, 4)


@pytest.mark.parametrize(
    ("reference", "mean", "multiple"),
    [(ExpertSizes(2, 4), 1000.0, 1), (REFERENCE, 4.0, 1024), (ExpertSizes(3, 10), 2.9, 16)],
)
def test_sizes_that_do_not_exist(reference, mean, multiple):
    """Narrower than one hidden unit, no such multiple, or fewer experts than a token uses."""
    with pytest.raises(ValueError, match="Choose a mean between those"):
        matched_sizes(reference, 2.9, mean, multiple)
