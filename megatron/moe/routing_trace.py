"""The experts of every position of some texts, in all MoE layers: a routing trace.

Files of traces are in `megatron.moe.routing_trace_file`. A trace keeps the assignments before
capacity.

Shape suffixes: T positions, T1 = T + 1, A assignments of one layer, C choices (routed experts,
then zero-computation experts), L MoE layers, K experts per position where all have as many,
N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.routing_record import RoutingRecord


@dataclass(frozen=True)
class LayerTrace:
    """The assignments of one MoE layer, sorted by position."""

    gate: str
    """name of the gate"""
    num_experts: int
    """routed experts; of PEER its tiny experts"""
    num_zero_computation: int
    """zero-computation experts, which are numbered after the routed experts"""
    token_offsets_T1: Tensor
    """int64; position t has the assignments [token_offsets_T1[t], token_offsets_T1[t + 1])"""
    expert_A: Tensor
    """int64 choices, in the order in which the gate lists them for a position"""
    weight_A: Tensor | None = None
    """fp32; None: the weights were not recorded"""

    @property
    def num_choices(self) -> int:
        """Routed and zero-computation experts, C."""
        return self.num_experts + self.num_zero_computation

    @property
    def count_T(self) -> Tensor:
        """Assignments of each position, int64."""
        return self.token_offsets_T1.diff()

    @property
    def token_A(self) -> Tensor:
        """Position of each assignment, int64, in ascending order."""
        return torch.arange(len(self.count_T)).repeat_interleave(self.count_T)

    @property
    def constant_k(self) -> int | None:
        """Number of experts of every position; None if they differ or there is no position."""
        count_T = self.count_T
        if not len(count_T) or bool((count_T != count_T[0]).any()):
            return None
        return int(count_T[0])

    def check(self, what: str, num_positions: int) -> None:
        """Check shapes and ranges.

        Args:
            what: the layer and where it comes from, for messages.

        Raises:
            ValueError: a value is not allowed.
        """
        require(self.num_experts > 0, f"num_experts of {what}", self.num_experts, "1 or more")
        zero = self.num_zero_computation
        require(zero >= 0, f"num_zero_computation of {what}", zero, "0 or more")
        offsets_T1 = self.token_offsets_T1
        num_assignments = len(self.expert_A)
        is_valid = offsets_T1.shape == (num_positions + 1,)
        is_valid = is_valid and int(offsets_T1[0]) == 0 and bool((offsets_T1.diff() >= 0).all())
        require(
            is_valid and int(offsets_T1[-1]) == num_assignments,
            f"the offsets of {what}",
            f"{list(offsets_T1.shape)} numbers",
            f"{num_positions + 1} ascending numbers from 0 to the number of assignments, "
            f"{num_assignments}",
        )
        _check_range(f"the experts of {what}", self.expert_A, self.num_choices)
        if self.weight_A is not None:
            require(
                self.weight_A.shape == self.expert_A.shape,
                f"the number of weights of {what}",
                self.weight_A.numel(),
                f"one for each of its {num_assignments} assignments",
            )
            require(
                bool(self.weight_A.isfinite().all()),
                f"a weight of {what}",
                "not finite",
                "finite numbers",
            )


@dataclass(frozen=True)
class RoutingTrace:
    """The assignments of all MoE layers at the positions of some documents.

    Raises:
        ValueError: shapes do not fit or values are out of their range.
    """

    layers: tuple[LayerTrace, ...]
    model: str = ""
    """identity of the weights, see `megatron.interop.model_identity`; empty: not known"""
    token_ids_T: Tensor | None = None
    """int64 input token of each position"""
    document_starts_N: Tensor | None = None
    """int64, ascending: first position of each document; None: one document"""
    texts: tuple[str, ...] | None = None
    """the text that each position's token adds to its document, empty for a token without text
    and for the first bytes of a character; None: not recorded"""

    def __post_init__(self):
        self.check("a routing trace")

    def check(self, what: str) -> None:
        """Check all parts.

        Args:
            what: where the trace comes from, for messages.

        Raises:
            ValueError: a value is not allowed.
        """
        require(bool(self.layers), f"the number of MoE layers of {what}", 0, "1 or more")
        num_positions = self.num_positions
        for number, layer in enumerate(self.layers):
            layer.check(f"MoE layer {number} of {what}", num_positions)
        ids_T = self.token_ids_T
        if ids_T is not None:
            _check_length(f"the number of token ids of {what}", len(ids_T), num_positions)
            _check_range(f"the token ids of {what}", ids_T, 2**31)
        if self.texts is not None:
            _check_length(f"the number of texts of {what}", len(self.texts), num_positions)
        starts_N = self.document_starts_N
        if starts_N is not None:
            _check_range(f"the starts of documents of {what}", starts_N, max(1, num_positions))
            require(
                len(starts_N) > 0
                and int(starts_N[0]) == 0
                and bool((starts_N.diff() > 0).all()),
                f"the starts of documents of {what}",
                starts_N.tolist(),
                "ascending positions, the first of them 0",
            )

    @property
    def num_positions(self) -> int:
        """Number of positions, T."""
        return len(self.layers[0].token_offsets_T1) - 1

    @property
    def has_weights(self) -> bool:
        """Whether the weights of all layers were recorded."""
        return all(layer.weight_A is not None for layer in self.layers)

    @property
    def constant_k(self) -> int | None:
        """K, if every position has as many experts in every layer; else None."""
        ks = {layer.constant_k for layer in self.layers}
        if len(ks) > 1:
            return None
        return ks.pop()

    @property
    def document_ranges(self) -> list[tuple[int, int]]:
        """First position of each document, and the position after its last one."""
        starts = [0]
        if self.document_starts_N is not None:
            starts = self.document_starts_N.tolist()
        return list(zip(starts, [*starts[1:], self.num_positions]))

    def require_model(self, model: str, what: str = "the routing trace") -> None:
        """Raise ValueError unless the trace was recorded with the weights of a model.

        Args:
            model: identity of the weights.
            what: where the trace comes from, for the message.
        """
        require(
            self.model == model,
            f"the model of {what}",
            self.model or "not known",
            f"{model}, the identity of the weights that it is used with",
            "Record a trace with this model, or load the model that it was recorded with.",
        )


def _check_length(what: str, length: int, num_positions: int) -> None:
    require(length == num_positions, what, length, f"{num_positions}, one for each position")


def _check_range(what: str, values: Tensor, bound: int) -> None:
    if values.numel():
        low = int(values.min())
        high = int(values.max())
        require(
            low >= 0 and high < bound, what, f"between {low} and {high}", f"0 to {bound - 1}"
        )


def trace_layers(model: nn.Module, records: Sequence[RoutingRecord]) -> tuple[LayerTrace, ...]:
    """Return the assignments that `record_routing` recorded, on the CPU.

    Args:
        model: the model whose forward passes were recorded.
    """
    traced = []
    for layer, record in zip(find_moe_layers(model), records, strict=True):
        token_A, expert_A, weight_A = record.assignments()
        count_T = torch.bincount(token_A.cpu(), minlength=record.num_positions)
        gate_class = type(layer.gate)
        trace = LayerTrace(
            gate=getattr(gate_class, "name", gate_class.__name__),
            num_experts=layer.gate.num_experts,
            num_zero_computation=len(layer.gate.zero_computation_experts),
            token_offsets_T1=offsets_of_counts(count_T),
            expert_A=expert_A.cpu(),
            weight_A=weight_A.cpu(),
        )
        traced.append(trace)
    return tuple(traced)


def offsets_of_counts(count_T: Tensor) -> Tensor:
    """Return the sums of the counts before each position, and of all of them: int64 [T + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), count_T.cumsum(0)])


