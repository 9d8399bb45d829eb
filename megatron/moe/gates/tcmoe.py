"""TC-MoE: a token uses an expert's output, its negative, or nothing.

Paper: TC-MoE (Yan et al. 2025), ternary expert choice. Signs make experts more useful,
and null choices make tokens cheaper.

    z = W x in R^{2E+K}: the choices are +e, -e and K nulls
    z_-e -= 1,  z_null -= 10,  p = softmax(z),  I = top-k(p) over all choices
    w = p / (sum of the non-null p in I + sum of all null p) * {+1, -1}
    expert = index mod E; a null choice makes no assignment
    aux = loss_coeff * E * sum_e f_e mean_t q_te
        - reward_coeff * mean_t (sum of null p_t)
        + z_loss_coeff * mean_t logsumexp(z_t)^2
        q_e = (p_+e + p_-e) / sum of non-null p,  f over the non-null choices

A token may choose both +e and -e, whose contributions add up, or only nulls. K defaults
to topk: more nulls cannot be chosen.

Departures: the released code computes the sign and then overwrites it, so that -e adds
what +e would. The paper's text was not available: the offsets of the two kinds, K and
the normalisation are those of the released inference code. The sign and the form of the
reward (the mean null probability lowers the loss) are those of another published
implementation, whose balance loss lacks the factor E.

Shape suffixes: T tokens, D hidden, E experts, K nulls, C = 2E + K choices, k choices
per token, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import RouterLossConfig, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing, RoutingScores

# Offsets of the logits of -e and of nulls: initially almost all choices are +e.
_NEGATIVE_OFFSET = -1.0
_NULL_OFFSET = -10.0


class TCMoEGate(Gate, name="tcmoe"):
    """Select the top k among experts, their negatives, and nulls."""

    @dataclass(frozen=True)
    class Config(RouterLossConfig):
        topk: int = 2
        """choices per token, including nulls"""
        num_null_experts: int = -1
        """number of null choices; -1: as many as --topk"""
        reward_coeff: float = 1e-5
        """reward for the probability of nulls: a higher value makes tokens use fewer
        experts"""

        def __post_init__(self):
            super().__post_init__()
            for name, least in (("topk", 1), ("reward_coeff", 0)):
                require_field(self, name, getattr(self, name) >= least, f"{least} or more")
            allowed = "-1 (as many as --topk) or more"
            require_field(self, "num_null_experts", self.num_null_experts >= -1, allowed)

        def num_nulls(self) -> int:
            """Return the number of null choices."""
            return self.topk if self.num_null_experts < 0 else self.num_null_experts

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)
            # The only choice of a token has the weight +1 or -1, whatever its probability.
            learns = self.topk > 1 or self.num_nulls() > 0
            require_field(self, "num_null_experts", learns, "1 or more with --topk 1")

    def __init__(self, config, context):
        super().__init__(config, context)
        self.num_nulls = config.num_nulls()
        self.router = self.make_router(2 * context.num_experts + self.num_nulls)

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        # Choices beyond the number of nulls go to experts, possibly to e and -e.
        non_null = max(0, config.topk - config.num_nulls())
        return (non_null + 1) // 2, min(config.topk, num_experts)

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        num_experts = self.num_experts
        num_tokens = len(inp.x_TD)
        logits_TC = self._logits(inp.x_TD)
        probs_TC = logits_TC.softmax(-1)
        prob_Tk, choice_Tk = probs_TC.topk(c.topk, dim=-1)
        non_null_Tk = choice_Tk < 2 * num_experts
        negative_Tk = non_null_Tk & (choice_Tk >= num_experts)
        null_prob_T = probs_TC[:, 2 * num_experts :].sum(-1)
        total_T = (prob_Tk * non_null_Tk).sum(-1) + null_prob_T
        sign_Tk = torch.where(choice_Tk < num_experts, 1.0, -1.0)
        weight_Tk = sign_Tk * prob_Tk / total_T[:, None]

        token_A, slot_A = non_null_Tk.nonzero(as_tuple=True)
        expert_A = choice_Tk[token_A, slot_A] % num_experts
        # The softmax of the non-null logits is p / (sum of non-null p), and it stays
        # defined where that sum underflows.
        non_null_TC = logits_TC[:, : 2 * num_experts].softmax(-1)
        share_TE = non_null_TC.view(num_tokens, 2, num_experts).sum(1)
        balance = LoadBalancingLoss.of(
            inp, share_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        extra = -c.reward_coeff * null_prob_T.sum() / max(1, num_tokens)
        if c.z_loss_coeff:
            extra = extra + c.z_loss_coeff * z_loss(logits_TC)
        num_choices = max(1, choice_Tk.numel())
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=weight_Tk[token_A, slot_A],
            **aux_losses(balance, extra=extra),
            metric_means={
                "null_fraction": (~non_null_Tk).sum() / num_choices,
                "negative_fraction": negative_Tk.sum() / num_choices,
            },
            router_logits_TC=logits_TC,
            scores=RoutingScores(
                ranked_TC=logits_TC.detach(),
                selected_Tk=choice_Tk,
                share_TC=probs_TC.detach(),
            ),
        )

    def _logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits [T, C] of +e, -e and nulls, including their offsets."""
        sizes = [self.num_experts, self.num_experts, self.num_nulls]
        plus_TE, minus_TE, null_TK = linear_fp32(x_TD, self.router).split(sizes, -1)
        return torch.cat([plus_TE, minus_TE + _NEGATIVE_OFFSET, null_TK + _NULL_OFFSET], -1)
