"""Expected time of a training step from measured ceilings: a roofline.

    step = max(compute, memory) of the passes + memory of the optimizer + exposed communication

The expectation is a lower bound: every part runs at the rate that it reaches alone, and nothing is
counted for launches, normalisation, the gate's sorting, the input data or waiting for other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from megatron.analysis.ceilings import Ceilings
from megatron.analysis.communication import CommunicationEstimate, estimate_communication
from megatron.analysis.memory import MemoryEstimate, estimate_memory
from megatron.analysis.rank_parameters import Topology, meta_model, rank_parameters
from megatron.config.schema import RunConfig

GROUPED_PARTS = ("routed experts",)
"""Parts whose products run at the grouped ceiling"""
_ADAM_BYTES = 28
"""bytes per element of an optimizer step: fp32 weights and two moments read and written, and the
gradient read"""
_PASSES_OVER_ACTIVATIONS = 4
"""times that a kept activation is written or read: once by what makes it, once by what follows it,
and so again in the backward pass"""
_PASSES_OVER_WEIGHTS = 3
"""times that a weight is read in a micro-batch: forward, and for both gradients"""


@dataclass(frozen=True)
class StepTimeEstimate:
    """Expected seconds of an optimizer step on a rank."""

    compute_s: float
    """matrix products"""
    memory_s: float
    """reading and writing weights, gradients and activations in forward and backward"""
    optimizer_s: float
    """reading and writing the optimizer's states"""
    communication_s: float
    """all communication, as if nothing overlapped"""
    exposed_communication_s: float
    """part of it that does not overlap with computation"""
    tokens: int
    """of a step on one rank"""
    flops: float
    """operations of a step on one rank, recomputation included"""
    sent: int
    """bytes that leave a rank"""
    ceilings: Ceilings

    name: ClassVar[str] = "step_time"
    chart_title: ClassVar[str] = "Expected time of a step in seconds"

    @property
    def passes_s(self) -> float:
        """Forward and backward passes without communication."""
        return max(self.compute_s, self.memory_s)

    @property
    def total_s(self) -> float:
        """The step."""
        return self.passes_s + self.optimizer_s + self.exposed_communication_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of one rank."""
        return self.tokens / self.total_s

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            **asdict(self),
            "total_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
            "assumptions": list(self.assumptions),
        }

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the expectation takes for granted."""
        assumptions = (
            f"ceilings: {self.ceilings.text()}",
            "every operation at its ceiling, and nothing for launches, norms, sorting, data or "
            "waiting: the measured step takes longer",
        )
        if self.sent and not (self.ceilings.all_reduce_gb_s and self.ceilings.all_to_all_gb_s):
            unknown = "collectives whose ceiling is 0 take no time: it is not known"
            return (*assumptions, unknown)
        return assumptions

    @property
    def summary(self) -> str:
        """The time of the step in one line."""
        return (
            f"expected step: {self.total_s:.4g} s, {self.tokens_per_s:.4g} tokens/s on a rank"
        )

    def chart_rows(self) -> list[tuple[str, str, float]]:
        """Return (part, series, seconds) of each part of the step."""
        return [
            ("forward and backward", "compute", self.compute_s),
            ("forward and backward", "memory beyond compute", self.passes_s - self.compute_s),
            ("optimizer", "memory", self.optimizer_s),
            ("communication", "exposed", self.exposed_communication_s),
        ]

    def text(self) -> str:
        """Return the parts of the step and the assumptions."""
        hidden = self.communication_s - self.exposed_communication_s
        bound = "compute" if self.compute_s >= self.memory_s else "memory"
        rows = (
            ("matrix products", self.compute_s, ""),
            ("memory traffic of the passes", self.memory_s, f"the larger counts: {bound}"),
            ("optimizer", self.optimizer_s, ""),
            ("exposed communication", self.exposed_communication_s, f"{hidden:.4g} s hidden"),
        )
        lines = [self.summary]
        for part, seconds, note in rows:
            lines.append(f"  {part:<30}{seconds:>12.4g} s  {note}".rstrip())
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def estimate_step_time(
    config: RunConfig,
    vocab_size: int,
    topology: Topology,
    flops_by_part: Mapping[str, float],
    ceilings: Ceilings,
    *,
    memory: MemoryEstimate,
    communication: CommunicationEstimate,
) -> StepTimeEstimate:
    """Return the expected time of a step.

    Args:
        flops_by_part: operations per token, forward and backward with recomputation, of each
            part of the model (`ModelFlops.computed`); parts in `GROUPED_PARTS` are grouped
            matrix products.
        memory: gives the activations that are written and read.
        communication: gives what is sent.
    """
    train = config.train
    world_size = topology.world_size
    samples = train.global_batch(world_size) // world_size
    tokens = samples * config.model.seq_length
    micro_batches = samples // train.micro_batch_size
    ep_size = config.moe.moe_expert_parallel_size
    model = meta_model(config, vocab_size, topology)
    parameters = rank_parameters(model, topology, ep_size)
    compute_s = 0.0
    for part, flops in flops_by_part.items():
        rate = ceilings.grouped_tflops if part in GROUPED_PARTS else ceilings.dense_tflops
        compute_s += flops * tokens / (rate * 1e12)
    moved = micro_batches * (
        _PASSES_OVER_WEIGHTS * parameters.weight_bytes
        + 2 * memory.activations.gradients
        + _PASSES_OVER_ACTIVATIONS * memory.activations.kept
    )
    bandwidth = ceilings.bandwidth_gb_s * 1e9
    memory_s = moved / bandwidth
    communication_s, overlapping_s = _communication_seconds(communication, ceilings)
    passes_s = max(compute_s, memory_s)
    exposed_s = communication_s - min(overlapping_s, passes_s)
    shard = parameters.shard if config.deepspeed.zero_stage else parameters.elements()
    return StepTimeEstimate(
        compute_s=compute_s,
        memory_s=memory_s,
        optimizer_s=_ADAM_BYTES * shard / bandwidth,
        communication_s=communication_s,
        exposed_communication_s=exposed_s,
        tokens=tokens,
        flops=sum(flops_by_part.values()) * tokens,
        sent=communication.sent,
        ceilings=ceilings,
    )


