"""Cosine routing: tokens and experts are compared by direction in a space of few dimensions.

Paper: On the Representation Collapse of Sparse Mixture of Experts (X-MoE; Chi et al. 2022): a linear router pulls token
representations towards the experts' embeddings; cosines in a small space pull less. Not the XMoE of gate `threshold`.

    z_e = cos(P x, v_e) / tau,  P x and the expert embeddings v_e in R^d, tau learnable, at least min_temperature
    s = softmax(z)  or  sigmoid(z),  I = top-k(s),  w_i = scale * s_i  (/ sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

Defaults of the paper: d = E / 2 (here at least 2: in one dimension a cosine is a sign, without gradient), tau from 0.3
(softmax) or 0.07 (sigmoid). Departures: the paper has k = 1. Released code rescales the embeddings in place in every
forward pass and leaves the token's length in; re-implementations apply softmax twice, which makes the weights nearly
equal. Here a forward changes nothing, both sides have length 1, and there is one softmax. A row of (almost) no length
has no direction: its cosines are 0 and it gets no gradient. Below the minimum, tau keeps its gradient: a plain clamp
would make it 0, and tau could never come back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32, select_topk
from megatron.moe.gate_options import LossConfig, check_norm, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing

SHORTEST = 1e-8  # a length that counts as 0; its square is far above what fp32 rounds to 0


class CosineGate(Gate, name="cosine"):
    """The k experts whose embeddings point most nearly where the projected token points."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """experts per token"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """score of an expert from its logit"""
        proj_dim: int = 0
        """dimensions of the space where cosines are taken; 0: half the number of experts, at least 2"""
        init_temperature: float = 0.0
        """temperature to start from, which is then learnt; 0: 0.3 for softmax, 0.07 for sigmoid"""
        min_temperature: float = 0.01
        """the learnt temperature acts as no less than this"""
        norm_topk_prob: bool = False
        """divide the chosen scores by their sum"""
        routed_scaling_factor: float = 1.0
        """multiplies every weight"""

        def __post_init__(self):
            super().__post_init__()
            for name, ok, allowed in (
                ("topk", self.topk >= 1, "1 to the number of experts"),
                (
                    "score_function",
                    self.score_function in ("softmax", "sigmoid"),
                    "softmax sigmoid",
                ),
                ("proj_dim", self.proj_dim >= 0, "0 (half the number of experts) or more"),
                ("min_temperature", self.min_temperature > 0, "a positive number"),
                (
                    "init_temperature",
                    self.init_temperature == 0 or self.init_temperature >= self.min_temperature,
                    f"0 (by the score function), or --min-temperature, which is {self.min_temperature}, and more",
                ),
            ):
                require_field(self, name, ok, allowed)

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)
            check_norm(self, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        dims, generator = (
            config.proj_dim or max(2, context.num_experts // 2),
            context.generator(),
        )
        self.projection = self.make_router(dims, generator)
        self.embeddings_EP = nn.Parameter(torch.empty(context.num_experts, dims))
        nn.init.normal_(self.embeddings_EP, std=context.init_std, generator=generator)
        usual = 0.3 if config.score_function == "softmax" else 0.07
        self.temperature = nn.Parameter(
            torch.full((1,), config.init_temperature or max(config.min_temperature, usual))
        )

    def forward(self, inp: GateInput) -> Routing:
        c, num_tokens = self.config, inp.x_TD.shape[0]
        tau = self.temperature.float()
        tau = tau + (tau.clamp_min(c.min_temperature) - tau).detach()
        logits_TE = self.cosines(inp.x_TD) / tau
        score_Tk, expert_Tk, probs_TE = select_topk(
            logits_TE, c.topk, c.score_function, c.norm_topk_prob
        )
        token_A, expert_A = (
            torch.arange(num_tokens, device=tau.device).repeat_interleave(c.topk),
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
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens),
                "temperature": tau.detach()[0],
            },
        )

    def cosines(self, x_TD: Tensor) -> Tensor:
        """Between every projected token and every expert's embedding: fp32 [T, E]."""
        token_TP, expert_EP = (
            unit(linear_fp32(x_TD, self.projection)),
            unit(self.embeddings_EP.float()),
        )
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(token_TP, expert_EP)


def unit(rows_NP: Tensor) -> Tensor:
    """Rows of length 1; those of (almost) no length become 0 and get no gradient."""
    length_N1 = torch.linalg.vector_norm(rows_NP, dim=-1, keepdim=True)
    long_N1 = length_N1 > SHORTEST
    return torch.where(long_N1, rows_NP / torch.where(long_N1, length_N1, 1.0), 0.0)
