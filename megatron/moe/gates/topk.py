"""Top-k routing: each token goes to the k experts with the highest scores.

Papers: GShard (Lepikhin et al. 2020), Switch Transformer (Fedus et al. 2021), Mixtral,
OLMoE.

    z = W x,  s = softmax(z) or sigmoid(z),  I = top-k(s)
    w_i = scale * s_i                  (divided by sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

with f_e the fraction of the assignments that go to expert e, and P_e the mean over
tokens of s_e / sum_j s_j. For softmax that division changes nothing.

Departures: Switch's jitter (multiplicative noise on the gate's input) is applied in
training only, so evaluation is deterministic. With softmax and k = 1 the probability
itself is the weight, and norm_topk_prob is refused: every weight would be 1, and the
router would receive no gradient.

Shape suffixes: T tokens, D hidden, E experts, k experts per token, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32, select_topk
from megatron.moe.gate_options import LossConfig, check_norm, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing


class TopKGate(Gate, name="topk"):
    """Select the k highest-scoring experts of each token."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """experts per token"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """function that turns an expert's logit into its score"""
        norm_topk_prob: bool = False
        """divide the scores of the selected experts by their sum"""
        routed_scaling_factor: float = 1.0
        """factor applied to every weight"""
        jitter: float = 0.0
        """multiply the gate's input by uniform noise in [1 - jitter, 1 + jitter], in
        training only"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            known = self.score_function in ("softmax", "sigmoid")
            require_field(self, "score_function", known, "softmax sigmoid")
            require_field(self, "jitter", 0 <= self.jitter < 1, "0 <= jitter < 1")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)
            check_norm(self, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        x_TD = inp.x_TD.float()
        num_tokens = len(x_TD)
        if self.training and c.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - c.jitter, 1 + c.jitter)
        logits_TE = linear_fp32(x_TD, self.router)
        score_Tk, expert_Tk, probs_TE = select_topk(
            logits_TE, c.topk, c.score_function, c.norm_topk_prob
        )

        token_A = torch.arange(num_tokens, device=x_TD.device).repeat_interleave(c.topk)
        expert_A = expert_Tk.flatten()
        balance = LoadBalancingLoss.of(
            inp, probs_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        z_term = 0.0
        if c.z_loss_coeff:
            z_term = c.z_loss_coeff * z_loss(logits_TE)
        top1_probability = probs_TE.detach().amax(-1).sum() / max(1, num_tokens)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=(score_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(balance, extra=z_term),
            metric_means={"top1_probability": top1_probability},
        )
