"""Options that several gates share, and their checks.

An error names the option by its flag. The config classes here are bases of gates'
Configs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron.config.needs import Need, setting
from megatron.moe.routing import SCOPES


def require_field(config: Any, name: str, ok: bool, allowed: str) -> None:
    """Raise ValueError unless `ok`, naming the flag, its value and what is allowed."""
    if not ok:
        raise ValueError(
            f"--{name.replace('_', '-')} is {getattr(config, name)!r}; allowed: {allowed}"
        )


def require_choice(config: Any, name: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless an option has one of a few values."""
    choices = tuple(choices)
    require_field(config, name, getattr(config, name) in choices, " ".join(choices))


def no_effect(alternative: str) -> Need:
    """Return the need of an option that scripts set and the gate ignores.

    When it is set, the run continues without it and logs one warning.

    Args:
        alternative: what the option needs instead, for the warning.
    """
    return Need(rule=lambda values: False, text=alternative, resets=True)


@dataclass(frozen=True)
class GateOptions:
    """Base of the option classes, which a gate's Config combines by inheritance.

    Subclasses extend both methods and call those of `super()`.
    """

    def __post_init__(self):
        """Raise ValueError for a value that an option cannot have."""

    def check(self, num_experts: int) -> None:
        """Raise ValueError for options that do not fit the number of experts."""


@dataclass(frozen=True)
class SimBalConfig(GateOptions):
    """Option of gates whose attribute `router` is a linear layer; `Gate` adds the loss."""

    simbal_coeff: float = 0.0
    """coefficient of SimBal's loss, the sum of absolute values of W W^T - 1, which makes
    the rows of the router W orthogonal; 0: no such loss"""

    def __post_init__(self):
        super().__post_init__()
        require_field(self, "simbal_coeff", self.simbal_coeff >= 0, "0 or more")


@dataclass(frozen=True)
class ScopeConfig(GateOptions):
    """Option of gates with a balance loss."""

    balance_scope: str = field(default="micro-batch", metadata={"choices": SCOPES})
    """tokens over which the balance loss takes its loads: each rank's micro-batch, each
    sequence, or all ranks' tokens of the optimizer step so far (global-batch)"""

    def __post_init__(self):
        super().__post_init__()
        if self.balance_scope not in SCOPES:
            raise ValueError(
                f"--moe-balance-scope is {self.balance_scope!r}; allowed: {' '.join(SCOPES)}"
            )


@dataclass(frozen=True)
class LossConfig(ScopeConfig):
    """Options of gates with a balance loss and a z-loss."""

    loss_coeff: float = 0.01
    """coefficient of the balance loss"""
    z_loss_coeff: float = 0.0
    """coefficient of the z-loss"""
    balance_scope: str = field(
        default="micro-batch", metadata={"choices": SCOPES, "needs": setting("loss_coeff")}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("loss_coeff", "z_loss_coeff"):
            value = getattr(self, name)
            if value < 0:
                flag = f"--moe-{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {value}; allowed: 0 or more")


@dataclass(frozen=True)
class RouterLossConfig(SimBalConfig, LossConfig):
    """Options of gates with a linear router, a balance loss and a z-loss."""


def check_topk(
    topk: int, limit: int, *, what: str = "the number of experts", least: int = 1
) -> None:
    """Raise ValueError unless `topk` is in [least, limit].

    Args:
        what: description of the limit, for the message.
    """
    if not least <= topk <= limit:
        raise ValueError(f"--topk is {topk}; allowed: {least} to {what}, which is {limit}")


def check_norm(config: Any, num_experts: int, **single_expert_values: float) -> None:
    """Raise ValueError where norm_topk_prob would make all weights equal to 1.

    A router whose weights are constant gets no gradient. With a single expert in all
    this is no error, because there is nothing to learn.

    Args:
        single_expert_values: options with the values at which every token has one
            expert; topk=1 by default.
    """
    if not config.norm_topk_prob or num_experts <= 1:
        return
    for name, value in (single_expert_values or {"topk": 1}).items():
        if getattr(config, name) == value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--norm-topk-prob is on with {flag} {value}: every weight would be the same "
                "and the router would get no gradient; add --no-norm-topk-prob or choose a "
                f"larger {flag}"
            )


@dataclass(frozen=True)
class GroupConfig(LossConfig):
    """Options of top-k gates whose experts form groups (DeepSeek)."""

    topk: int = 2
    """experts per token"""
    n_group: int = 1
    """number of equal groups of consecutive experts; in DeepSeek each group is on one
    device or node"""
    topk_group: int = field(default=1, metadata={"needs": setting("n_group", above=1)})
    """groups from which a token's experts are selected"""
    group_score_best: int = field(
        default=1, metadata={"choices": (1, 2), "needs": setting("n_group", above=1)}
    )
    """score of a group: that of its best expert, or the sum of its 2 best (of 1, if it
    has one expert)"""
    norm_topk_prob: bool = False
    """divide the selected scores by their sum"""

    def __post_init__(self):
        super().__post_init__()
        require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
        require_field(
            self, "n_group", self.n_group >= 1, "a positive divisor of the number of experts"
        )
        require_field(
            self,
            "topk_group",
            1 <= self.topk_group <= self.n_group,
            f"1 to --n-group, which is {self.n_group}",
        )
        require_field(self, "group_score_best", self.group_score_best in (1, 2), "1 or 2")

    def check(self, num_experts: int) -> None:
        """Raise ValueError for options that do not fit the number of experts."""
        super().check(num_experts)
        if num_experts % self.n_group:
            raise ValueError(
                f"--n-group is {self.n_group}; allowed: a divisor of the number of experts, "
                f"which is {num_experts}"
            )
        what = "the number of experts"
        if self.n_group > 1:
            what += " in --topk-group groups"
        check_topk(self.topk, self.topk_group * (num_experts // self.n_group), what=what)
        check_norm(self, num_experts)
