"""Cosine routing: compare tokens and experts by direction in a low-dimensional space.

Paper: On the Representation Collapse of Sparse Mixture of Experts (X-MoE; Chi et al.
2022). A linear router pulls token representations towards the expert embeddings;
cosines in a low-dimensional space pull less. This is not the XMoE of gate `threshold`.

    z_e = cos(P x, v_e) / tau     P x and the expert embeddings v_e in R^d,
                                  tau learnable and at least min_temperature
    s = softmax(z) or sigmoid(z),  I = top-k(s)
    w_i = scale * s_i                  (divided by sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

Defaults of the paper: d = E / 2 (here at least 2: in one dimension a cosine is a sign
and has no gradient), and tau starts at 0.3 (softmax) or 0.07 (sigmoid).

Departures: the paper has k = 1. The released code rescales the embeddings in place in
every forward pass and does not normalise the tokens; reimplementations apply softmax
twice, which makes the weights nearly equal. Here the forward pass changes no state,
both sides are normalised, and softmax is applied once. A vector of (almost) zero length
has no direction: its cosines are 0 and it receives no gradient. Below the minimum tau
keeps its gradient: a plain clamp would make the gradient 0, and tau could never
recover.

Shape suffixes: T tokens, D hidden, P dimensions of the projection, E experts, k experts
per token, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32, select_topk, unit_vectors
from megatron.moe.gate_options import LossConfig, check_norm, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing, RoutingScores


class CosineGate(Gate, name="cosine"):
    """Select the k experts with the largest cosine to the projected token."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """experts per token"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """function that turns an expert's logit into its score"""
        proj_dim: int = 0
        """dimensions of the space in which cosines are computed; 0: half the number of
        experts, at least 2"""
        init_temperature: float = 0.0
        """initial value of the learned temperature; 0: 0.3 for softmax, 0.07 for
        sigmoid"""
        min_temperature: float = 0.01
        """lower bound of the temperature in the forward pass"""
        norm_topk_prob: bool = False
        """divide the scores of the selected experts by their sum"""
        routed_scaling_factor: float = 1.0
        """factor applied to every weight"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            known = self.score_function in ("softmax", "sigmoid")
            require_field(self, "score_function", known, "softmax sigmoid")
            allowed = "0 (half the number of experts) or more"
            require_field(self, "proj_dim", self.proj_dim >= 0, allowed)
            require_field(
                self, "min_temperature", self.min_temperature > 0, "a positive number"
            )
            minimum = self.min_temperature
            usable = self.init_temperature == 0 or self.init_temperature >= minimum
            allowed = (
                f"0 (by the score function), or at least --min-temperature, which is {minimum}"
            )
            require_field(self, "init_temperature", usable, allowed)

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)
            check_norm(self, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        dims = config.proj_dim or max(2, context.num_experts // 2)
        generator = context.generator()
        self.projection = self.make_router(dims, generator)
        self.embeddings_EP = nn.Parameter(torch.empty(context.num_experts, dims))
        nn.init.normal_(self.embeddings_EP, std=context.init_std, generator=generator)
        default = {"softmax": 0.3, "sigmoid": 0.07}[config.score_function]
        temperature = config.init_temperature or max(config.min_temperature, default)
        self.temperature = nn.Parameter(torch.full((1,), temperature))

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        num_tokens = len(inp.x_TD)
        tau = self.temperature.float()
        # Clamp the value only: the gradient passes through unchanged.
        tau = tau + (tau.clamp_min(c.min_temperature) - tau).detach()
        logits_TE = self.cosines(inp.x_TD) / tau
        score_Tk, expert_Tk, probs_TE = select_topk(
            logits_TE, c.topk, c.score_function, c.norm_topk_prob
        )

        token_A = torch.arange(num_tokens, device=tau.device).repeat_interleave(c.topk)
        expert_A = expert_Tk.flatten()
        balance = LoadBalancingLoss.of(
            inp, probs_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        z_term = 0.0
        if c.z_loss_coeff:
            z_term = c.z_loss_coeff * z_loss(logits_TE)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=(score_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(balance, extra=z_term),
            metric_means={
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens),
                "temperature": tau.detach()[0],
            },
            router_logits_TC=logits_TE,
            scores=RoutingScores(share_TC=probs_TE.detach()),
        )

    def cosines(self, x_TD: Tensor) -> Tensor:
        """Return cosines of projected tokens and expert embeddings: fp32 [T, E]."""
        token_TP = unit_vectors(linear_fp32(x_TD, self.projection))
        expert_EP = unit_vectors(self.embeddings_EP.float())
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(token_TP, expert_EP)
