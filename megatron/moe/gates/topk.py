"""Top-k routing: each token goes to the k experts with the highest scores.

Papers: GShard (Lepikhin et al. 2020), Switch Transformer (Fedus et al. 2021), Mixtral, OLMoE.

    s = softmax(W x)  or  sigmoid(W x),  I = top-k(s),  w_i = scale * s_i  (/ sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

Departures: jitter (Switch's multiplicative noise on the gate's input) acts in training only, so evaluation is
deterministic. With softmax and k = 1 the raw probability is the weight, and norm_topk_prob is refused: it would make
every weight 1 and cut the router off from the gradient. P_e uses scores divided by their sum over experts, which for
softmax changes nothing.
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
    """The k highest-scoring experts of each token."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """experts per token"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """score of an expert from its logit"""
        norm_topk_prob: bool = False
        """divide the chosen scores by their sum"""
        routed_scaling_factor: float = 1.0
        """multiplies every weight"""
        jitter: float = 0.0
        """multiply the gate's input by uniform 1 +- jitter, in training only"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            require_field(
                self,
                "score_function",
                self.score_function in ("softmax", "sigmoid"),
                "softmax sigmoid",
            )
            require_field(self, "jitter", 0 <= self.jitter < 1, "0 <= jitter < 1")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)
            check_norm(self, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    def forward(self, inp: GateInput) -> Routing:
        c, x_TD = self.config, inp.x_TD.float()
        if self.training and c.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - c.jitter, 1 + c.jitter)
        logits_TE = linear_fp32(x_TD, self.router)
        score_Tk, expert_Tk, probs_TE = select_topk(
            logits_TE, c.topk, c.score_function, c.norm_topk_prob
        )
        token_A, expert_A = (
            torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(c.topk),
            expert_Tk.flatten(),
        )
        balance = LoadBalancingLoss.of(
            inp, probs_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=(score_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(
                balance, extra=c.z_loss_coeff * z_loss(logits_TE) if c.z_loss_coeff else 0.0
            ),
            metric_means={
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, len(x_TD))
            },
        )
