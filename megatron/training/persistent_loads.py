"""Names the experts that stay dead or hot over several log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PERSISTENT_LINES = 5
"""Consecutive log lines after which an expert's load counts as persistent"""
HOT_FACTOR = 3.0
"""Load of a hot expert, in mean loads of the layer's routed experts, that it exceeds"""
_MOST_NAMED = 20
"""Experts that one message lists"""


class PersistentLoads:
    """Follows each expert's load over log lines, and reports when a state begins and ends.

    An expert is dead on a line if no token was assigned to it since the line before, and hot
    if it had more than HOT_FACTOR times the mean load of its layer. A line without any
    assignment in a layer changes nothing for that layer.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int, int], int] = {}
        """by state, layer and expert: consecutive lines so far"""

    def update(self, row: Mapping[str, Any]) -> list[str]:
        """Return messages about states that begin or end with a row of the training.

        Args:
            row: with `load_by_expert`, or without it in a run without routing metrics.
        """
        messages = []
        for layer, shares in enumerate(row.get("load_by_expert", ())):
            if shares is None or not any(shares):
                continue
            hot = HOT_FACTOR * sum(shares) / len(shares)
            dead = [share == 0 for share in shares]
            begins, ends = self._update(("dead", layer), dead)
            messages += _message(
                layer, begins, f"had no token for {PERSISTENT_LINES} log lines"
            )
            messages += _message(layer, ends, "had tokens again")
            begins, ends = self._update(("hot", layer), [share > hot for share in shares])
            many = f"more than {HOT_FACTOR:g} times the mean load"
            messages += _message(layer, begins, f"had {many} for {PERSISTENT_LINES} log lines")
            messages += _message(layer, ends, f"no longer had {many}")
        return messages

    def _update(
        self, state: tuple[str, int], holds: Sequence[bool]
    ) -> tuple[list[int], list[int]]:
        """Count a line of one state in one layer; return the experts in which the state
        becomes persistent, and those in which a persistent one ends."""
        begins = []
        ends = []
        for expert, is_in_state in enumerate(holds):
            key = (*state, expert)
            lines = self._lines.pop(key, 0)
            if is_in_state:
                self._lines[key] = lines + 1
                if lines + 1 == PERSISTENT_LINES:
                    begins.append(expert)
            elif lines >= PERSISTENT_LINES:
                ends.append(expert)
        return begins, ends


def _message(layer: int, experts: list[int], text: str) -> list[str]:
    """Return one message about experts of a layer, or none if there are none."""
    if not experts:
        return []
    return [f"layer {layer}: {_names(experts)} {text}"]


def _names(experts: list[int]) -> str:
    """Return "experts 3 7 9", shortened."""
    names = " ".join(map(str, experts[:_MOST_NAMED]))
    more = ""
    if len(experts) > _MOST_NAMED:
        more = f" and {len(experts) - _MOST_NAMED} others"
    return f"{'expert' if len(experts) == 1 else 'experts'} {names}{more}"
