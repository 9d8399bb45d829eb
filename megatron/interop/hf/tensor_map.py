"""Which blocks of whose tensors belong together: the rules of a family for one model.

A tensor of ours consists of blocks, one per expert or just one; each is in one block of a tensor of
theirs. Nothing is read here: the map has names, shapes and transforms, and is made before anything
is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.config.fields import require, shortened
from megatron.interop.hf.family import Family, TensorLayout, TensorRule
from megatron.interop.hf.transforms import Shape, Transform


@dataclass(frozen=True)
class BlockLink:
    """A block of ours and the block of theirs that holds it."""

    ours: str
    """Name of our tensor"""
    index: int
    """Number of the block in our tensor"""
    shape: Shape
    """Shape of our block"""
    theirs: str
    """Name of their tensor"""
    slot: int
    """Number of the block in their tensor"""
    transform: Transform

    @property
    def numel(self) -> int:
        """Number of elements of our block."""
        return math.prod(self.shape)

    @property
    def their_block_shape(self) -> Shape:
        """Shape of their block."""
        return self.transform.their_shape(self.shape)


class TensorMap(NamedTuple):
    """All blocks of a model."""

    ours: dict[str, list[BlockLink]]
    """Blocks of each tensor of ours, in order"""
    theirs: dict[str, list[BlockLink]]
    """Links to blocks of each tensor of theirs"""
    shapes: dict[str, Shape]
    """Shapes of their tensors"""


def map_tensors(
    family: Family, layout: TensorLayout | None, shapes: Mapping[str, Shape]
) -> TensorMap:
    """Map a model's tensors by the rules of a family.

    Args:
        layout: Layout of the tensors that have several; None: the family has one layout.
        shapes: Full shapes of our parameters and buffers by name.

    Raises:
        ValueError: The family has no tensor for one of ours.
    """
    rules: dict[str, TensorRule] = {}
    for rule in (*family.tensors, *(layout.tensors if layout else ())):
        rules[rule.ours] = rule
    tensor_map = TensorMap({}, {}, {})
    for name, shape in shapes.items():
        layer, pattern = _split_layer(name)
        if pattern not in rules and family.default_rule is not None:
            rules[pattern] = family.default_rule(pattern)
        require(
            pattern in rules,
            "the model's tensor",
            name,
            f"those of the family {family.name}",
            "Use --family moe_megatron, which has all tensors.",
        )
        _add_links(tensor_map, rules[pattern], name, layer, shape)
    return tensor_map


def _split_layer(name: str) -> tuple[str, str]:
    """Return the index of the block in a name, and the name with {layer} in its place."""
    found = re.match(r"layers\.(\d+)\.", name)
    if found is None:
        return "", name
    layer = found.group(1)
    return layer, name.replace(f"layers.{layer}.", "layers.{layer}.", 1)


def _add_links(
    tensor_map: TensorMap, rule: TensorRule, name: str, layer: str, shape: Shape
) -> None:
    """Add the blocks of one tensor of ours to a map."""
    per_expert = "{expert}" in rule.theirs
    num_blocks = 1
    block_shape = shape
    if per_expert or rule.stacked:
        num_blocks = shape[0]
        block_shape = shape[1:]
    their_shape = rule.transform.their_shape(block_shape)
    if rule.stacked:
        their_shape = (num_blocks, *their_shape)
    links = []
    for index in range(num_blocks):
        theirs = rule.theirs.replace("{layer}", layer).replace("{expert}", str(index))
        slot = 0 if per_expert else index
        link = BlockLink(name, index, block_shape, theirs, slot, rule.transform)
        links.append(link)
        tensor_map.theirs.setdefault(theirs, []).append(link)
        known_shape = tensor_map.shapes.setdefault(theirs, their_shape)
        assert known_shape == their_shape, f"two rules give {theirs} different shapes"
    tensor_map.ours[name] = links


def find_layout(
    family: Family, shapes: Mapping[str, Shape], names: Collection[str]
) -> TensorLayout | None:
    """Find the layout of a source: the one of whose tensors it has most.

    Args:
        shapes: Full shapes of our tensors by name.
        names: Names of the tensors of the source.
    """
    best = None
    most = -1
    for layout in family.layouts:
        rules = {rule.ours: rule for rule in layout.tensors}
        count = 0
        for name in shapes:
            layer, pattern = _split_layer(name)
            if pattern in rules:
                theirs = rules[pattern].theirs
                theirs = theirs.replace("{layer}", layer).replace("{expert}", "0")
                count += theirs in names
        if count > most:
            best = layout
            most = count
    return best


class UnusedTensors(NamedTuple):
    """Tensors of a source that the model does not have."""

    kept: list[str]
    dropped: list[str]


def account_for_all(
    family: Family,
    config: Mapping[str, Any],
    tensor_map: TensorMap,
    found: Mapping[str, Shape],
    duplicates: Collection[str] = (),
) -> UnusedTensors:
    """Check that a source has exactly the tensors of a map, and those that the family leaves out.

    Args:
        config: Content of config.json with the family's defaults.
        found: Shapes of the source's tensors by name.
        duplicates: Names of further tensors that are copies of mapped ones.

    Raises:
        ValueError: A tensor is missing, unknown or has another shape. The message names it.
    """
    for name, shape in tensor_map.shapes.items():
        if name not in found:
            raise ValueError(
                f"the tensor {name} is missing; the model of config.json has it, of shape "
                f"{list(shape)}. Download the model's files again, or correct config.json"
            )
        require(
            found[name] == shape,
            f"the shape of the tensor {name}",
            list(found[name]),
            f"{list(shape)}, as config.json says",
        )
    unused = UnusedTensors([], [])
    for name in found:
        if name in tensor_map.shapes or name in duplicates:
            continue
        matching = [rule for rule in family.unmapped if rule.matches(name, config)]
        if not matching:
            raise ValueError(
                f"the tensor {shortened(name)} of the source is not known in the family "
                f"{family.name}: nothing of the model would use it. Remove it if it has no "
                "effect, or correct config.json"
            )
        (unused.kept if matching[0].kept else unused.dropped).append(name)
    return unused
