"""Shards of the optimizer state on this rank, at any ZeRO stage (DeepSpeed 0.19.8).

ZeRO 1 and 2 flatten the parameters of a group into one buffer and give each rank a contiguous part
of it; ZeRO 3 gives each rank a contiguous part of every parameter; stage 0 gives everything to
every rank. So a rank's part of a parameter is always one range of the flattened parameter. With
sharded experts, consecutive ones on a rank, it is one range of the flattened stack of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.moe.layer_sums import find_moe_layers
from megatron.parallel.groups import Groups

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class GlobalLayout:
    """Full shapes of a model's tensors. Made from a finished model, before the engine is built."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of all parameters, with the experts of all ranks"""
    global_offset: dict[str, int]
    """Element of the flattened full tensor at which this rank's parameter starts; it is not 0
    for sharded experts"""
    buffers: tuple[str, ...]
    """Names of the buffers in the model's state, which are equal on all ranks"""
    frozen: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Frozen parameters: the number of this rank among those with the same elements, and their
    number"""

    @staticmethod
    def of(model: nn.Module, groups: Groups) -> GlobalLayout:
        """Return the layout of a model whose experts are sharded over the ranks of a group."""
        sharded = set()
        for layer in find_moe_layers(model):
            sharded.update(id(p) for p in layer.experts.parameters())
        shapes = {}
        global_offset = {}
        frozen = {}
        for name, p in model.named_parameters():
            ep_size = 1
            if id(p) in sharded:
                ep_size = groups.ep_size
            shapes[name] = tuple(p.shape)
            global_offset[name] = 0
            if ep_size > 1:
                shapes[name] = (p.shape[0] * ep_size, *p.shape[1:])
                global_offset[name] = groups.ep_rank * p.numel()
            if not p.requires_grad:
                frozen[name] = (groups.rank // ep_size, groups.world_size // ep_size)
        buffers = tuple(name for name in model.state_dict() if name not in shapes)
        return GlobalLayout(shapes, global_offset, buffers, frozen)


@dataclass(frozen=True)
class TensorShard:
    """A contiguous range of a flattened parameter whose optimizer state is on this rank."""

    name: str
    """Name of the parameter"""
    start: int
    """First element of the shard in the flattened full tensor"""
    weight: Tensor
    """1-D view of the fp32 weights; loading may write to it"""
    flat_buffer: Tensor
    """The tensor that torch's optimizer updates, which contains `weight`"""
    offset: int
    """First element of the shard in the flattened `flat_buffer`"""
    model: Tensor
    """1-D view of the same elements of the parameter of the forward pass, in its dtype"""

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.weight.numel()


