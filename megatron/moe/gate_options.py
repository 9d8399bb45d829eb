"""Options that several gates share, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatron.moe.routing import SCOPES


def require_field(config: Any, name: str, ok: bool, allowed: str) -> None:
    """Raise ValueError for an option of a gate's Config: its flag, its value, what is allowed."""
    if not ok:
        raise ValueError(
            f"--{name.replace('_', '-')} is {getattr(config, name)!r}; allowed: {allowed}"
        )


@dataclass(frozen=True)
class ScopeConfig:
    """The option of gates with a balance loss: a base of their Config."""

    balance_scope: str = field(default="micro-batch", metadata={"choices": SCOPES})
    """whose tokens the balance loss counts: each rank's micro-batch, each sequence, or those of all ranks and of the
    step's micro-batches so far"""

    def __post_init__(self):
        if self.balance_scope not in SCOPES:
            raise ValueError(
                f"--moe-balance-scope is {self.balance_scope!r}; allowed: {' '.join(SCOPES)}"
            )


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
                raise ValueError(
                    f"--moe-{name.replace('_', '-')} is {getattr(self, name)}; allowed: 0 or more"
                )


def check_topk(
    topk: int, limit: int, *, what: str = "the number of experts", least: int = 1
) -> None:
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
            raise ValueError(
                f"--norm-topk-prob is on with --{name} {value}: every weight would be the same and the "
                f"router would get no gradient; add --no-norm-topk-prob or choose a larger --{name}"
            )


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
        for name, limit, allowed in (
            ("topk", math.inf, "1 to the number of experts"),
            ("n_group", math.inf, "a positive divisor of the number of experts"),
            ("topk_group", self.n_group, f"1 to --n-group, which is {self.n_group}"),
        ):
            require_field(self, name, 1 <= getattr(self, name) <= limit, allowed)

    def check(self, num_experts: int) -> None:
        if num_experts % self.n_group:
            raise ValueError(
                f"--n-group is {self.n_group}; allowed: a divisor of the number of experts, which is "
                f"{num_experts}"
            )
        check_topk(
            self.topk,
            self.topk_group * (num_experts // self.n_group),
            what="the number of experts in --topk-group groups",
        )
        check_norm(self, num_experts)
