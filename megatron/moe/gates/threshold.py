"""Threshold routing: each token takes the fewest experts whose probabilities together reach the threshold.

Paper: XMoE (Yang et al. 2024), adaptive number of fine-grained experts.

    p = softmax(W x), sorted descending; rank r is kept iff the mass before it is < threshold (rank 0 always)
    w = p (not renormalised),  priority: better rank first, then higher p
    aux = loss_coeff * E * sum_e mean_t(p_te) * mean_t[argmax_t = e]

Departures: the released code runs a full capacity of rows for every expert whatever the tokens ask for, replicates
all experts on every GPU and starts them identical; here only the chosen rows are dispatched, so compute follows
demand. topk > 0 caps the number of experts per token. Renormalising is an option, refused with one expert per token:
it would make every weight 1 and cut the router off from the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import LossConfig, check_norm, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing


class ThresholdGate(Gate, name="threshold"):
    """The smallest set of experts whose probability mass reaches the threshold."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        threshold: float = 0.9
        """probability mass a token's experts must reach"""
        topk: int = 0
        """largest number of experts per token; 0: no cap"""
        norm_topk_prob: bool = False
        """divide the chosen probabilities by their sum"""
        routed_scaling_factor: float = 1.0
        """multiplies every weight"""

        def __post_init__(self):
            super().__post_init__()
            require_field(
                self, "threshold", 0 <= self.threshold <= 1, "0 (one expert) to 1 (all of them)"
            )
            require_field(self, "topk", self.topk >= 0, "0 (no cap) to the number of experts")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts, least=0)
            check_norm(self, num_experts, topk=1, threshold=0)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, min(config.topk or num_experts, num_experts)

    def forward(self, inp: GateInput) -> Routing:
        c, num_tokens = self.config, inp.x_TD.shape[0]
        logits_TE = linear_fp32(inp.x_TD, self.router)
        probs_TE = logits_TE.softmax(-1)
        sorted_TR, expert_TR = probs_TE.sort(dim=-1, descending=True, stable=True)
        # Threshold 1 asks for every expert: rounding of the running sum may not decide who is left out.
        before_TR = sorted_TR.detach().cumsum(-1) - sorted_TR.detach()
        keep_TR = (
            before_TR < c.threshold
            if c.threshold < 1
            else torch.ones_like(before_TR, dtype=torch.bool)
        )
        keep_TR[:, 0] = True
        if c.topk:
            keep_TR[:, c.topk :] = False
        weight_TR = sorted_TR
        if c.norm_topk_prob:
            weight_TR = sorted_TR / (sorted_TR * keep_TR).sum(-1, keepdim=True).clamp_min(1e-20)
        token_A, rank_A = keep_TR.nonzero(as_tuple=True)
        all_T = torch.arange(num_tokens, device=token_A.device)
        balance = LoadBalancingLoss.of(
            inp, probs_TE, all_T, expert_TR[:, 0], coeff=c.loss_coeff, scope=c.balance_scope
        )
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_TR[token_A, rank_A],
            weight_A=weight_TR[token_A, rank_A] * c.routed_scaling_factor,
            **aux_losses(
                balance, extra=c.z_loss_coeff * z_loss(logits_TE) if c.z_loss_coeff else 0.0
            ),
            # float64: rank and probability share one number and neither may round the other away.
            priority_A=sorted_TR.detach()[token_A, rank_A].double() - rank_A,
            metric_means={
                "top1_probability": sorted_TR[:, 0].detach().sum() / max(1, num_tokens)
            },
        )
