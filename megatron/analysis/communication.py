"""Bytes that a rank communicates in a training step, by collective.

Which collectives there are was found by recording those of training steps under DeepSpeed 0.19.8
(`tests/analysis/test_communication.py` repeats it). Collectives of a group of one rank move nothing
and are left out.

Letters: A assignments of a rank's micro-batch, D features of a row, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from megatron.analysis.memory import format_bytes
from megatron.analysis.rank_parameters import (
    RankParameters,
    Topology,
    ZeroOptions,
    meta_model,
    rank_parameters,
    zero_options,
)
from megatron.config.schema import RunConfig
from megatron.moe.experts.backends import COMPUTE_DTYPES
from megatron.moe.gate import create_gate, gate_class
from megatron.moe.routing import GateInput, Routing

_FP32 = 4
_FP64 = 8
_INT64 = 8
_WIRE_FACTOR = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
}
"""Share of the tensor that a rank of many sends: a ring's all-reduce sends it twice"""


@dataclass(frozen=True)
class Transfer:
    """One purpose for which ranks communicate."""

    purpose: str
    collective: str
    """all-reduce, all-gather, reduce-scatter or all-to-all"""
    size: int
    """bytes of a step's tensors: the reduced ones, the gathered ones or the rows sent,
    a rank's rows for itself included"""
    ranks: int
    """size of the group"""
    overlaps: bool = False
    """whether it can run at the same time as computation"""

    @property
    def sent(self) -> int:
        """Bytes that leave a rank: a ring's, or all but a rank's own rows."""
        return round(_WIRE_FACTOR[self.collective] * self.size * (self.ranks - 1) / self.ranks)