class ZeroShards:
    """The shards of the optimizer state on this rank; frozen parameters have none.

    Args:
        engine: DeepSpeed's engine.
        layout: Layout of its model.

    Raises:
        ValueError: An option of DeepSpeed keeps the state where it cannot be read.
    """

    def __init__(self, engine: Any, layout: GlobalLayout):
        self.layout = layout
        self.stage = engine.zero_optimization_stage()
        self.zero_optimizer = engine.optimizer
        # At stage 0 in fp32 DeepSpeed uses torch's optimizer without a wrapper.
        self.torch_optimizer = self.zero_optimizer
        if not isinstance(self.zero_optimizer, torch.optim.Optimizer):
            self.torch_optimizer = self.zero_optimizer.optimizer
        self._require_supported_options()
        self.replicated = self.stage == 0
        """Whether every rank holds all shards"""
        parameters = []
        for name, p in engine.module.named_parameters():
            if name in layout.shapes and name not in layout.frozen:
                parameters.append((name, p))
        find_shards = {0: self._stage_0, 3: self._stage_3}.get(self.stage, self._stage_1_or_2)
        self.shards = [shard for shard in find_shards(parameters) if shard.length]

    def _require_supported_options(self) -> None:
        advice = "Change it in the file of --deepspeed_config."
        require(
            not getattr(self.zero_optimizer, "swap_optimizer", False),
            "offload_optimizer.device",
            "nvme",
            "none or cpu, with --save and --load",
            advice,
        )
        # With this option DeepSpeed 0.19.8 reports wrong positions of parameters in its buffer.
        require(
            not getattr(self.zero_optimizer, "round_robin_gradients", False),
            "zero_optimization.round_robin_gradients",
            True,
            "false, with --save and --load",
            advice,
        )

    def _shard(
        self, name: str, start: int, flat_buffer: Tensor, offset: int, model: Tensor
    ) -> TensorShard:
        """Return a shard.

        Args:
            start: Its first element in the flattened parameter of this rank.
            model: Its elements in the parameter of the forward pass.
        """
        return TensorShard(
            name=name,
            start=self.layout.global_offset[name] + start,
            weight=flat_buffer.detach().view(-1)[offset : offset + model.numel()],
            flat_buffer=flat_buffer,
            offset=offset,
            model=model,
        )

    def _stage_1_or_2(
        self, parameters: list[tuple[str, nn.Parameter]]
    ) -> Iterator[TensorShard]:
        for name, p in parameters:
            fragment = p._hp_mapping
            if fragment is None:  # no element of this parameter is on this rank
                continue
            group = self.torch_optimizer.param_groups[fragment.param_group_index]
            flat_buffer = group["params"][0]
            offset = fragment.hp_fragment_address.start
            length = fragment.hp_fragment_address.numel
            start = fragment.lp_fragment_address.start
            model = p.detach().view(-1)[start : start + length]
            yield self._shard(name, start, flat_buffer, offset, model)

    def _stage_3(self, parameters: list[tuple[str, nn.Parameter]]) -> Iterator[TensorShard]:
        for name, p in parameters:
            parameter_id = self.zero_optimizer.get_param_id(p)
            group, offset, partition_size = self.zero_optimizer.grad_position[parameter_id]
            flat_buffer = self.zero_optimizer.fp32_partitioned_groups_flat[group]
            start = p.ds_zero_partition_rank * partition_size
            # The partition of the last rank is padded.
            length = max(0, min(partition_size, p.ds_numel - start))
            yield self._shard(name, start, flat_buffer, offset, p.ds_tensor[:length])

    def _stage_0(self, parameters: list[tuple[str, nn.Parameter]]) -> Iterator[TensorShard]:
        fp32_weights = {id(p): p for _, p in parameters}
        if self.zero_optimizer is not self.torch_optimizer:  # fp16 and bf16
            groups = zip(
                self.zero_optimizer.fp16_groups, self.zero_optimizer.fp32_groups, strict=True
            )
            fp32_weights = {}
            for low_precision_group, fp32_group in groups:
                for low_precision, fp32 in zip(low_precision_group, fp32_group, strict=True):
                    fp32_weights[id(low_precision)] = fp32
        for name, p in parameters:
            yield self._shard(name, 0, fp32_weights[id(p)], 0, p.detach().view(-1))

    def check(self) -> None:
        """Compare the fp32 weights of all shards with the model's parameters.

        Call it when a run starts: it finds a wrong layout before anything is saved.

        Raises:
            ValueError: An option of DeepSpeed lays out its buffers in an unknown way.
        """
        if self.replicated:
            return
        for shard in self.shards:
            rounded = shard.weight.to(shard.model.device, shard.model.dtype)
            if not torch.equal(rounded, shard.model.detach()) and not rounded.isnan().any():
                raise ValueError(
                    f"the optimizer's copy of {shard.name} is not that parameter's; allowed with "
                    "--save and --load: options that do not move parameters around. Remove those "
                    "of zero_optimization in --deepspeed_config one by one"
                )

    def get(self, shard: TensorShard, state_key: str) -> Tensor:
        """Return a 1-D view of the fp32 weights or of a moment of a shard.

        Args:
            state_key: weight, or one of `moments`.
        """
        if state_key == "weight":
            return shard.weight
        moment = self.torch_optimizer.state[shard.flat_buffer][state_key].view(-1)
        return moment[shard.offset : shard.offset + shard.length]

    @property
    def moments(self) -> tuple[str, ...]:
        """Keys of the optimizer's state that have the shape of the parameter."""
        return self.torch_optimizer.moments

    @property
    def steps(self) -> int:
        """Number of optimizer steps that were taken; 0 as long as there are no moments."""
        counts = set()
        for buffer in self._flat_buffers():
            state = self.torch_optimizer.state.get(buffer)
            if state:
                counts.add(int(state["step"]))
        assert len(counts) <= 1, f"the optimizer's groups have taken {counts} steps"
        if not counts:
            return 0
        return counts.pop()

    def initialize_moments(self, steps: int) -> None:
        """Give every parameter zero moments, to be filled, and a step count."""
        for buffer in self._flat_buffers():
            # One tensor each: if groups shared the tensor, as after ZeRO 3's universal
            # checkpoint, every group would advance it in each step.
            state = {"step": torch.tensor(float(steps), device=buffer.device)}
            for key in self.moments:
                state[key] = torch.zeros_like(buffer)
            self.torch_optimizer.state[buffer] = state

    def _flat_buffers(self) -> list[Tensor]:
        if self.stage == 3:
            # ZeRO 3 passes its buffers to torch's optimizer one at a time, in each step.
            return self.zero_optimizer.fp32_partitioned_groups_flat
        buffers = []
        for group in self.torch_optimizer.param_groups:
            buffers += group["params"]
        return buffers

    def state_keys(self) -> tuple[str, ...]:
        """Return what there is to save of each shard: weights, and moments after the first step."""
        if self.steps:
            return ("weight", *self.moments)
        return ("weight",)

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of fp16's dynamic loss scale; empty in other precisions."""
        scaler = self._dynamic_loss_scaler()
        names = [name for name in _LOSS_SCALER_FIELDS if hasattr(scaler, name)]
        return {name: getattr(scaler, name) for name in names}

    def set_loss_scaler_state(self, state: dict[str, float]) -> None:
        """Restore the state of the dynamic loss scale, if this run also has one."""
        scaler = self._dynamic_loss_scaler()
        if scaler is None:
            return
        for name in _LOSS_SCALER_FIELDS:
            if name in state:
                setattr(scaler, name, state[name])

    def _dynamic_loss_scaler(self) -> Any:
        """Return the object with the loss scale's fields; None if there is no dynamic loss scale.

        Only ZeRO has one: fp16 is refused at stage 0.
        """
        scaler = getattr(self.zero_optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


def fill_weights(
    model: nn.Module,
    layout: GlobalLayout,
    read: Callable[[str, int, int], Tensor],
    buffer: Callable[[str], Tensor],
) -> None:
    """Fill a finished model, before the engine is built, with this rank's part of the weights.

    Args:
        read: Returns a 1-D range of a flattened full weight, by (name, start, length).
        buffer: Returns a buffer by name.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = read(name, layout.global_offset[name], p.numel())
            p.copy_(values.view(p.shape))
        state = model.state_dict()
        for name in layout.buffers:
            state[name].copy_(buffer(name))
