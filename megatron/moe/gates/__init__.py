"""Gates: one paper, one file. Writing a subclass of `Gate` with `name=` in a file of this folder is all it takes.

    class MyGate(Gate, name="mine"):
        @dataclass(frozen=True)
        class Config: ...           # fields are flags (--topk); the line under a field is its help
        def forward(self, inp: GateInput) -> Routing: ...

A gate may not communicate, apply capacity, multiply expert outputs, log, or read flags, and its forward changes no
state: activation recompute runs it twice. State that outlives a step is an fp32 buffer that `after_step` updates.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.moe.routing import SCOPES, GateInput, Routing, StepTotals

_registry: dict[str, type[Gate]] = {}


@dataclass(frozen=True)
class Place:
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


def require_field(config: Any, name: str, ok: bool, allowed: str) -> None:
    """Raise ValueError for an option of a gate's Config: its flag, its value, what is allowed."""
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)!r}; allowed: {allowed}")


@dataclass(frozen=True)
class ScopeConfig:
    """The option of gates with a balance loss: a base of their Config."""

    balance_scope: str = field(default="micro-batch", metadata={"choices": SCOPES})
    """whose tokens the balance loss counts: each rank's micro-batch, each sequence, or those of all ranks and of the
    step's micro-batches so far"""

    def __post_init__(self):
        if self.balance_scope not in SCOPES:
            raise ValueError(f"--moe-balance-scope is {self.balance_scope!r}; allowed: {' '.join(SCOPES)}")


