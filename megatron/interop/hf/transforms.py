"""How a block of a Hugging Face tensor holds a block of a tensor of ours.

A block is a tensor, or one expert of a tensor that stacks all experts. A transform is a view of
their block whose elements, in order, are those of our block: reading gathers the view, writing
assigns to it. It may also name the order of rows.

Shape suffixes: our block is [R, C] or [R]; theirs differs as the transform says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.schema import RunConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """One way in which a block of theirs holds a block of ours."""

    name: str
    their_shape: Callable[[Shape], Shape]
    """Shape of their block by that of ours"""
    view: Callable[[Tensor], Tensor]
    """View of their block with our elements in order"""
    offset: Callable[[Shape], int] | None = None
    """First element of ours in their flattened block if ours are consecutive there, by our
    shape; None: they are not"""
    row_order: Callable[[RunConfig], Tensor] | None = None
    """Index of the row of the view for each of our rows, int64 [R]; None: the same order"""

    def take(self, theirs: Tensor, shape: Shape, config: RunConfig) -> Tensor:
        """Return our block, of this shape, from a block of theirs."""
        ours = self.view(theirs)
        if self.row_order is not None:
            ours = ours[self.row_order(config)]
        return ours.reshape(shape)

    def put(self, theirs: Tensor, ours: Tensor, config: RunConfig) -> None:
        """Write our block to its place in a block of theirs."""
        view = self.view(theirs)
        if self.row_order is not None:
            reordered = torch.empty_like(ours)
            reordered[self.row_order(config)] = ours
            ours = reordered
        view.copy_(ours.view(view.shape))


def _same(shape: Shape) -> Shape:
    return shape


def _doubled(shape: Shape) -> Shape:
    return (2 * shape[0], *shape[1:])


def _swapped(shape: Shape) -> Shape:
    return shape[::-1]


def _first(shape: Shape) -> int:
    return 0


UNCHANGED = Transform("same", _same, lambda theirs: theirs, _first)
TRANSPOSED = Transform("transposed", _swapped, lambda theirs: theirs.t())
FIRST_HALF = Transform(
    "first half of the rows",
    _doubled,
    lambda theirs: theirs[: len(theirs) // 2],
    _first,
)
SECOND_HALF = Transform(
    "second half of the rows",
    _doubled,
    lambda theirs: theirs[len(theirs) // 2 :],
    math.prod,
)
EVEN_ROWS = Transform("even rows", _doubled, lambda theirs: theirs[0::2])
ODD_ROWS = Transform("odd rows", _doubled, lambda theirs: theirs[1::2])


ONE_ROW = Transform("one row", lambda shape: (1, *shape), lambda theirs: theirs[0], _first)


def transposed(rows: Transform) -> Transform:
    """Return the transform of a block that is transposed after `rows`, such as [C, 2R]."""
    return Transform(
        f"transposed, {rows.name}",
        lambda shape: _swapped(rows.their_shape(shape)),
        lambda theirs: rows.view(theirs.t()),
    )


def ordered_rows(name: str, row_order: Callable[[RunConfig], Tensor]) -> Transform:
    """Return the transform of a block whose rows are in another order.

    Args:
        name: The order, for tables.
        row_order: Index of their row for each of our rows.
    """
    return Transform(name, _same, lambda theirs: theirs, row_order=row_order)


def half_rotated_rows(
    num_heads: int, head_size: int, rope_start: int, rope_size: int
) -> Tensor:
    """Return for each of our rows the row of a projection with interleaved rotary pairs.

    Pairs of features that are rotated together are neighbours there; ours are half of the
    rotated features apart. Other features keep their place.

    Args:
        num_heads: Heads of the projection.
        head_size: Rows of a head.
        rope_start: First rotated row of a head.
        rope_size: Number of rotated rows of a head, even.
    """
    in_head = torch.arange(head_size)
    pairs = torch.arange(rope_start, rope_start + rope_size).view(-1, 2)
    in_head[rope_start : rope_start + rope_size] = pairs.t().flatten()
    heads = torch.arange(num_heads)[:, None] * head_size
    return (heads + in_head).flatten()