def concatenate_layers(parts: Sequence[Sequence[LayerTrace]]) -> tuple[LayerTrace, ...]:
    """Join traces of the same layers at consecutive ranges of positions.

    Args:
        parts: layers of each range of positions; one or more.
    """
    joined = []
    for layer_parts in zip(*parts, strict=True):
        weights = [layer.weight_A for layer in layer_parts]
        weight_A = None
        if all(weight is not None for weight in weights):
            weight_A = torch.cat(weights)
        layer = replace(
            layer_parts[0],
            token_offsets_T1=offsets_of_counts(
                torch.cat([part.count_T for part in layer_parts])
            ),
            expert_A=torch.cat([part.expert_A for part in layer_parts]),
            weight_A=weight_A,
        )
        joined.append(layer)
    return tuple(joined)


def to_routed_experts(trace: RoutingTrace) -> list[np.ndarray]:
    """Return the choices of each document in the layout of inference engines.

    Returns:
        int32 [positions of the document, L, K] for each document. A text that was run here has a
        position for each of its tokens. An engine's sequence has none for its last token, which
        was no input.

    Raises:
        ValueError: the number of experts per position varies, so that there is no K.
    """
    k = trace.constant_k
    require(
        k is not None,
        "the number of experts per position",
        "not constant",
        "the same at all positions in all layers, for the layout of inference engines",
        "Write a routing trace file instead.",
    )
    columns = [layer.expert_A.view(-1, k) for layer in trace.layers]
    expert_TLK = torch.stack(columns, dim=1).to(torch.int32).numpy()
    return [expert_TLK[start:end] for start, end in trace.document_ranges]


