"""The base class of gates, and their constructor.

A gate is one paper in one file, of `megatron/moe/gates/` or outside the tree
(`gate_registry.py`). A subclass of `Gate` with `name=` registers itself:

    class MyGate(Gate, name="mine"):
        @dataclass(frozen=True)
        class Config: ...  # fields become flags; the string under a field is its help
        def forward(self, inp: GateInput) -> Routing: ...

A gate may not communicate, apply capacity, multiply expert outputs, log (except by
`warn_once`), or read flags.
Its forward changes no state, because activation recomputation runs it twice, and takes
the same discrete decisions both times (`megatron.moe.decisions`). State that outlives a
step is an fp32 buffer, which `post_optimizer_step` updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.log import warn_on_rank0
from megatron.moe.decisions import DecisionRecorder, DecisionRepeater
from megatron.moe.gate_functional import make_linear
from megatron.moe.gate_registry import REGISTRY
from megatron.moe.losses import simbal_loss
from megatron.moe.routing import GateInput, Routing, StepTotals


@dataclass(frozen=True)
class GateContext:
    """Model sizes and the gate's position in the model; the same for all gates."""

    hidden_size: int
    num_experts: int
    layer: int = 0
    """index of this MoE layer among the MoE layers, whatever their gates"""
    num_moe_layers: int = 1
    """number of MoE layers of the model, whatever their gates"""
    vocab_size: int | None = None
    seed: int = 0
    init_std: float = 0.02
    """standard deviation of router weights"""
    gate_layer: int = 0
    """index of this MoE layer among those that have the same gate; its carry comes from the
    layer before in that order"""

    def generator(self) -> torch.Generator:
        """Return a generator seeded by (seed, layer): all ranks draw the same."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.layer) % 2**63)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of a gate that have an optimizer group of their own.

    Raises:
        ValueError: a factor is not positive, a weight decay is negative, or one of them
            is not finite.
    """

    params: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    """factor of the learning rate of each step"""
    weight_decay: float = 0.0
    """AdamW's weight decay; --weight-decay does not apply to gates"""

    def __post_init__(self):
        if not 0 < self.lr_scale < math.inf:
            raise ValueError(
                f"lr_scale of a gate's parameter group is {self.lr_scale}; allowed: a positive "
                "number. Freeze parameters with requires_grad_(False)"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay of a gate's parameter group is {self.weight_decay}; allowed: 0 "
                "or more"
            )


