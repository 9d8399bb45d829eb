"""Pictures of a share per layer and expert: which colour a share has, and where."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.training.heat_map import color_of, cubehelix, heat_map

DARK_RED = (128, 0, 0)


def test_intensity_of_colors_grows_evenly():
    """The source's equation keeps the weighted sum of the channels equal to the fraction."""
    for fraction in np.linspace(0, 1, 25):
        red, green, blue = cubehelix(fraction)
        intensity = (0.30 * red + 0.59 * green + 0.11 * blue) / 255
        # Half a level of rounding in each channel, and constants of two digits.
        assert intensity == pytest.approx(fraction, abs=0.5 / 255 + 0.002)


def test_scale_is_logarithmic_around_the_mean():
    assert color_of(1.0) == cubehelix(0.5)
    assert color_of(2.0) == cubehelix(0.5 + 1 / 6)
    assert color_of(0.5) == cubehelix(0.5 - 1 / 6)
    assert color_of(0.0) == color_of(1 / 8) == color_of(1e-9) == (0, 0, 0)
    assert color_of(8.0) == color_of(100.0) == (255, 255, 255)


def test_each_cell_has_its_color():
    """Layers with 2 and 4 experts, and one without the metric.

    A quarter of the assignments of the first layer are to experts that compute nothing.
    """
    shares = [[0.375, 0.375], None, [0.0, 1.0, 0.0, 0.0]]
    picture_HW3 = heat_map(shares)
    assert picture_HW3.dtype == np.uint8
    assert picture_HW3.shape == (3 * 16 + 2 * 2, 4 * 16, 3)
    even = color_of(1.0)
    expected = [
        [even, even, DARK_RED, DARK_RED],
        [DARK_RED] * 4,
        [color_of(0.0), color_of(4.0), color_of(0.0), color_of(0.0)],
    ]
    for i, row in enumerate(expected):
        for j, color in enumerate(row):
            cell_HW3 = picture_HW3[i * 18 : i * 18 + 16, j * 16 : (j + 1) * 16]
            assert (cell_HW3 == color).all(), (i, j)
    assert not picture_HW3[16:18].any() and not picture_HW3[34:36].any(), "lines are black"


@pytest.mark.parametrize("experts, width", [(1, 16), (64, 1024), (300, 900), (1024, 1024)])
def test_picture_fits_a_screen(experts, width):
    shares = [[1 / experts] * experts]
    assert heat_map(shares).shape == (16, width, 3)


@pytest.mark.parametrize("row", [None, [], [0.0, 0.0], [0.5, math.nan], [math.inf, 1.0]])
def test_rows_without_shares_are_dark_red(row):
    assert (heat_map([row]) == DARK_RED).all()