def _communication_seconds(
    communication: CommunicationEstimate, ceilings: Ceilings
) -> tuple[float, float]:
    """Return the seconds of all transfers, and of those that can overlap."""
    total = 0.0
    overlapping = 0.0
    for transfer in communication.transfers:
        rate = ceilings.all_reduce_gb_s
        if transfer.collective == "all-to-all":
            rate = ceilings.all_to_all_gb_s
        if not rate:
            continue
        seconds = transfer.sent / (rate * 1e9)
        total += seconds
        if transfer.overlaps:
            overlapping += seconds
    return total, overlapping


PlannedSection = MemoryEstimate | CommunicationEstimate | StepTimeEstimate
"""What `memory_sections` returns"""


def memory_sections(
    config: RunConfig,
    vocab_size: int,
    topology: Topology,
    experts_per_token: float,
    *,
    flops_by_part: Mapping[str, float],
    ceilings: Ceilings | None = None,
) -> list[PlannedSection]:
    """Return what a run needs on a rank: memory, communication and, with ceilings, time.

    Args:
        vocab_size: before padding.
        experts_per_token: routed experts of a token, the mean over tokens and layers.
        flops_by_part: see `estimate_step_time`.
        ceilings: measured or given; None: no step time.

    Raises:
        ValueError: the flags do not fit the number of ranks.
    """
    memory = estimate_memory(config, vocab_size, topology, experts_per_token)
    communication = estimate_communication(config, vocab_size, topology, experts_per_token)
    sections: list[PlannedSection] = [memory, communication]
    if ceilings is not None:
        sections.append(
            estimate_step_time(
                config,
                vocab_size,
                topology,
                flops_by_part,
                ceilings,
                memory=memory,
                communication=communication,
            )
        )
    return sections