def from_routed_experts(
    routed_experts: Sequence[np.ndarray],
    layers: Sequence[LayerTrace],
    *,
    model: str = "",
    token_ids: Sequence[np.ndarray] | None = None,
) -> RoutingTrace:
    """Make a trace of the choices that an inference engine returns.

    Args:
        routed_experts: integers [tokens of the sequence - 1, L, K] of each sequence.
        layers: describe the MoE layers, such as those of a trace of the same model; only their
            gates and numbers of experts are taken.
        token_ids: the tokens of each sequence, of which the last one is no input; None: not
            known.

    Raises:
        ValueError: the arrays have other shapes or types, or an expert does not exist.
    """
    require(len(routed_experts) > 0, "the number of sequences", 0, "1 or more")
    k = routed_experts[0].shape[-1] if routed_experts[0].ndim else 0
    for number, array in enumerate(routed_experts):
        require(
            array.dtype.kind in "iu" and array.ndim == 3 and len(array) > 0,
            f"routed_experts of sequence {number}",
            f"{array.dtype} {list(array.shape)}",
            "integers of shape (sequence - 1, layers, k), with 1 position or more",
        )
        require(
            array.shape[1:] == (len(layers), k),
            f"routed_experts of sequence {number}",
            list(array.shape),
            f"(sequence - 1, {len(layers)} MoE layers, k {k})",
        )
    expert_TLK = torch.from_numpy(np.concatenate(routed_experts).astype(np.int64))
    lengths = [len(array) for array in routed_experts]
    offsets_T1 = torch.arange(len(expert_TLK) + 1) * k
    traced = []
    for number, layer in enumerate(layers):
        expert_A = expert_TLK[:, number].flatten()
        traced.append(
            replace(layer, token_offsets_T1=offsets_T1, expert_A=expert_A, weight_A=None)
        )
    return RoutingTrace(
        tuple(traced),
        model,
        _input_tokens(token_ids, lengths),
        torch.tensor([0, *np.cumsum(lengths)[:-1].tolist()]),
    )


def _input_tokens(token_ids: Sequence[np.ndarray] | None, lengths: list[int]) -> Tensor | None:
    """Return all tokens but the last one of each sequence, one after the other."""
    if token_ids is None:
        return None
    found = [len(tokens) for tokens in token_ids]
    require(
        found == [length + 1 for length in lengths],
        "the numbers of tokens of the sequences",
        found,
        f"{[length + 1 for length in lengths]}, one more than routed_experts has positions",
    )
    inputs = [np.asarray(tokens[:-1], np.int64) for tokens in token_ids]
    return torch.from_numpy(np.concatenate(inputs))
