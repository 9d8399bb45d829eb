"""Threshold routing: the fewest experts whose probabilities reach a threshold.

Paper: XMoE (Yang et al. 2024), adaptive number of fine-grained experts.

    p = softmax(W x), sorted in descending order
    I = rank 0, and ranks whose preceding ranks sum to less than the threshold
    w_i = p_i (not renormalised)
    priority under a capacity limit of factor * T / E rows: lower rank first, then higher p
    aux = loss_coeff * E * sum_e mean_t(p_te) * mean_t[argmax_t = e]
        + entropy_coeff * mean_t -sum_e p_te log p_te        (Huang et al. 2024)
With threshold_target the threshold follows the mean number of experts per token, see
`gate_controllers`.

Departures: the released code computes a full capacity of rows for every expert
regardless of the number of assignments, replicates all experts on every GPU and
initialises them identically. Here only assigned rows are dispatched, so the compute
follows the demand. threshold_max_experts > 0 caps the number of experts per token,
which the paper does not; its scripts set a topk that does nothing, here too.
Renormalisation is an option; it is refused where every token has one expert, because
every weight would be 1 and the router would receive no gradient.

Shape suffixes: T tokens, D hidden, E experts, R experts by descending probability
(rank), A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_controllers import ThresholdController, ThresholdTargetConfig
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import RouterLossConfig, check_norm, no_effect, require_field
from megatron.moe.losses import aux_losses, entropy_loss, z_loss
from megatron.moe.routing import (
    GateInput,
    LoadBalancingLoss,
    Routing,
    RoutingScores,
    StepTotals,
)


class ThresholdGate(Gate, name="threshold"):
    """Select the smallest set of experts that reaches the threshold."""

    @dataclass(frozen=True)
    class Config(ThresholdTargetConfig, RouterLossConfig):
        threshold_max_experts: int = 0
        """largest number of experts per token; 0: no cap"""
        topk: int = field(
            default=0,
            metadata={"needs": no_effect("another --gate: see --threshold-max-experts")},
        )
        """accepted, as in XMoE's scripts, and without effect"""
        norm_topk_prob: bool = False
        """divide the probabilities of the selected experts by their sum"""
        routed_scaling_factor: float = 1.0
        """factor applied to every weight"""
        entropy_coeff: float = 0.0
        """coefficient of the mean entropy of p: a higher value makes tokens use fewer
        experts"""

        def __post_init__(self):
            super().__post_init__()
            allowed = "0 (no cap) to the number of experts"
            require_field(
                self, "threshold_max_experts", self.threshold_max_experts >= 0, allowed
            )
            require_field(self, "topk", self.topk >= 0, "0 or more, without effect")
            require_field(self, "entropy_coeff", self.entropy_coeff >= 0, "0 or more")

        def check(self, num_experts: int) -> None:
            fits = self.threshold_max_experts <= num_experts
            allowed = f"0 (no cap) to the number of experts, which is {num_experts}"
            require_field(self, "threshold_max_experts", fits, allowed)
            most = self.threshold_max_experts or num_experts
            allowed = f"at most {most}, the largest number of experts per token"
            require_field(self, "threshold_target", self.threshold_target <= most, allowed)
            check_norm(self, num_experts, threshold_max_experts=1, threshold=0)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.controller = ThresholdController(config) if config.threshold_target else None

    @property
    def has_state(self) -> bool:
        return self.controller is not None

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, min(config.threshold_max_experts or num_experts, num_experts)

    def capacity_k(self) -> int:
        return 1  # XMoE's factor of 8.0 therefore holds 8 experts per token

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        num_tokens = len(inp.x_TD)
        logits_TE = linear_fp32(inp.x_TD, self.router)
        probs_TE = logits_TE.softmax(-1)
        sorted_TR, expert_TR = probs_TE.sort(dim=-1, descending=True, stable=True)
        selected_TR = self._select(sorted_TR.detach())
        weight_TR = sorted_TR
        if c.norm_topk_prob:
            total_T1 = (sorted_TR * selected_TR).sum(-1, keepdim=True)
            weight_TR = sorted_TR / total_T1.clamp_min(1e-20)

        token_A, rank_A = selected_TR.nonzero(as_tuple=True)
        all_T = torch.arange(num_tokens, device=token_A.device)
        balance = LoadBalancingLoss.of(
            inp, probs_TE, all_T, expert_TR[:, 0], coeff=c.loss_coeff, scope=c.balance_scope
        )
        extra = 0.0
        if c.z_loss_coeff:
            extra = c.z_loss_coeff * z_loss(logits_TE)
        if c.entropy_coeff:
            extra = extra + c.entropy_coeff * entropy_loss(logits_TE)
        means = {"top1_probability": sorted_TR[:, 0].detach().sum() / max(1, num_tokens)}
        if self.controller is not None:
            means["threshold"] = self.controller.threshold()
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_TR[token_A, rank_A],
            weight_A=weight_TR[token_A, rank_A] * c.routed_scaling_factor,
            **aux_losses(balance, extra=extra),
            # fp64 holds rank and probability in one number without rounding either
            # away.
            priority_A=sorted_TR.detach()[token_A, rank_A].double() - rank_A,
            metric_means=means,
            router_logits_TC=logits_TE,
            scores=RoutingScores(share_TC=probs_TE.detach()),
        )

    def _select(self, sorted_TR: torch.Tensor) -> torch.Tensor:
        """Return bool [T, R]: which ranks of each token are assigned."""
        c = self.config
        if self.controller is not None or c.threshold < 1:
            threshold = c.threshold if self.controller is None else self.controller.threshold()
            preceding_TR = sorted_TR.cumsum(-1) - sorted_TR
            selected_TR = preceding_TR < threshold
        else:
            # All experts: rounding of the running sum must not decide who is left out.
            selected_TR = torch.ones_like(sorted_TR, dtype=torch.bool)
        selected_TR[:, 0] = True
        if c.threshold_max_experts:
            selected_TR[:, c.threshold_max_experts :] = False
        return selected_TR

    def post_optimizer_step(self, step: StepTotals) -> None:
        if self.controller is not None:
            self.controller.update(step)