@dataclass(frozen=True)
class CommunicationEstimate:
    """What a rank communicates in a training step after the first."""

    name: ClassVar[str] = "communication"
    """key in a JSON file"""
    chart_title: ClassVar[str] = "Bytes that a rank sends in a step"

    transfers: tuple[Transfer, ...]
    experts_per_token: float

    def size(self, collective: str | None = None) -> int:
        """Bytes of the tensors of a collective, or of all."""
        chosen = [t for t in self.transfers if collective in (None, t.collective)]
        return sum(t.size for t in chosen)

    @property
    def sent(self) -> int:
        """Bytes that leave a rank."""
        return sum(t.sent for t in self.transfers)

    @property
    def summary(self) -> str:
        """The bytes sent in one line."""
        if not self.transfers:
            return "communication: none, there is one rank"
        return f"communication of a rank in a step: {format_bytes(self.sent)} sent"

    def chart_rows(self) -> list[tuple[str, str, float]]:
        """Return (purpose, collective, bytes sent) of each transfer."""
        return [(t.purpose, t.collective, float(t.sent)) for t in self.transfers]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers take for granted, and what they leave out."""
        assumptions = (
            "a step in which nothing is logged, evaluated or saved; metrics take a few small "
            "all-reduces per --log-interval",
        )
        if not self.experts_per_token:  # a dense model
            return assumptions
        experts = f"{self.experts_per_token:g} routed experts per token after capacity"
        return (experts, *assumptions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        transfers = [{**asdict(t), "sent": t.sent} for t in self.transfers]
        return {
            "sent": self.sent,
            "experts_per_token": self.experts_per_token,
            "transfers": transfers,
            "assumptions": list(self.assumptions),
        }

    def text(self) -> str:
        """Return a table of the transfers."""
        if not self.transfers:
            return self.summary
        lines = [self.summary]
        for t in self.transfers:
            lines.append(
                f"  {t.purpose:<36}{t.collective:<16}{format_bytes(t.size):>12} among "
                f"{t.ranks} ranks, {format_bytes(t.sent)} sent"
            )
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def estimate_communication(
    config: RunConfig, vocab_size: int, topology: Topology, experts_per_token: float
) -> CommunicationEstimate:
    """Return what a rank communicates in a step.

    Args:
        vocab_size: before padding.
        experts_per_token: routed experts of a token after capacity, the mean over tokens and
            layers.

    Raises:
        ValueError: the flags do not fit the number of ranks.
    """
    model = meta_model(config, vocab_size, topology)
    ep_size = config.moe.moe_expert_parallel_size
    parameters = rank_parameters(model, topology, ep_size)
    options = zero_options(config, topology.world_size, parameters)
    step = _Step(config, vocab_size, topology, parameters, options, experts_per_token)
    transfers = [t for t in step.transfers() if t.ranks > 1 and t.size]
    return CommunicationEstimate(tuple(transfers), experts_per_token)


@dataclass(frozen=True)
class _Step:
    config: RunConfig
    vocab_size: int
    topology: Topology
    parameters: RankParameters
    options: ZeroOptions
    experts_per_token: float

    @property
    def micro_batches(self) -> int:
        train = self.config.train
        world_size = self.topology.world_size
        return train.global_batch(world_size) // (train.micro_batch_size * world_size)

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.topology.world_size // self.config.moe.moe_expert_parallel_size

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of a number in reduced gradients."""
        return 2 if self.config.optimizer.grad_reduce_in_bf16 else _FP32

    def transfers(self) -> Iterator[Transfer]:
        """Yield everything that is sent, also within groups of one rank."""
        yield self._all_reduce("loss normalizers", 2 * _FP64)
        yield from self._expert_rows()
        yield from self._balance_loads()
        if self.options.stage == 3:
            yield from self._stage_3()
        else:
            yield from self._reduced_gradients()
            yield from self._gathered_weights()
        yield from self._norms()
        yield from self._gate_updates()

    def _all_reduce(self, purpose: str, size: int) -> Transfer:
        return Transfer(purpose, "all-reduce", size, self.topology.world_size)

    def _reduced_gradients(self) -> Iterator[Transfer]:
        """All-reduces, also at ZeRO 1 and 2; at ZeRO 2 those of every micro-batch."""
        times = self.micro_batches if self.options.stage == 2 else 1
        itemsize = self.gradient_itemsize
        for is_expert, purpose in ((False, "dense gradients"), (True, "expert gradients")):
            elements = self.parameters.elements(is_expert)
            ranks = self.expert_ranks if is_expert else self.topology.world_size
            size = times * itemsize * elements
            overlaps = self.options.overlap_comm
            yield Transfer(purpose, "all-reduce", size, ranks, overlaps)

    def _gathered_weights(self) -> Iterator[Transfer]:
        if self.options.stage == 0:
            return
        for is_expert, purpose in ((False, "updated weights"), (True, "updated experts")):
            groups = [g for g in self.parameters.groups if g.is_expert == is_expert]
            ranks = self.expert_ranks if is_expert else self.topology.world_size
            size = sum(g.shard * g.ranks * g.itemsize for g in groups)
            yield Transfer(purpose, "all-gather", size, ranks)

    def _stage_3(self) -> Iterator[Transfer]:
        gathers: dict[int, int] = {}
        updates: dict[int, int] = {}
        reduced: dict[int, int] = {}
        distance = 0
        for block in reversed(self.parameters.blocks):
            # A block that is used again soon enough stays gathered for the backward pass.
            times = 1 if distance < self.options.max_reuse_distance else 2
            distance += 2 * sum(numel for numel, _, _ in block)
            for numel, itemsize, ranks in block:
                padded = -(-numel // ranks) * ranks
                reduced[ranks] = reduced.get(ranks, 0) + padded * self.gradient_itemsize
                if numel > self.options.persistence_threshold:
                    gathers[ranks] = gathers.get(ranks, 0) + times * padded * itemsize
                else:
                    updates[ranks] = updates.get(ranks, 0) + padded * itemsize
        rows = (
            ("weights of blocks", "all-gather", gathers, self.micro_batches, True),
            ("gradients", "reduce-scatter", reduced, self.micro_batches, True),
            ("small weights", "all-gather", updates, 1, False),
        )
        for purpose, collective, by_ranks, times, overlaps in rows:
            for ranks, size in by_ranks.items():
                yield Transfer(purpose, collective, times * size, ranks, overlaps)

    def _norms(self) -> Iterator[Transfer]:
        """Gradient norms, one number for each group, and a flag of overflow."""
        stage = self.options.stage
        is_bf16 = self.config.optimizer.bf16
        groups = self.parameters.groups
        moe_groups = sum(g.is_expert for g in groups)
        ep_size = self.config.moe.moe_expert_parallel_size
        if stage == 0:
            return
        if stage == 1 and is_bf16:
            # DeepSpeed's BF16_Optimizer computes the norm of full gradients.
            yield Transfer("gradient norms", "all-reduce", _FP32, ep_size)
            return
        if stage == 3:
            yield self._all_reduce("gradient norms", len(groups) * _FP64)
            return
        yield self._all_reduce("gradient norms", len(groups) * _FP32)
        yield Transfer(
            "mean of experts' norms",
            "all-reduce",
            moe_groups * _FP32,
            self.expert_ranks,
        )
        if stage == 2 and is_bf16:
            yield self._all_reduce("flag of overflow", 1)

    def _expert_rows(self) -> Iterator[Transfer]:
        """All-to-alls of the MoE layers' forward and backward passes, and of recomputation."""
        config = self.config
        ep_size = config.moe.moe_expert_parallel_size
        if ep_size == 1:
            return
        itemsize = COMPUTE_DTYPES[config.optimizer.precision].itemsize
        tokens = config.train.micro_batch_size * config.model.seq_length
        assignments = tokens * self.experts_per_token
        is_recomputed = config.train.recompute_activations
        # Recomputation stops once every saved tensor is there: before outputs are sent back,
        # unless what follows saves something.
        sends_again = config.model.hidden_dropout > 0 or config.moe.moe_latent_size is not None
        passes = {"dispatch": 2 + is_recomputed, "combine": 2 + (is_recomputed and sends_again)}
        row_size = (config.moe.moe_latent_size or config.model.hidden_size) * itemsize
        sizes = {"dispatch": 0.0, "combine": 0.0, "counts": 0.0}
        for name in config.moe.gates(config.model.num_layers):
            if name is None:
                continue
            if gate_class(name).expert_kind == "peer":
                rows = ep_size * tokens * row_size
                ids = assignments * 2 * _INT64
                sizes["dispatch"] += passes["dispatch"] * (rows + assignments * _FP32)
                sizes["dispatch"] += (passes["dispatch"] - 1) * ids
                sizes["combine"] += passes["combine"] * rows
                sizes["counts"] += (passes["dispatch"] - 1) * ep_size * 2 * _INT64
                continue
            rows = assignments * row_size
            sizes["dispatch"] += passes["dispatch"] * (rows + assignments * _FP32)
            sizes["combine"] += passes["combine"] * rows
            sizes["counts"] += config.moe.num_experts * _INT64
        for purpose, size in sizes.items():
            total = round(self.micro_batches * size)
            yield Transfer(f"expert rows: {purpose}", "all-to-all", total, ep_size)

    def _balance_loads(self) -> Iterator[Transfer]:
        """Loads of balance losses of scope global-batch: one all-reduce in each forward pass."""
        numbers = 0
        for routing in self._routings():
            for term in routing.balance:
                numbers += self.micro_batches * (term.count_NG.numel() + term.total_N.numel())
        yield self._all_reduce("loads of balance losses", numbers * _FP64)

    def _gate_updates(self) -> Iterator[Transfer]:
        """Counts of a step for gates that keep state: one all-reduce for all layers."""
        gates = [n for n in self.config.moe.gates(self.config.model.num_layers) if n]
        if not any(self._gate(name).has_state for name in dict.fromkeys(gates)):
            return
        numbers = 0
        for routing in self._routings():
            sums = [*routing.metric_sums.values(), *routing.step_sums.values()]
            numbers += 1 + self.config.moe.num_experts + sum(s.numel() for s in sums)
        yield self._all_reduce("counts for gates", numbers * _FP64)

    def _gate(self, name: str) -> Any:
        return create_gate(
            name,
            hidden_size=self.config.model.hidden_size,
            num_experts=self.config.moe.num_experts,
            vocab_size=self.vocab_size,
            **self.config.gate_options.get(name, {}),
        )

    def _routings(self) -> Iterator[Routing]:
        """A routing of a few random tokens by the gate of each MoE layer."""
        by_gate: dict[str, Routing] = {}
        sequences = self.config.train.micro_batch_size
        for name in self.config.moe.gates(self.config.model.num_layers):
            if name is None:
                continue
            if name not in by_gate:
                gate = self._gate(name)
                generator = torch.Generator().manual_seed(0)
                sequence_T = torch.arange(sequences).repeat_interleave(8)
                size = (len(sequence_T), self.config.model.hidden_size)
                x_TD = torch.randn(size, generator=generator)
                inp = GateInput(
                    x_TD,
                    token_ids_T=torch.zeros_like(sequence_T),
                    sequence_T=sequence_T,
                    num_sequences=sequences,
                )
                by_gate[name] = gate(inp)
            yield by_gate[name]
