"""The value of --gate: one gate for all MoE layers, or a gate per layer.

    --gate topk
    --gate hash@0-2,deepseek_v3@3-
    --gate dense@0,topk@1+4-5,threshold@2-3

A list has entries NAME@LAYERS, separated by commas. LAYERS are transformer blocks counted from
0: a number, a range whose ends both belong to it, or a range without an end, which reaches the
last block. Several are joined by "+". The name `dense` makes blocks dense. Every block has
one entry; a gate may have several.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron.config.fields import require

DENSE = "dense"
"""Name of dense layers in a list; no gate can have it"""
GATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names that a gate can have: they are part of flags, --NAME.OPTION"""
_LAYERS = re.compile(r"([0-9]{1,9})(?:(-)([0-9]{1,9})?)?")
_GRAMMAR = "NAME, or a list of NAME@LAYERS such as hash@0-2,topk@3+5,dense@4,deepseek_v3@6-"


@dataclass(frozen=True)
class LayerRange:
    """Consecutive blocks of one gate."""

    gate: str
    """name of the gate, or `dense`"""
    first: int
    last: int | None
    """the last block; None: that of the model"""

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer and (self.last is None or layer <= self.last)

    def __str__(self) -> str:
        if self.last == self.first:
            return str(self.first)
        return f"{self.first}-{'' if self.last is None else self.last}"


@dataclass(frozen=True)
class GateLayers:
    """The gates of a model, as --gate names them."""

    text: str
    ranges: tuple[LayerRange, ...]
    """ranges in the order of the list; empty if one gate is in all MoE layers"""

    @property
    def is_per_layer(self) -> bool:
        """Whether the value is a list, which also says which layers are dense."""
        return bool(self.ranges)

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates, each once."""
        if not self.ranges:
            return (self.text,)
        names = dict.fromkeys(layers.gate for layers in self.ranges)
        return tuple(name for name in names if name != DENSE)

    @property
    def has_dense(self) -> bool:
        """Whether the list makes blocks dense."""
        return any(layers.gate == DENSE for layers in self.ranges)

    def gate_of(self, layer: int) -> str | None:
        """Return the gate of a block in a list; None if it is dense or not in the list."""
        for layers in self.ranges:
            if layer in layers and layers.gate != DENSE:
                return layers.gate
        return None

    def check(self, num_layers: int) -> None:
        """Check that the list has each block of a model.

        Raises:
            ValueError: a block is missing, or beyond the model.
        """
        allowed = f"each of the blocks 0 to {num_layers - 1} once"
        for layers in self.ranges:
            last = layers.first if layers.last is None else layers.last
            beyond = (
                f"Block {last} of {layers.gate}@{layers} is beyond --num-layers {num_layers}."
            )
            require(last < num_layers, "--gate", self.text, allowed, beyond)
        for layer in range(num_layers if self.ranges else 0):
            present = any(layer in layers for layers in self.ranges)
            missing = f"Block {layer} is missing; add it to a gate or to {DENSE}@{layer}."
            require(present, "--gate", self.text, allowed, missing)


@functools.cache
def parse_gate_layers(text: str) -> GateLayers:
    """Parse the value of --gate.

    Raises:
        ValueError: the text is malformed, a range is reversed, two ranges have a block in
            common, or all blocks are dense.
    """
    if not any(sign in text for sign in "@,+"):
        return GateLayers(text, ())
    ranges: list[LayerRange] = []
    for entry in text.split(","):
        ranges += _parse_entry(entry, text)
    _check_overlap(ranges, text)
    layers = GateLayers(text, tuple(ranges))
    advice = "Use --num-experts 0 for a dense model."
    require(layers.gates, "--gate", text, "at least one layer with a gate", advice)
    return layers


def with_known_names(text: str, known: Iterable[str]) -> str:
    """Return the value of --gate with the gates' own names, and without blanks.

    Hyphens and underscores are the same in names: deepseek-v3 is deepseek_v3.

    Args:
        known: names of gates.
    Raises:
        ValueError: as `parse_gate_layers`.
    """
    by_spelling = {name.replace("-", "_"): name for name in known}
    exact = set(known)

    def own_name(name: str) -> str:
        return name if name in exact else by_spelling.get(name.replace("-", "_"), name)

    layers = parse_gate_layers("".join(text.split()))
    if not layers.is_per_layer:
        return own_name(text)
    return ",".join(_format(own_name, list(layers.ranges)))


def per_layer_text(gates: Iterable[str | None]) -> str:
    """Return the list of a model's gates in its shortest form.

    Models with equal gates have equal texts, however their flags were written.

    Args:
        gates: the gate of each block; None: dense.
    """
    runs: list[LayerRange] = []
    for layer, gate in enumerate(gates):
        name = gate or DENSE
        if runs and runs[-1].gate == name:
            runs[-1] = LayerRange(name, runs[-1].first, layer)
        else:
            runs.append(LayerRange(name, layer, layer))
    return ",".join(f"{layers.gate}@{layers}" for layers in runs)


def _format(own_name: Callable[[str], str], ranges: list[LayerRange]) -> list[str]:
    """Return the entries of a list; neighbouring ranges of one gate are joined."""
    entries: list[str] = []
    previous = None
    for layers in ranges:
        name = own_name(layers.gate)
        if name == previous:
            entries[-1] += f"+{layers}"
        else:
            entries.append(f"{name}@{layers}")
        previous = name
    return entries


def _parse_entry(entry: str, text: str) -> list[LayerRange]:
    """Parse NAME@LAYERS."""
    name, at, places = entry.partition("@")
    advice = f"The entry {entry!r} has no layers."
    require(at and places, "--gate", text, _GRAMMAR, advice)
    advice = f"The entry {entry!r} has no valid name."
    require(GATE_NAME.fullmatch(name), "--gate", text, _GRAMMAR, advice)
    return [_parse_range(name, place, text) for place in places.split("+")]


def _parse_range(name: str, place: str, text: str) -> LayerRange:
    """Parse N, N-M or N-."""
    match = _LAYERS.fullmatch(place)
    advice = f"{place!r} of {name} is no number or range of layers, such as 3, 0-2 or 3-."
    require(match, "--gate", text, _GRAMMAR, advice)
    first = int(match[1])
    last = first
    if match[2]:
        last = int(match[3]) if match[3] else None
    advice = f"The range {place} of {name} ends before it begins."
    require(last is None or first <= last, "--gate", text, "ranges FIRST-LAST", advice)
    return LayerRange(name, first, last)


def _check_overlap(ranges: list[LayerRange], text: str) -> None:
    """Check that no block is in two ranges."""
    ordered = sorted(ranges, key=lambda layers: layers.first)
    for one, other in zip(ordered, ordered[1:], strict=False):
        advice = f"Block {other.first} is in {one.gate}@{one} and in {other.gate}@{other}."
        require(other.first not in one, "--gate", text, "every block once", advice)
