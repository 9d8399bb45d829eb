"""The base class of gates, and their registry.

A gate is one paper in one file of `megatron/moe/gates/`. A subclass of `Gate` with `name=` registers itself:

    class MyGate(Gate, name="mine"):
        @dataclass(frozen=True)
        class Config: ...           # fields become flags (--topk); the string under a field is its help
        def forward(self, inp: GateInput) -> Routing: ...

A gate may not communicate, apply capacity, multiply expert outputs, log, or read flags. Its forward changes no
state, because activation recomputation runs it twice. State that outlives a step is an fp32 buffer, which
`post_optimizer_step` updates.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.moe import gates
from megatron.moe.gate_functional import make_linear
from megatron.moe.routing import GateInput, Routing, StepTotals

_registry: dict[str, type[Gate]] = {}


@dataclass(frozen=True)
class GateContext:
    """Where a gate stands: sizes, and which mixture layer of how many. The same for every gate."""

    hidden_size: int
    num_experts: int
    layer: int = 0
    """number of this mixture layer, from 0"""
    num_moe_layers: int = 1
    vocab_size: int | None = None
    seed: int = 0
    init_std: float = 0.02

    def generator(self) -> torch.Generator:
        """Random numbers that depend on (seed, layer) only, so that every rank draws the same."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.layer) % 2**63)


class Gate(nn.Module):
    """Base of all gates. Parameters and buffers stay fp32 whatever the engine casts the rest of the model to."""

    initialises_itself: ClassVar[bool] = True
    sees_other_tokens: ClassVar[bool] = False
    """whether a token's experts depend on the other tokens of its rank's micro-batch"""
    expert_kind: ClassVar[str] = "grouped"
    """"grouped": stacked MLPs that run as grouped matrix products; "peer": PEER's tables of tiny experts, for
    which the gate has `output_gain(width)`"""
    name: ClassVar[str]
    Config: ClassVar[type]

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"gate name {name!r} is taken by {known.__module__}.{known.__qualname__}; "
                f"rename the one in {cls.__module__}"
            )
        cls.name = name
        _registry[name] = cls

    def __init__(self, config: Any, context: GateContext):
        super().__init__()
        self.config, self.context = config, context
        self.num_experts = context.num_experts
        self.zero_computation_experts = nn.ModuleList()

    @property
    def zero_computation_experts(self) -> nn.ModuleList:
        """Experts [n, D] -> [n, D] that run on the token's own rank and are never dispatched (MoE++).

        Those that return zeros come last and have an attribute `is_zero = True`: they are counted, but no rows
        are made for them.
        """
        return self.local_paths

    def __setattr__(self, name: str, value: Any) -> None:
        # Checkpoints know these modules as `local_paths`.
        super().__setattr__(
            "local_paths" if name == "zero_computation_experts" else name, value
        )

    def forward(self, inp: GateInput) -> Routing:
        """Choose experts for every token; see `megatron.moe.routing.Routing`."""
        raise NotImplementedError(f"gate {type(self).__name__} has no forward")

    def post_optimizer_step(self, step: StepTotals) -> None:
        """Update the gate's state from what an optimizer step counted. Called once per step in training.

        Args:
            step: loads, tokens and the gate's own sums, over all ranks and micro-batches of the step.
        """

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """Metrics, with units in their names, from the sums of a log interval over ranks (`Routing.metric_sums`)."""
        return {}

    def capacities(self, num_tokens: int, factor: float, minimum: int) -> list[int] | None:
        """Rows each choice takes, local paths included, when there is a limit; None: the rule of all gates."""
        return None

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> tuple[int, int]:
        """(fewest, most) routed experts a token may use: what the model's active size is computed from."""
        topk = getattr(config, "topk", 0) or num_experts
        return min(topk, num_experts), min(topk, num_experts)

    def make_router(
        self, rows: int | None = None, generator: torch.Generator | None = None
    ) -> nn.Linear:
        """A bias-free [rows, D] router, one row per expert unless said otherwise, drawn from N(0, init_std^2)."""
        return make_linear(
            self.context.hidden_size,
            self.num_experts if rows is None else rows,
            self.context.init_std,
            self.context.generator() if generator is None else generator,
        )


def available_gates() -> list[str]:
    """Names of all gates, sorted."""
    _discover()
    return sorted(_registry)


def gate_class(name: str) -> type[Gate]:
    """The class registered as `name`.

    Raises:
        ValueError: no such gate; the message lists the known ones.
    """
    _discover()
    if name not in _registry:
        raise ValueError(f"--gate is {name!r}; allowed: {' '.join(sorted(_registry))}")
    return _registry[name]


def gate_config_class(name: str) -> type:
    """The Config class of gate `name`: its fields are the gate's options and flags."""
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
    **options: Any,
) -> Gate:
    """Build a gate: the one constructor of the model, the tests and a researcher at a prompt.

    Args:
        options: fields of that gate's Config.
    Raises:
        ValueError: unknown gate or option (the known ones are listed), or a value the gate's Config refuses.
    """
    cls = gate_class(name)
    own = cls.Config.__dict__.get("__annotations__", {})
    known = sorted(
        (f.name for f in dataclasses.fields(cls.Config)), key=lambda name: name not in own
    )
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"gate {name!r} has no option {unknown[0]!r}; allowed: {' '.join(known)}"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a gate needs at least 1 expert")
    context = GateContext(
        hidden_size, num_experts, layer, num_moe_layers, vocab_size, seed, init_std
    )
    config = cls.Config(**options)
    check = getattr(
        config, "check", None
    )  # what can only be checked against the number of experts
    if check is not None:
        check(num_experts)
    return cls(config, context)


def _discover() -> None:
    """Import every file of this folder once; each registers its gates."""
    for module in pkgutil.iter_modules(gates.__path__):
        importlib.import_module(f"{gates.__name__}.{module.name}")
