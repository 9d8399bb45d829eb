"""The data of a routing page, as JSON values: what the page shows, and no more than it shows.

Arrays with a number for each assignment are little-endian and in base64, as a page of JSON
numbers would be several times as large.

Shape suffixes: T positions, S shown positions, A assignments of a layer at shown positions,
L MoE layers, W token classes.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.analysis.html_page import json_for_script
from megatron.analysis.routing_statistics import (
    ExpertProfile,
    bin_width,
    binned_load,
    co_activation,
    expert_profiles,
    experts_per_token,
    most_used,
    routed_experts_per_token,
    weight_entropy,
)
from megatron.analysis.token_classes import TOKEN_CLASSES, token_classes, visible_text
from megatron.config.fields import require
from megatron.moe.routing_trace import LayerTrace, RoutingTrace

MAX_BINS = 256
"""Columns of the heat map of loads"""
MAX_LISTED = 64
"""Experts of a layer whose tokens are listed"""
MAX_MATRIX = 32
"""Experts of a layer in the matrix of co-activation"""
MAX_TOP_TOKENS = 8
"""Tokens that are listed for an expert"""
TOKEN_BYTES = 1_900_000
"""Bytes of all shown tokens, with their assignments, which keep a page below 5 MB"""


@dataclass(frozen=True)
class PageOptions:
    """What a routing page shows.

    Raises:
        ValueError: the limit is not positive.
    """

    title: str
    max_tokens: int = 2000
    """tokens that are shown, at most"""
    notes: tuple[str, ...] = ()
    """sentences about how the trace was made"""

    def __post_init__(self):
        require(self.max_tokens > 0, "--page-tokens", self.max_tokens, "a positive integer")


def routing_page_data(trace: RoutingTrace, options: PageOptions) -> dict[str, Any]:
    """Return the data of a page.

    Args:
        trace: with the text of each position; one position or more.
    """
    count_T = experts_per_token(trace).sum(axis=1)
    routed_T = routed_experts_per_token(trace)
    entropy_T = weight_entropy(trace)
    keys = _token_keys(trace)
    starts = [start for start, _ in trace.document_ranges]
    class_T = np.array(token_classes(trace.texts, starts), np.int64)
    most = min(options.max_tokens, trace.num_positions)
    columns = {
        "texts": [visible_text(text) for text in trace.texts[:most]],
        "classes": class_T[:most].tolist(),
        "ids": None if trace.token_ids_T is None else trace.token_ids_T[:most].tolist(),
        "experts": count_T[:most].tolist(),
        "routed": _rounded(routed_T, most),
        "entropy": _rounded(entropy_T, most),
    }
    num_shown = shown_positions(trace, columns)
    shown = {name: values and values[:num_shown] for name, values in columns.items()}
    layers = [_layer_data(layer, num_shown, keys, class_T) for layer in trace.layers]
    return {
        "title": options.title,
        "notes": [*options.notes, *_notes(trace, num_shown)],
        "num_tokens": trace.num_positions,
        "classes": list(TOKEN_CLASSES),
        "tokens": {**shown, "documents": [start for start in starts if start < num_shown]},
        "vocabulary": _vocabulary(keys.texts, layers),
        "layers": layers,
        "class_means": _class_means(count_T, routed_T, entropy_T, class_T),
    }


def shown_positions(trace: RoutingTrace, columns: dict[str, list[Any] | None]) -> int:
    """Return how many positions are shown: as many as a page has space for, but at least one.

    Args:
        columns: what the page has of each position, in addition to its assignments.
    """
    rows = list(zip(*(values for values in columns.values() if values is not None)))
    # A row is a byte longer than its values in their columns.
    bytes_S = np.array([len(json_for_script(row).encode()) for row in rows], np.float64)
    for layer in trace.layers:
        width = _integer_dtype(layer.num_choices - 1).itemsize + 2
        assignments_S = layer.count_T[: len(rows)].numpy() * width + 2
        bytes_S += assignments_S * 4 / 3
    fitting = int(np.searchsorted(bytes_S.cumsum(), TOKEN_BYTES, side="right"))
    return max(1, fitting)


def _vocabulary(texts: list[str], layers: list[dict[str, Any]]) -> dict[int, str]:
    """Return the texts of the tokens that are listed for an expert, by their numbers."""
    listed = {key for layer in layers for use in layer["listed"] for key, *_ in use["tokens"]}
    return {key: texts[key] for key in sorted(listed)}


@dataclass(frozen=True)
class _TokenKeys:
    """Numbers of the different tokens of a trace."""

    key_T: np.ndarray
    texts: list[str]
    """what is shown for each key"""


def _token_keys(trace: RoutingTrace) -> _TokenKeys:
    """Number the tokens by their ids; without ids by their texts."""
    names = trace.texts
    if trace.token_ids_T is not None:
        names = trace.token_ids_T.tolist()
    numbers: dict[Any, int] = {}
    key_T = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    texts = [""] * len(numbers)
    for key, text in zip(key_T.tolist(), trace.texts, strict=True):
        texts[key] = texts[key] or text
    return _TokenKeys(key_T, [visible_text(text) for text in texts])


def _rounded(values_T: np.ndarray | None, num_shown: int) -> list[float] | None:
    if values_T is None:
        return None
    return np.round(values_T[:num_shown], 4).tolist()


def _notes(trace: RoutingTrace, num_shown: int) -> list[str]:
    notes = []
    if num_shown < trace.num_positions:
        notes.append(
            f"The first {num_shown} of {trace.num_positions} tokens are shown; the statistics "
            "are over all of them."
        )
    largest = max(layer.num_choices for layer in trace.layers)
    if largest > MAX_LISTED:
        notes.append(
            f"Of each layer, the {MAX_LISTED} most used experts are listed, and {MAX_MATRIX} "
            "are in the matrix of co-activation."
        )
    elif largest > MAX_MATRIX:
        notes.append(f"The matrix of co-activation has the {MAX_MATRIX} most used experts.")
    if largest > MAX_BINS:
        width = bin_width(largest, MAX_BINS)
        notes.append(f"A column of the heat map is the mean over up to {width} experts.")
    return notes


def _layer_data(
    layer: LayerTrace, num_shown: int, keys: _TokenKeys, class_T: np.ndarray
) -> dict[str, Any]:
    listed = most_used(layer, MAX_LISTED)
    uses = expert_profiles(
        layer, listed, keys.key_T, class_T, len(TOKEN_CLASSES), MAX_TOP_TOKENS
    )
    in_matrix = most_used(layer, MAX_MATRIX)
    counts = co_activation(layer, in_matrix)
    load_N = binned_load(layer, MAX_BINS)
    return {
        "gate": layer.gate,
        "num_experts": layer.num_experts,
        "num_zero_computation": layer.num_zero_computation,
        "assignments": _assignments(layer, num_shown),
        "load": [float(f"{load:.4g}") for load in load_N],
        "bin_width": bin_width(layer.num_choices, MAX_BINS),
        "listed": [_listed(use) for use in uses],
        "matrix": {
            "experts": in_matrix.tolist(),
            "counts": _encoded(counts.astype(np.uint32)),
        },
    }


def _listed(use: ExpertProfile) -> dict[str, Any]:
    return {
        "expert": use.choice,
        "count": use.count,
        "tokens": [[token.key, token.count, _short(token.lift)] for token in use.tokens],
        "classes": use.class_counts_W.tolist(),
        "class_lifts": [_short(lift) for lift in use.class_lifts_W],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _assignments(layer: LayerTrace, num_shown: int) -> dict[str, Any]:
    """Return the experts of the shown positions, and their weights as bfloat16."""
    end = int(layer.token_offsets_T1[num_shown])
    count_S = layer.count_T[:num_shown].numpy()
    expert_A = layer.expert_A[:end].numpy()
    expert_dtype = _integer_dtype(layer.num_choices - 1)
    count_dtype = _integer_dtype(int(count_S.max(initial=0)))
    weights = None
    if layer.weight_A is not None:
        weights = _encoded(_bfloat16(layer.weight_A[:end].float().numpy()))
    return {
        "counts": _encoded(count_S.astype(count_dtype)),
        "count_bytes": count_dtype.itemsize,
        "experts": _encoded(expert_A.astype(expert_dtype)),
        "expert_bytes": expert_dtype.itemsize,
        "weights": weights,
    }


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of fp32 numbers, rounded to nearest, as uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _integer_dtype(largest: int) -> np.dtype:
    """Return the narrowest unsigned dtype that holds a number."""
    return np.min_scalar_type(largest)


def _encoded(values: np.ndarray) -> str:
    little_endian = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


def _class_means(
    count_T: np.ndarray,
    routed_T: np.ndarray | None,
    entropy_T: np.ndarray | None,
    class_T: np.ndarray,
) -> dict[str, Any] | None:
    """Return the means over each token class of the first of these that varies; None: none does."""
    candidates = {
        "experts per token, summed over layers": count_T,
        "routed experts per token, summed over layers": routed_T,
        "entropy of a token's weights, nats": entropy_T,
    }
    for title, value_T in candidates.items():
        if value_T is not None and (value_T != value_T[0]).any():
            rows = []
            for number, name in enumerate(TOKEN_CLASSES):
                of_class = value_T[class_T == number]
                if len(of_class):
                    mean = float(of_class.mean())
                    rows.append({"name": name, "mean": mean, "tokens": len(of_class)})
            return {"title": title, "rows": rows}
    return None
