"""Pictures of a share per layer and expert, for TensorBoard and Weights & Biases.

Shape suffixes: L rows (layers), E columns (experts), H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron.training.metric_rows import multiples_of_mean

_CELL_HEIGHT = 16
_LARGEST_CELL_WIDTH = 16
_PICTURE_WIDTH = 1024
_LINE_HEIGHT = 2
_ABSENT = (128, 0, 0)
"""Colour of what a layer does not have, which the colours of values do not contain: dark red"""
_DOUBLINGS = 3.0
"""Shares from 1/8 to 8 times the mean are distinguished"""


def heat_map(shares: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Draw the shares that experts have in their layers: a row per layer, a column per expert.

    A colour stands for the same multiple of the layer's mean in all pictures, so that those of
    different iterations can be compared: black is 1/8 of the mean or less, the middle of the
    scale is the mean, white is 8 times the mean or more.

    Args:
        shares: L rows of at most E shares; None where a layer has none. Those of a row that
            `multiples_of_mean` leaves out are drawn like absent ones.
    Returns:
        RGB values of [H, W, 3], uint8.
    """
    width = max(1, *(len(row or ()) for row in shares))
    cell_width = min(_LARGEST_CELL_WIDTH, max(1, _PICTURE_WIDTH // width))
    pixels_LE3 = np.empty((len(shares), width, 3), dtype=np.uint8)
    pixels_LE3[:] = _ABSENT
    for i, multiples_E in multiples_of_mean(shares):
        for j, multiple in enumerate(multiples_E):
            pixels_LE3[i, j] = color_of(multiple)
    cells_HW3 = pixels_LE3.repeat(_CELL_HEIGHT, axis=0).repeat(cell_width, axis=1)
    picture_HW3 = cells_HW3.reshape(len(shares), _CELL_HEIGHT, -1, 3)
    # A line between layers.
    picture_HW3 = np.pad(picture_HW3, ((0, 0), (0, _LINE_HEIGHT), (0, 0), (0, 0)))
    return picture_HW3.reshape(-1, cells_HW3.shape[1], 3)[:-_LINE_HEIGHT]


def color_of(multiple: float) -> tuple[int, int, int]:
    """Return the RGB colour of a multiple of the mean."""
    if multiple <= 0:
        return cubehelix(0.0)
    doublings = math.log2(multiple)
    return cubehelix((doublings + _DOUBLINGS) / (2 * _DOUBLINGS))


def cubehelix(fraction: float) -> tuple[int, int, int]:
    """Return a colour whose perceived intensity grows evenly from black (0) to white (1).

    Source: Green 2011, "A colour scheme for the display of astronomical intensity images",
    equation 2, with start 0.5, rotations -0.75, hue 1 and gamma 1. Values outside of 0 to 1 have
    the colours of the ends.
    """
    fraction = min(1.0, max(0.0, fraction))
    angle = 2 * math.pi * (0.5 / 3 + 1 - 0.75 * fraction)
    amplitude = fraction * (1 - fraction) / 2
    cos = amplitude * math.cos(angle)
    sin = amplitude * math.sin(angle)
    red = fraction - 0.14861 * cos + 1.78277 * sin
    green = fraction - 0.29227 * cos - 0.90649 * sin
    blue = fraction + 1.97294 * cos
    return _to_byte(red), _to_byte(green), _to_byte(blue)


def _to_byte(value: float) -> int:
    return round(255 * min(1.0, max(0.0, value)))