class Gate(nn.Module):
    """Base class of all gates.

    Parameters and buffers stay fp32, whatever dtype the model is cast to: rounded to
    bf16, the logits of different experts are often equal, and a bias cannot be updated.
    """

    initialises_itself: ClassVar[bool] = True
    """the constructor draws the initial weights, so the model's initialisation skips
    them"""
    sees_other_tokens: ClassVar[bool] = False
    """a token's experts depend on the other tokens of its rank's micro-batch"""
    surrogate_gradients: ClassVar[bool] = False
    """the weights' gradients are not their derivatives (straight-through estimators)"""
    stochastic: ClassVar[bool] = False
    """forward draws random numbers from torch's default generator in training (never in
    evaluation). Its state differs between ranks and is part of checkpoints, and
    recomputation repeats the numbers; tests of the gate seed it"""
    expert_kind: ClassVar[str] = "grouped"
    """"grouped": stacked MLPs that run as grouped matrix products; "peer": PEER's
    tables of tiny experts, for which the gate has `output_gain(width)`"""
    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """Options of a gate; their fields become flags. This gate has none."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        REGISTRY.register(name, cls)
        cls.name = name

    def __init__(self, config: Any, context: GateContext):
        super().__init__()
        self.config = config
        self.context = context
        self.num_experts = context.num_experts
        self._has_warned = context.gate_layer > 0
        self._decisions: DecisionRecorder | DecisionRepeater | None = None
        self.zero_computation_experts = nn.ModuleList()

    @property
    def zero_computation_experts(self) -> nn.ModuleList:
        """Experts [n, D] -> [n, D] that run on the token's own rank (MoE++).

        Those that return zeros come last and have an attribute `is_zero = True`: they
        are counted, but no rows are made for them.
        """
        return self.local_paths

    def __setattr__(self, name: str, value: Any) -> None:
        # Checkpoints store these modules under the name `local_paths`.
        if name == "zero_computation_experts":
            name = "local_paths"
        super().__setattr__(name, value)

    @property
    def has_state(self) -> bool:
        """Whether `post_optimizer_step` has something to update."""
        return type(self).post_optimizer_step is not Gate.post_optimizer_step

    @property
    def is_frozen(self) -> bool:
        """Whether the gate has parameters and none of them is trained.

        Its state is then left as it is, too.
        """
        trained = [p.requires_grad for p in self.parameters()]
        return bool(trained) and not any(trained)

    def __call__(self, inp: GateInput) -> Routing:
        """Run `forward` on the tokens that are not padding.

        Padding gets no assignment, and no loss, metric or state counts it.
        """
        unpadded = inp.without_padding()
        routing = super().__call__(unpadded)
        if not isinstance(routing, Routing):
            raise TypeError(
                f"{type(self).__qualname__}.forward returned {type(routing).__name__}; allowed: "
                "megatron.moe.Routing"
            )
        routing = self._with_simbal_loss(routing)
        if unpadded is inp:
            return routing
        return routing.with_padding(unpadded.unpadded_R)

    def _with_simbal_loss(self, routing: Routing) -> Routing:
        """Add the loss of the router's weights, with the option simbal_coeff."""
        coeff = getattr(self.config, "simbal_coeff", 0.0)
        if not coeff:
            return routing
        aux_loss = routing.aux_loss + coeff * simbal_loss(self.router.weight)
        return dataclasses.replace(routing, aux_loss=aux_loss)

    def forward(self, inp: GateInput) -> Routing:
        """Choose experts for every token; see `megatron.moe.routing.Routing`.

        Args:
            inp: has no padding, see `__call__`.
        """
        raise NotImplementedError(f"gate {type(self).__name__} has no forward")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return groups of parameters with a learning rate or weight decay of their own.

        The others have the learning rate of the run and no weight decay. Groups with the
        same values are one group of the optimizer, over all layers.
        """
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Apply what moves or casts a module, but no cast to a narrower dtype than fp32."""

        def apply_without_rounding(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_rounded = moved.dtype in (torch.bfloat16, torch.float16)
            if is_rounded and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(apply_without_rounding, recurse)

    def post_optimizer_step(self, step: StepTotals) -> None:
        """Update the gate's state; called once after each optimizer step.

        Args:
            step: loads, tokens and the gate's own sums, over all ranks and
                micro-batches.
        """

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """Compute metrics, with units in their names, from sums of a logging interval.

        Args:
            sums: `Routing.metric_sums`, summed over ranks and forward passes.
        """
        return {}

    def state_metrics(self) -> dict[str, Tensor]:
        """Return the state to log: buffers that `post_optimizer_step` updates, by name.

        The log has their values at the end of an interval: a 0-d tensor as it is, and of
        another one `<name>_min`, `_max`, `_mean` and `_std` (over its elements, divided by
        their number).
        """
        return {}

    def capacities(self, num_tokens: int, factor: float, minimum: int) -> list[int] | None:
        """Return the rows that each choice accepts under a capacity factor.

        Choices are the routed experts and the zero-computation experts. None means the
        common rule: the same capacity for all routed experts, no limit for the others.
        """
        return None

    def capacity_k(self) -> int:
        """Return the k of the common capacity, factor * k * T / E rows per expert.

        It is the number of experts per token that fit at factor 1.0 when the load is even:
        by default the option `topk`, or 1 for a gate without one or where it is 0 (no
        limit). A gate whose number of experts per token follows from the tokens returns 1.
        """
        return getattr(self.config, "topk", 0) or 1

    @contextmanager
    def use_decisions(self, decisions: DecisionRecorder | DecisionRepeater) -> Iterator[None]:
        """Record or repeat the discrete decisions of a forward pass that runs inside.

        The MoE layer calls this under activation recomputation, see
        `megatron.moe.decisions`.
        """
        self._decisions = decisions
        try:
            with decisions:
                yield
        finally:
            self._decisions = None

    def decide(self, function: Callable, *args: Any) -> Any:
        """Return function(*args), computed without gradients, as one decision.

        Under activation recomputation the function is called in the first forward pass
        only. A gate needs this only for decisions that take many operations, such as
        those of an iteration or the counts of a histogram: each operation that decides
        something is otherwise recorded by itself. The outputs are tensors, or a dict of
        them.
        """
        if self._decisions is not None:
            return self._decisions.decide(function, *args)
        with torch.no_grad():
            return function(*args)

    def warn_once(self, message: str) -> None:
        """Log a warning on rank 0 for what every rank and every MoE layer notices.

        Only the first call of the first layer with this gate logs.
        """
        if not self._has_warned:
            self._has_warned = True
            warn_on_rank0("%s", message)

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> tuple[int, int]:
        """Return the fewest and the most routed experts that a token may use.

        The number of active parameters is computed from them.
        """
        topk = getattr(config, "topk", 0) or num_experts
        return min(topk, num_experts), min(topk, num_experts)

    def make_router(
        self,
        rows: int | None = None,
        generator: torch.Generator | None = None,
        *,
        bias: bool = False,
    ) -> nn.Linear:
        """Return a [rows, D] router drawn from N(0, init_std^2).

        Args:
            rows: default: one per routed expert.
            generator: default: the context's.
            bias: add a learned vector to the logits, which is 0 at the start.
        """
        if rows is None:
            rows = self.num_experts
        if generator is None:
            generator = self.context.generator()
        c = self.context
        return make_linear(c.hidden_size, rows, c.init_std, generator, bias=bias)


def available_gates() -> list[str]:
    """Return the names of all gates that can be chosen, sorted."""
    return REGISTRY.available()


def gate_class(name: str) -> type[Gate]:
    """Return the class registered as `name`.

    Raises:
        ValueError: no such gate; the message lists the known ones.
    """
    return REGISTRY.find(name)


def gate_config_class(name: str) -> type:
    """Return the Config class of gate `name`: its fields are the gate's options.

    Raises:
        ValueError: no such gate.
    """
    return gate_class(name).Config


def create_gate(
    name: str,
    *,
    hidden_size: int,
    num_experts: int,
    layer: int = 0,
    num_moe_layers: int = 1,
    vocab_size: int | None = None,
    seed: int = 0,
    init_std: float = 0.02,
    gate_layer: int | None = None,
    **options: Any,
) -> Gate:
    """Build a gate: the one constructor for models, tests and interactive sessions.

    Args:
        name: registered name, see `available_gates`.
        layer: index of the MoE layer among the model's `num_moe_layers` MoE layers.
        vocab_size: number of token ids, for gates that route by token id.
        seed: seed of the router's initial weights.
        init_std: standard deviation of router weights.
        gate_layer: index among the MoE layers that have this gate; None: `layer`, as in a
            model with one gate.
        options: fields of the gate's Config.
    Raises:
        ValueError: unknown gate or option (the message lists the known ones), or a
            value that the gate's Config refuses.
    """
    cls = gate_class(name)
    _check_options(name, cls.Config, options)
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a gate needs at least 1 expert")
    config = cls.Config(**options)
    # A Config may also check its options against the number of experts.
    if hasattr(config, "check"):
        config.check(num_experts)
    if gate_layer is None:
        gate_layer = layer
    context = GateContext(
        hidden_size, num_experts, layer, num_moe_layers, vocab_size, seed, init_std, gate_layer
    )
    return cls(config, context)


def _check_options(name: str, config_class: type, options: dict[str, Any]) -> None:
    """Raise ValueError for an unknown option, listing the gate's own options first."""
    own = config_class.__dict__.get("__annotations__", {})
    known = [f.name for f in dataclasses.fields(config_class)]
    known.sort(key=lambda option: option not in own)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"gate {name!r} has no option {unknown[0]!r}; allowed: {' '.join(known)}"
        )