@dataclass(frozen=True)
class LossConfig(ScopeConfig):
    """Options of gates with a balance loss and a z-loss with coefficients: a base of their Config."""

    loss_coeff: float = 0.01
    """coefficient of the balance loss"""
    z_loss_coeff: float = 0.0
    """coefficient of the z-loss"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("loss_coeff", "z_loss_coeff"):
            if getattr(self, name) < 0:
                raise ValueError(f"--moe-{name.replace('_', '-')} is {getattr(self, name)}; allowed: 0 or more")


def check_topk(topk: int, limit: int, *, what: str = "the number of experts", least: int = 1) -> None:
    """Raise ValueError unless `topk` is in [least, limit]."""
    if not least <= topk <= limit:
        raise ValueError(f"--topk is {topk}; allowed: {least} to {what}, which is {limit}")


def check_norm(config: Any, num_experts: int, **one_each: float) -> None:
    """Raise ValueError where norm_topk_prob would make all weights the same and leave the router without gradient.

    A single expert in all is no mistake: nothing is chosen, nothing is to be learnt.

    Args:
        one_each: options with the values at which every token has one expert; topk=1 if not said.
    """
    for name, value in (one_each or {"topk": 1}).items():
        if config.norm_topk_prob and getattr(config, name) == value and num_experts > 1:
            raise ValueError(f"--norm-topk-prob is on with --{name} {value}: every weight would be the same and the "
                             f"router would get no gradient; add --no-norm-topk-prob or choose a larger --{name}")


@dataclass(frozen=True)
class GroupConfig(LossConfig):
    """Options of top-k gates whose experts stand in groups (DeepSeek): a base of their Config."""

    topk: int = 2
    """experts per token"""
    n_group: int = 1
    """equal groups of neighbouring experts, on a device or node each"""
    topk_group: int = 1
    """groups that a token's experts may lie in"""
    norm_topk_prob: bool = False
    """divide the chosen scores by their sum"""

    def __post_init__(self):
        super().__post_init__()
        for name, limit, allowed in (("topk", math.inf, "1 to the number of experts"),
                                     ("n_group", math.inf, "a positive divisor of the number of experts"),
                                     ("topk_group", self.n_group, f"1 to --n-group, which is {self.n_group}")):
            require_field(self, name, 1 <= getattr(self, name) <= limit, allowed)

    def check(self, num_experts: int) -> None:
        if num_experts % self.n_group:
            raise ValueError(f"--n-group is {self.n_group}; allowed: a divisor of the number of experts, which is "
                             f"{num_experts}")
        check_topk(self.topk, self.topk_group * (num_experts // self.n_group),
                   what="the number of experts in --topk-group groups")
        check_norm(self, num_experts)


def in_best_groups(score_TE: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """The scores in the `topk_group` groups whose `best` highest scores have the largest sum, -inf elsewhere.

    Not 0: a score may be negative, or have underflowed to 0.
    """
    score_TGm = score_TE.unflatten(-1, (n_group, score_TE.shape[-1] // n_group))
    highest_TGb = score_TGm.topk(min(best, score_TGm.shape[-1]), dim=-1).values
    group_Tg = highest_TGb.sum(-1).topk(topk_group, dim=-1).indices
    closed_TG = torch.ones_like(score_TGm[..., 0], dtype=torch.bool).scatter(-1, group_Tg, False)
    return score_TGm.masked_fill(closed_TG[..., None], float("-inf")).flatten(-2)


class Gate(nn.Module):
    """Base of all gates. Parameters and buffers stay fp32 whatever the engine casts the rest of the model to."""

    initialises_itself: ClassVar[bool] = True
    sees_other_tokens: ClassVar[bool] = False
    """whether a token's experts depend on the other tokens of its rank's micro-batch"""
    neurons: ClassVar[bool] = False
    """whether its experts are PEER's neurons in tables instead of grouped MLPs; then it has `output_gain(width)`"""
    name: ClassVar[str]
    Config: ClassVar[type]
    local_paths: nn.ModuleList
    """experts [n, D] -> [n, D] that run on the token's own rank (MoE++), never dispatched. Those that return zeros come
    last and have an attribute `returns_zero = True`: they are counted and do nothing"""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"gate name {name!r} is taken by {known.__module__}.{known.__qualname__}; "
                             f"rename the one in {cls.__module__}")
        cls.name = name
        _registry[name] = cls

    def __init__(self, config: Any, place: Place):
        super().__init__()
        self.config, self.place = config, place
        self.num_experts = place.num_experts
        self.local_paths = nn.ModuleList()

    def forward(self, inp: GateInput) -> Routing:
        """Choose experts for every token; see `megatron.moe.routing.Routing`."""
        raise NotImplementedError(f"gate {type(self).__name__} has no forward")

    def post_step(self, load_E: Tensor, num_tokens: Tensor) -> None:
        """Called once per optimizer step in training.

        Args:
            load_E: fp32 [E], wanted assignments per expert of this layer, summed over data ranks and micro-batches.
            num_tokens: 0-d fp32, tokens behind them.
        """

    def after_step(self, step: StepTotals) -> None:
        """As `post_step`, with all that was counted: the gate's own sums, and the loads of the other mixture layers."""
        self.post_step(step.load_E, step.num_tokens)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """Metrics, with units in their names, from the sums of a log interval over ranks (`Routing.sums`)."""
        return {}

    def capacities(self, num_tokens: int, factor: float, minimum: int) -> list[int] | None:
        """Rows each choice takes, local paths included, when there is a limit; None: the rule of all gates."""
        return None

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> tuple[int, int]:
        """(fewest, most) routed experts a token may use: what the model's active size is computed from."""
        topk = getattr(config, "topk", 0) or num_experts
        return min(topk, num_experts), min(topk, num_experts)

    def make_router(self, rows: int | None = None, generator: torch.Generator | None = None) -> nn.Linear:
        """A bias-free [rows, D] router, one row per expert unless said otherwise, drawn from N(0, init_std^2)."""
        return make_linear(self.place.hidden_size, self.num_experts if rows is None else rows, self.place.init_std,
                           self.place.generator() if generator is None else generator)


def make_linear(columns: int, rows: int, std: float, generator: torch.Generator) -> nn.Linear:
    """A bias-free [rows, columns] linear layer drawn from N(0, std^2)."""
    linear = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(linear.weight, std=std, generator=generator)
    return linear


def linear_fp32(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """x W^T in fp32 even under autocast: bf16 logits would tie experts that differ."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), linear.weight.float())


def moments(rows_TN: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 sums over tokens of fp32 values and of their squares, so exact that the variance can be had from them.

    Without an fp64 copy of the rows: squared in fp32 is what is left of them without their mean.
    """
    number, total_N = len(rows_TN), rows_TN.sum(0, dtype=torch.float64)
    mean_N = (total_N / max(1, number)).float()
    square_N = (rows_TN - mean_N).square().sum(0, dtype=torch.float64)
    return total_N, square_N + mean_N.double() * (2 * total_N - number * mean_N.double())


def shares(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores, softmax or sigmoid of the logits, divided by their sum.

    For sigmoid as softmax(log sigmoid(z)), which is the same, also where the scores themselves underflow to 0.
    """
    return (logits_TE if score_function == "softmax" else F.logsigmoid(logits_TE)).softmax(-1)


def top_scores(logits_TE: Tensor, k: int, score_function: str, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [T, k] of the k best experts, with `norm` divided by their sum; the experts; the shares of all [T, E]).

    The best by logit, which orders experts as scores do and does not saturate.
    """
    logit_Tk, expert_Tk = logits_TE.topk(k, dim=-1)
    shares_TE = shares(logits_TE, score_function)
    if norm:
        score_Tk = shares(logit_Tk, score_function)
    else:
        score_Tk = shares_TE.gather(-1, expert_Tk) if score_function == "softmax" else logit_Tk.sigmoid()
    return score_Tk, expert_Tk, shares_TE


def available() -> list[str]:
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


def config_of(name: str) -> type:
    """The Config class of gate `name`: its fields are the gate's options and flags."""
    return gate_class(name).Config


def create(name: str, *, hidden_size: int, num_experts: int, layer: int = 0, num_moe_layers: int = 1,
           vocab_size: int | None = None, seed: int = 0, init_std: float = 0.02, **options: Any) -> Gate:
    """Build a gate: the one constructor of the model, the tests and a researcher at a prompt.

    Args:
        options: fields of that gate's Config.
    Raises:
        ValueError: unknown gate or option (the known ones are listed), or a value the gate's Config refuses.
    """
    cls = gate_class(name)
    own = cls.Config.__dict__.get("__annotations__", {})
    known = sorted((f.name for f in dataclasses.fields(cls.Config)), key=lambda name: name not in own)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"gate {name!r} has no option {unknown[0]!r}; allowed: {' '.join(known)}")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; a gate needs at least 1 expert")
    place = Place(hidden_size, num_experts, layer, num_moe_layers, vocab_size, seed, init_std)
    config = cls.Config(**options)
    check = getattr(config, "check", None)  # what can only be checked against the number of experts
    if check is not None:
        check(num_experts)
    return cls(config, place)


def _discover() -> None:
    """Import every file of this folder once; each registers its gates."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
