"""Which part of every tensor this rank's optimizer holds, whatever ZeRO stage holds it (DeepSpeed 0.19.8).

ZeRO 1 and 2 flatten the parameters of a group into one buffer and give each rank a contiguous share of it; ZeRO 3 gives
each rank a contiguous share of every parameter; stage 0 gives everything to every rank. So a rank's part of a parameter
is always one range of the flattened parameter, and with sharded experts (consecutive ones on a rank) one range of the
flattened stack of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.schema import require
from megatron.engine.optimizer import MOMENTS
from megatron.moe.metrics import moe_layers
from megatron.parallel.groups import Groups

STATE_KEYS = ("weight", *MOMENTS)
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class GlobalLayout:
    """Whole shapes of a model's tensors. To be made of a finished model, before the engine gets it.

    Attributes:
        shapes: of all trained parameters, with all experts.
        first: the element of the whole tensor at which this rank's parameter starts: not 0 for sharded experts.
        buffers: names of the buffers that are part of the model's state, alike on all ranks.
    """

    shapes: dict[str, tuple[int, ...]]
    first: dict[str, int]
    buffers: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, groups: Groups) -> GlobalLayout:
        experts = {id(p) for layer in moe_layers(model) for p in layer.experts.parameters()}
        shapes, first = {}, {}
        for name, p in model.named_parameters():
            assert p.requires_grad, (
                f"{name} is not trained; checkpoints know trained parameters and buffers"
            )
            sharded = id(p) in experts
            shapes[name] = (
                (p.shape[0] * groups.ep_size, *p.shape[1:]) if sharded else tuple(p.shape)
            )
            first[name] = groups.ep_rank * p.numel() if sharded else 0
        parameters = set(shapes)
        return GlobalLayout(
            shapes, first, tuple(n for n in model.state_dict() if n not in parameters)
        )


@dataclass(frozen=True)
class TensorShard:
    """A contiguous range of a flattened parameter, of which this rank's optimizer has the fp32 copy and the moments."""

    name: str
    start: int
    """its first element in the whole tensor"""
    weight: Tensor
    """1-D view of the fp32 copy, which loading may write to"""
    owner: Tensor
    """the tensor that torch's optimizer knows: `weight` is a part of it"""
    offset: int
    """where in the flattened `owner`"""
    model: Tensor
    """1-D view of the same range of what the forward pass uses, in its dtype"""

    @property
    def length(self) -> int:
        return self.weight.numel()


