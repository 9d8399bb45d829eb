"""TC-MoE: a token takes an expert's output, its negative, or nothing.

Paper: TC-MoE (Yan et al. 2025), ternary expert choice: signs make experts more useful, null slots make tokens cheaper.

    z = W x in R^{2E+K}: +e, -e and K nulls;  z_-e -= 1, z_null -= 10;  p = softmax(z),  I = top-k(p) over all of them
    w = p / (sum of the non-null p in I + sum of all null p) * {+1, -1},  expert = index mod E;  a null slot is no row
    aux = loss_coeff * E * sum_e f_e mean_t q_te - reward_coeff * mean_t sum of null p_t
        + z_loss_coeff * mean_t logsumexp(z_t)^2,  q_e = (p_+e + p_-e) / sum of non-null p,  f over non-null choices

A token may choose +e and -e, whose rows add up, or nulls only. K is topk by default: no more of them can be chosen.

Departures: the released code computes the sign and overwrites it, so that -e adds what +e would. The paper's text was
not at hand: the bias of the two kinds, K and the normalisation are those of the released inference code, and the sign
and form of the reward (the mean null probability lowers the loss) those of another published implementation, whose
balance loss lacks our factor E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import LossConfig, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing

NEGATIVE_BIAS, NULL_BIAS = -1.0, -10.0
"""added to the logits of -e and of nulls: at first almost all choices are +e"""


class TCMoEGate(Gate, name="tcmoe"):
    """Top-k over experts, their negatives, and nulls."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """choices per token, null ones included"""
        num_null_experts: int = 0
        """null choices; 0: as many as --topk"""
        reward_coeff: float = 1e-5
        """reward for the probability of null choices: higher makes tokens use fewer experts"""

        def __post_init__(self):
            super().__post_init__()
            for name, least in (("topk", 1), ("num_null_experts", 0), ("reward_coeff", 0)):
                require_field(self, name, getattr(self, name) >= least, f"{least} or more")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.num_nulls = config.num_null_experts or config.topk
        self.router = self.make_router(2 * context.num_experts + self.num_nulls)

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        # What nulls cannot fill goes to experts, perhaps to an expert and its negative.
        rest = max(0, config.topk - (config.num_null_experts or config.topk))
        return (rest + 1) // 2, min(config.topk, num_experts)

    def forward(self, inp: GateInput) -> Routing:
        c, experts, num_tokens = self.config, self.num_experts, len(inp.x_TD)
        plus_TE, minus_TE, null_TK = linear_fp32(inp.x_TD, self.router).split(
            [experts, experts, self.num_nulls], -1
        )
        logits_TC = torch.cat([plus_TE, minus_TE + NEGATIVE_BIAS, null_TK + NULL_BIAS], -1)
        probs_TC = logits_TC.softmax(-1)
        prob_Tk, choice_Tk = probs_TC.topk(c.topk, dim=-1)
        real_Tk = choice_Tk < 2 * experts
        null_T = probs_TC[:, 2 * experts :].sum(-1)
        total_T = (prob_Tk * real_Tk).sum(-1) + null_T
        sign_Tk = torch.where(choice_Tk < experts, 1.0, -1.0)
        weight_Tk = sign_Tk * prob_Tk / total_T[:, None]
        token_A, slot_A = real_Tk.nonzero(as_tuple=True)
        expert_A = choice_Tk[token_A, slot_A] % experts
        # softmax over the non-null logits is p / (sum of non-null p), also where that sum underflows.
        share_TE = logits_TC[:, : 2 * experts].softmax(-1).view(num_tokens, 2, experts).sum(1)
        balance = LoadBalancingLoss.of(
            inp, share_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        extra = -c.reward_coeff * null_T.sum() / max(1, num_tokens)
        if c.z_loss_coeff:
            extra = extra + c.z_loss_coeff * z_loss(logits_TC)
        choices = max(1, choice_Tk.numel())
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=weight_Tk[token_A, slot_A],
            **aux_losses(balance, extra=extra),
            metric_means={
                "null_fraction": (~real_Tk).sum() / choices,
                "negative_fraction": (real_Tk & (choice_Tk >= experts)).sum() / choices,
            },
        )
