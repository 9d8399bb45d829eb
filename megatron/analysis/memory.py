"""Peak memory of a rank in a training step: weights, gradients, optimizer and activations.

Weights, gradients and optimizer states follow from what DeepSpeed 0.19.8 allocates at each ZeRO
stage, found by tracking the live tensors of training steps. Activations come from
`megatron.analysis.activation_trace`. A step has phases, in each of which other buffers exist; the
peak is that of the phase that needs most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from megatron.analysis.activation_trace import ActivationPeaks, trace_activations
from megatron.analysis.moe_activations import (
    LayerActivations,
    LayerSizes,
    gate_activations,
    grouped_layer_activations,
    peer_layer_activations,
)
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
from megatron.moe.gate import gate_class

_FP32 = 4
_ADAM = 8
"""bytes of both fp32 moments of an element"""
_ALL_REDUCE_BUFFER = 500_000_000
"""elements of DeepSpeed's buffer for all-reduces outside ZeRO's own optimizer"""
_CUDA_ALLOWANCE = 1.5 * 2**30
"""bytes of the CUDA context, NCCL and the libraries' workspaces; not measured"""
_FRAGMENTATION = 0.05
"""share that the caching allocator of a GPU may reserve in addition; not measured"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank needs in a training step after the first."""

    name: ClassVar[str] = "memory"
    """key in a JSON file"""
    chart_title: ClassVar[str] = "Memory of a rank at the peak in bytes"

    phases: dict[str, dict[str, int]]
    """by phase of a step, the bytes of each part that exists in it"""
    dispatch: int
    """part of the activations: rows sent and received by MoE layers, and permutations"""
    activations: ActivationPeaks
    on_host: int
    """bytes that offloading keeps in the host's memory instead"""
    allowance: int
    """for what is not a tensor, or not seen: see `assumptions`"""
    assumptions: tuple[str, ...] = field(default=())

    @property
    def peak_phase(self) -> str:
        """Name of the phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes of all tensors in that phase, without the allowance."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def summary(self) -> str:
        """The peak in one line."""
        return f"memory of a rank: {format_bytes(self.peak)} at the peak, {self.peak_phase}"

    def chart_rows(self) -> list[tuple[str, str, float]]:
        """Return (part, series, bytes) of each part at the peak."""
        parts = self.phases[self.peak_phase]
        rows = [(part, "tensors", float(number)) for part, number in parts.items()]
        return [*rows, ("allowance", "not measured", float(self.allowance))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; all numbers are bytes."""
        return {
            "peak": self.peak,
            "peak_phase": self.peak_phase,
            "allowance": self.allowance,
            "on_host": self.on_host,
            "dispatch": self.dispatch,
            "activations": asdict(self.activations),
            "phases": self.phases,
            "assumptions": list(self.assumptions),
        }

    def text(self) -> str:
        """Return a table of the parts at the peak, of the phases and of the assumptions."""
        lines = [self.summary]
        for part, number in self.phases[self.peak_phase].items():
            lines.append(f"  {part:<30}{format_bytes(number):>12}")
        lines.append(f"  {'allowance for the rest':<30}{format_bytes(self.allowance):>12}")
        if self.dispatch:
            lines.append(
                f"  of the activations, dispatch buffers: {format_bytes(self.dispatch)}"
            )
        if self.on_host:
            lines.append(f"  in the host's memory: {format_bytes(self.on_host)}")
        lines.append("largest sum of each phase of a step")
        for phase, parts in self.phases.items():
            lines.append(f"  {phase:<30}{format_bytes(sum(parts.values())):>12}")
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def format_bytes(number: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def estimate_memory(
    config: RunConfig, vocab_size: int, topology: Topology, experts_per_token: float
) -> MemoryEstimate:
    """Return the memory of a rank.

    Args:
        vocab_size: before padding.
        experts_per_token: routed experts of a token, the mean over tokens and layers.

    Raises:
        ValueError: the flags do not fit the number of ranks.
    """
    model = meta_model(config, vocab_size, topology)
    ep_size = config.moe.moe_expert_parallel_size
    parameters = rank_parameters(model, topology, ep_size)
    options = zero_options(config, topology.world_size, parameters)
    layers = layer_activations(config, vocab_size, topology, experts_per_token)
    is_fp32 = config.optimizer.precision == "fp32"
    activations = trace_activations(
        model,
        layers,
        batch_size=config.train.micro_batch_size,
        seq_length=config.model.seq_length,
        device=topology.device,
        gradient_itemsize=_FP32 if options.stage == 0 else 0,
    )
    planned = _Plan(
        parameters,
        options,
        activations,
        is_fp32=is_fp32,
        is_bf16=config.optimizer.bf16,
        accumulates=config.train.global_batch(topology.world_size)
        > config.train.micro_batch_size * topology.world_size,
    )
    phases = planned.phases()
    peak = max(sum(parts.values()) for parts in phases.values())
    dispatch = [layer.dispatch for layer in layers.values()]
    reduce_layers = max if config.train.recompute_activations else sum
    return MemoryEstimate(
        phases=phases,
        dispatch=reduce_layers(dispatch) if dispatch else 0,
        activations=activations,
        on_host=planned.on_host,
        allowance=_allowance(topology.device, peak),
        assumptions=_assumptions(config, topology, options.stage, experts_per_token),
    )


def layer_activations(
    config: RunConfig, vocab_size: int, topology: Topology, experts_per_token: float
) -> dict[int, LayerActivations]:
    """Return the bytes of the MoE layer of each block that has one."""
    dtype = COMPUTE_DTYPES[config.optimizer.precision]
    model = config.model
    moe = config.moe
    tokens = config.train.micro_batch_size * model.seq_length
    sizes = LayerSizes(
        tokens=tokens,
        assignments=round(tokens * experts_per_token),
        hidden_size=model.hidden_size,
        row_size=moe.moe_latent_size or model.hidden_size,
        width=moe.expert_size(model.ffn_size),
        activation=model.act,
        itemsize=dtype.itemsize,
        ep_size=moe.moe_expert_parallel_size,
        fused=_is_fused(config),
        by_expert=topology.device == "cpu",
    )
    by_gate: dict[str, LayerActivations] = {}
    layers = {}
    for block, name in enumerate(moe.gates(model.num_layers)):
        if name is None:
            continue
        if name not in by_gate:
            gate = gate_activations(name, config, vocab_size, dtype)
            is_peer = gate_class(name).expert_kind == "peer"
            layer = peer_layer_activations if is_peer else grouped_layer_activations
            by_gate[name] = layer(sizes, gate)
        layers[block] = by_gate[name]
    return layers


def _is_fused(config: RunConfig) -> bool:
    is_plain = config.moe.expert_type == "mlp" and not config.moe.moe_weight_on_input
    backend = config.moe.moe_backend
    has_fused = backend in ("auto", "cpu", "triton")
    return is_plain and has_fused and not config.expert_options.get("linear_bias", False)


def _allowance(device: str, peak: int) -> int:
    if device == "cpu":
        return 0
    return round(_CUDA_ALLOWANCE + _FRAGMENTATION * peak)


def _assumptions(
    config: RunConfig, topology: Topology, stage: int, experts_per_token: float
) -> tuple[str, ...]:
    train = config.train
    assumptions = [
        f"{topology.world_size} rank(s) on {topology.device}, ZeRO {stage}, experts over "
        f"{config.moe.moe_expert_parallel_size} rank(s), {config.optimizer.precision}, "
        f"micro-batches of {train.micro_batch_size} x {config.model.seq_length} tokens",
        "a step after the first, when the optimizer has its moments",
    ]
    if config.moe.num_experts:
        assumptions.append(
            f"{experts_per_token:g} routed experts per token; all ranks receive as many rows"
        )
    if topology.device == "cpu":
        assumptions.append(
            "tensors only: not the Python process, the communication library's buffers, or "
            "memory kept for reuse (megatron.host_allocator)"
        )
    else:
        assumptions.append(
            f"allowance: {format_bytes(_CUDA_ALLOWANCE)} for CUDA, NCCL and workspaces, and "
            f"{_FRAGMENTATION:.0%} for fragmentation; neither was measured"
        )
    if config.optimizer.fp16:
        assumptions.append("fp16 as bf16 at ZeRO 2; at ZeRO 1 as fp32 gradients; not measured")
    return tuple(assumptions)


@dataclass(frozen=True)
class _Plan:
    """Puts together the phases of a step. Sizes are in bytes."""

    parameters: RankParameters
    options: ZeroOptions
    activations: ActivationPeaks
    is_fp32: bool
    is_bf16: bool
    accumulates: bool
    """there is more than one micro-batch per step"""

    @property
    def bucket(self) -> int:
        """ZeRO's buffers of gradients, fp32: two with overlap_comm at stages 1 and 2."""
        elements = min(self.options.reduce_bucket_size, self.parameters.elements())
        copies = 2 if self.options.overlap_comm and self.options.stage < 3 else 1
        return _FP32 * copies * elements

    @property
    def flat(self) -> int:
        """A bucket's gradients of one process group, copied together for the reduction."""
        p = self.parameters
        largest = max(p.elements(False), p.elements(True))
        return _FP32 * min(largest, self.options.reduce_bucket_size)

    @property
    def reduces_during_backward(self) -> bool:
        """The gradients do not fit into one bucket."""
        return self.parameters.elements() > self.options.reduce_bucket_size

    @property
    def on_host(self) -> int:
        o = self.options
        number = 0
        if o.offload_optimizer:
            number += (_FP32 + _ADAM + _FP32) * self.parameters.shard
        if o.offload_param:
            number += sum(g.shard * g.itemsize for g in self.parameters.groups)
        return number

    def states(self) -> dict[str, int]:
        """Return what exists all the time at stages 0 to 2."""
        shard = self.parameters.shard
        if self.options.stage == 0:
            shard = self.parameters.elements()
        states = {"weights": self.parameters.weight_bytes}
        if self.options.offload_optimizer:
            return states
        if not (self.is_fp32 and self.options.stage == 0):
            states["fp32 master weights"] = _FP32 * shard
        states["optimizer moments"] = _ADAM * shard
        return states

    def phases(self) -> dict[str, dict[str, int]]:
        """Return the parts of each phase."""
        stage = self.options.stage
        if stage == 3:
            return self._stage_3()
        if stage == 2:
            return self._stage_2()
        if stage == 0:
            return self._stage_0()
        if self.is_bf16:
            return self._stage_1_bf16()
        return self._stage_1_as_parameters()

    def _passes(
        self, states: dict[str, int], held: dict[str, int], in_backward: dict[str, int]
    ) -> dict[str, dict[str, int]]:
        """Return the forward and backward phases where gradients stay until the step.

        Args:
            held: what the first micro-batch leaves for the later ones.
            in_backward: buffers of the backward pass.
        """
        a = self.activations
        growth = max(0, a.backward_with_gradients - a.backward)
        first = {**states, **in_backward, "activations": a.backward, "new gradients": growth}
        phases = {
            "forward pass": {**states, "activations": a.forward},
            "backward pass": first,
        }
        if self.accumulates:
            later = {**states, **held}
            phases["later forward passes"] = {**later, "activations": a.forward}
            phases["later backward passes"] = {**later, "activations": a.backward}
        return phases

    def _stage_0(self) -> dict[str, dict[str, int]]:
        states = self.states()
        gradients = {"gradients": _FP32 * self.parameters.elements()}
        phases = self._passes(states, gradients, {})
        buffer = _FP32 * min(self.parameters.elements(), _ALL_REDUCE_BUFFER)
        phases["reduction"] = {**states, **gradients, "reduction buffer": buffer}
        phases["optimizer step"] = {**states, **gradients}
        return phases

    def _stage_1_bf16(self) -> dict[str, dict[str, int]]:
        """DeepSpeed's BF16_Optimizer: fp32 sums of all gradients, and bf16 ones."""
        states = self.states()
        states["fp32 gradients"] = _FP32 * self.parameters.elements()
        gradients = {"gradients": self.activations.gradients}
        phases = self._passes(states, gradients, {})
        groups = dict.fromkeys((False, True), 0)
        for group in self.parameters.groups:
            groups[group.is_expert] += 1
        copied = [self.parameters.elements(e) for e, number in groups.items() if number > 1]
        buffer = _FP32 * min(max(copied, default=0), _ALL_REDUCE_BUFFER)
        phases["reduction"] = {**states, **gradients, "reduction buffer": buffer}
        phases["optimizer step"] = {**states, **gradients}
        return phases

    def _stage_1_as_parameters(self) -> dict[str, dict[str, int]]:
        """Gradients in `grad`, and at the end of the step in a bucket."""
        states = self.states()
        everything = _FP32 * self.parameters.elements()
        partition = _FP32 * self.parameters.shard_in_full_parameters
        bucket = {"gradient bucket": self.bucket}
        phases = self._passes(states, {"gradients": everything, **bucket}, bucket)
        outside = everything - _FP32 * min(
            self.parameters.elements(), self.options.reduce_bucket_size
        )
        reduced = max(everything, outside + max(partition, self.flat))
        phases["reduction"] = {**states, **bucket, "gradients": reduced}
        phases["optimizer step"] = self._step(states, partition)
        return phases

    def _stage_2(self) -> dict[str, dict[str, int]]:
        states = self.states()
        a = self.activations
        partition = _FP32 * self.parameters.shard_in_full_parameters
        temporary = max(self.flat, partition)
        if not self.is_fp32:
            # Sums are kept of this rank's part alone, without a copy of a bucket's gradients.
            partition = _FP32 * self.parameters.shard
            temporary = self.flat
        sums = {"gradient sums": partition}
        # The first micro-batch has none until its gradients are reduced.
        held = sums if self.accumulates or self.reduces_during_backward else {}
        reduced = sums if self.accumulates or not self.is_fp32 else {}
        bucket = {"gradient bucket": self.bucket}
        backward = {**states, **held, **bucket, "activations": a.backward}
        if self.reduces_during_backward:
            backward["reduction buffer"] = temporary
        phases = {
            "forward pass": {**states, **(sums if self.accumulates else {})},
            "backward pass": backward,
            "reduction": {**states, **reduced, **bucket, "reduction buffer": temporary},
            "optimizer step": self._step(states, partition),
        }
        phases["forward pass"]["activations"] = a.forward
        return phases

    def _step(self, states: dict[str, int], gradients: int) -> dict[str, int]:
        largest = _FP32 * self.parameters.largest_shard
        return {**states, "gradient sums": gradients, "a group's gradients": largest}

    def _stage_3(self) -> dict[str, dict[str, int]]:
        p = self.parameters
        a = self.activations
        states = {}
        if not self.options.offload_param:
            states["weights"] = sum(g.shard * g.itemsize for g in p.groups)
        states["small weights, gathered"] = self._persistent()
        if not self.options.offload_optimizer:
            states["fp32 master weights"] = _FP32 * p.shard
            states["optimizer moments"] = _ADAM * p.shard
            states["gradient sums"] = _FP32 * p.shard
        states["gradient bucket"] = self.bucket
        gathered, fetched = self._gathered()
        largest = 0
        for block in p.blocks:
            largest = max(largest, sum(n + n // ranks for n, _, ranks in block))
        weights = {"gathered weights": gathered}
        return {
            "gathering weights": {**states, **weights, "gather buffer": fetched},
            "forward pass": {**states, **weights, "activations": a.forward},
            "backward pass": {
                **states,
                **weights,
                "activations": a.backward,
                "reduction buffer": _FP32 * largest,
            },
            "optimizer step": {**states, "a group's gradients": _FP32 * p.largest_shard},
        }

    def _persistent(self) -> int:
        """Bytes of the parameters that ZeRO 3 keeps on every rank in addition to their parts."""
        number = 0
        for block in self.parameters.blocks:
            for numel, itemsize, ranks in block:
                if ranks > 1 and numel <= self.options.persistence_threshold:
                    number += numel * itemsize
        return number

    def _gathered(self) -> tuple[int, int]:
        """Bytes of gathered parameters between forward and backward, and of one fetch."""
        threshold = self.options.persistence_threshold
        kept = 0
        largest = 0
        fetched = 0
        distance = 0
        for block in reversed(self.parameters.blocks):
            size = 0
            for numel, itemsize, ranks in block:
                if ranks > 1 and numel > threshold:
                    size += numel * itemsize
                    limit = self.options.prefetch_bucket_size * itemsize
                    fetched = min(fetched + numel * itemsize, limit)
            largest = max(largest, size)
            if distance < self.options.max_reuse_distance:
                kept += size
            distance += 2 * sum(numel for numel, _, _ in block)
        return max(kept, largest), fetched