class ZeroShards:
    """The optimizer's state on this rank, by piece.

    Args:
        engine: DeepSpeed's.
        layout: of its model.

    Raises:
        ValueError: the optimizer's state is on NVMe, which this cannot read.
    """

    def __init__(self, engine: Any, layout: GlobalLayout):
        self.zero, self.stage = engine.optimizer, engine.zero_optimization_stage()
        # At stage 0 in fp32 DeepSpeed uses torch's optimizer as it is.
        self.torch = (
            self.zero if isinstance(self.zero, torch.optim.Optimizer) else self.zero.optimizer
        )
        require(
            not getattr(self.zero, "swap_optimizer", False),
            "offload_optimizer.device",
            "nvme",
            "none or cpu, with --save and --load",
            "Change it in the file of --deepspeed_config.",
        )
        # DeepSpeed 0.19.8 then says wrongly where in its buffer a parameter is.
        require(
            not getattr(self.zero, "round_robin_gradients", False),
            "zero_optimization.round_robin_gradients",
            True,
            "false, with --save and --load",
            "Change it in the file of --deepspeed_config.",
        )
        self.replicated = self.stage == 0
        named = [(n, p) for n, p in engine.module.named_parameters() if n in layout.shapes]
        find = (
            self._stage_3 if self.stage == 3 else self._flattened if self.stage else self._whole
        )
        self.pieces = [
            TensorShard(name, layout.first[name] + start, weight, owner, offset, model)
            for name, start, weight, owner, offset, model in find(named)
            if weight.numel()
        ]

    def _flattened(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple]:
        for name, p in named:
            fragment = p._hp_mapping
            if fragment is not None:
                owner = self.torch.param_groups[fragment.param_group_index]["params"][0]
                offset, start = (
                    fragment.hp_fragment_address.start,
                    fragment.lp_fragment_address.start,
                )
                weight = owner.detach().view(-1)[
                    offset : offset + fragment.hp_fragment_address.numel
                ]
                yield (
                    name,
                    start,
                    weight,
                    owner,
                    offset,
                    p.detach().view(-1)[start : start + weight.numel()],
                )

    def _stage_3(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple]:
        for name, p in named:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(p)]
            owner = self.zero.fp32_partitioned_groups_flat[group]
            start = p.ds_zero_partition_rank * size
            size = max(0, min(size, p.ds_numel - start))  # the last rank's share is padded
            yield (
                name,
                start,
                owner.detach().view(-1)[offset : offset + size],
                owner,
                offset,
                p.ds_tensor[:size],
            )

    def _whole(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple]:
        owners = {id(p): p for _, p in named}
        if self.zero is not self.torch:  # fp16 and bf16
            owners = {
                id(low): high
                for lows, highs in zip(
                    self.zero.fp16_groups, self.zero.fp32_groups, strict=True
                )
                for low, high in zip(lows, highs, strict=True)
            }
        for name, p in named:
            yield (
                name,
                0,
                owners[id(p)].detach().view(-1),
                owners[id(p)],
                0,
                p.detach().view(-1),
            )

    def check(self) -> None:
        """Whether the pieces are what they are said to be, by their values: to be asked when a run begins.

        Raises:
            ValueError: an option of DeepSpeed's lays out its memory in another way than is known here.
        """
        for piece in () if self.replicated else self.pieces:
            low = piece.weight.to(piece.model.device, piece.model.dtype)
            if not torch.equal(low, piece.model.detach()) and not low.isnan().any():
                raise ValueError(
                    f"the optimizer's copy of {piece.name} is not that parameter's; allowed with --save "
                    "and --load: options that do not move parameters around. Remove those of "
                    "zero_optimization in --deepspeed_config one by one"
                )

    def moment(self, piece: TensorShard, kind: str) -> Tensor:
        """1-D view of a moment of a piece.

        Args:
            kind: exp_avg or exp_avg_sq.
        """
        return self.torch.state[piece.owner][kind].view(-1)[
            piece.offset : piece.offset + piece.length
        ]

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken; 0: there are no moments yet."""
        counts = {
            int(state["step"])
            for owner in self._owners()
            if (state := self.torch.state.get(owner))
        }
        assert len(counts) <= 1, f"the optimizer's groups have taken {counts} steps"
        return counts.pop() if counts else 0

    def start_moments(self, steps: int) -> None:
        """Give every parameter moments of zero, to be filled, and a count of steps of its own."""
        for owner in self._owners():
            # A tensor for each: ZeRO 3's universal checkpoint shares one, which then counts once for every group.
            self.torch.state[owner] = {
                "step": torch.tensor(float(steps), device=owner.device),
                **{kind: torch.zeros_like(owner) for kind in MOMENTS},
            }

    def _owners(self) -> list[Tensor]:
        if (
            self.stage == 3
        ):  # torch's optimizer gets to know them one after the other, in each step
            return self.zero.fp32_partitioned_groups_flat
        return [p for group in self.torch.param_groups for p in group["params"]]

    def kinds(self) -> tuple[str, ...]:
        """What there is to save of each piece."""
        return STATE_KEYS if self.steps else STATE_KEYS[:1]

    def get(self, piece: TensorShard, kind: str) -> Tensor:
        """1-D view of the fp32 weight or a moment of a piece."""
        return piece.weight if kind == "weight" else self.moment(piece, kind)

    def scaler(self) -> dict[str, float]:
        """State of fp16's dynamic loss scale; empty in other precisions."""
        scaler = self._dynamic_scaler()
        return {n: getattr(scaler, n) for n in SCALER if hasattr(scaler, n)}

    def set_scaler(self, state: dict[str, float]) -> None:
        """Restore what `scaler` returned, if this run has a dynamic loss scale, too."""
        scaler = self._dynamic_scaler()
        for name in SCALER:
            if scaler is not None and name in state:
                setattr(scaler, name, state[name])

    def _dynamic_scaler(self) -> Any:
        """ZeRO has an object for it, stage 0 keeps the numbers in its configuration."""
        scaler = getattr(self.zero, "loss_scaler", None) or getattr(
            self.zero, "loss_scale_config", None
        )
        dynamic = getattr(scaler, "dynamic", False) or getattr(
            scaler, "dynamic_loss_scale", False
        )
        return scaler if dynamic else None


def load_weights(model: nn.Module, layout: GlobalLayout, read: Any, buffer: Any) -> None:
    """Fill a finished model, which the engine has not got yet: its own experts, everything else whole.

    Args:
        read: (name, start, length) -> 1-D tensor; `Shards.read` of kind weight.
        buffer: name -> tensor.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, layout.first[name], p.numel()).view(p.shape))
        state = model.state_dict()
        for name in layout.buffers:
            state[name].copy_(buffer(name))
