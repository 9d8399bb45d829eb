"""MoE++: among a token's choices are experts that compute nothing: they discard, copy or replace it.

Paper: MoE++ (Jin et al. 2024). A token that needs less computation visits fewer MLPs, and the next layer's router sees
how it was routed in this one.

    z^l = W x + W_g z^{l-1} (from the second mixture layer on),  p = softmax(z) over all C choices,  w = top-k(p)
    MLP experts come first; constant expert: a_0 x + a_1 v, a = softmax(W_c x);  copy expert: x;  zero expert: 0
    aux = loss_coeff * sum_i eta_i f_i P_i + z_loss_coeff * mean_t logsumexp(z_t)^2,  f_i = choices of i / tokens,
        P_i = mean_t p_ti,  eta_i = 1 for MLP experts, tau for the N others: these get 1 / tau times the tokens
    capacity of an MLP expert: factor * tau * k T / (tau E + N), of one of the others: factor * k T / (tau E + N)

As in the paper, f sums to k and there is no factor C: when all is even the loss is about loss_coeff * k / C, where that
of other gates is loss_coeff. The gradient runs through z^{l-1} into earlier routers; without a carry the residual is
left out. The paper gives no initial weights; these are the released code's: N(0, init_std), and N(0, 1) for v.

Departures: the paper's capacity has no k, so that its factor of 1.1 would drop almost half of the choices at k = 2.
The released model divides the chosen p by their sum without the zero expert's, multiplies the input by k, and has a
router of two layers; equations 1 and 6, kept here, do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate, GateContext
from megatron.moe.gate_functional import linear_fp32, make_linear
from megatron.moe.gate_options import LossConfig, check_topk, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing


class Constant(nn.Module):
    """a_0 x + a_1 v with a = softmax(W_c x): a learned vector replaces a part of the token that depends on it."""

    def __init__(self, context: GateContext, generator: torch.Generator):
        super().__init__()
        self.mix = make_linear(context.hidden_size, 2, context.init_std, generator)
        self.vector = nn.Parameter(torch.empty(context.hidden_size))
        nn.init.normal_(self.vector, generator=generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        share_T2 = linear_fp32(x_TD, self.mix).softmax(-1)
        return (share_T2[:, :1] * x_TD.float() + share_T2[:, 1:] * self.vector.float()).to(
            x_TD.dtype
        )


class Zero(nn.Module):
    """0; the layer makes no rows for it."""

    is_zero = True

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)


class MoEPlusPlusGate(Gate, name="moepp"):
    """Top-k over MLP experts and experts without computation, with a residual from the previous layer's logits."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        topk: int = 2
        """choices per token: experts and zero-computation experts together"""
        num_zero_experts: int = 1
        """experts that return 0"""
        num_copy_experts: int = 1
        """experts that return their input"""
        num_constant_experts: int = 0
        """experts that mix their input with a learned vector; 0: a quarter of the number of experts, less zero and copy
        experts, but at least 1 (the paper takes 2 for 8 experts)"""
        tau: float = 0.75
        """weight of zero-computation experts in the balance loss and of experts in the capacity: smaller sends more
        tokens to zero-computation experts"""

        def __post_init__(self):
            super().__post_init__()
            for name, least in (
                ("topk", 1),
                ("num_zero_experts", 0),
                ("num_copy_experts", 0),
                ("num_constant_experts", 0),
            ):
                require_field(self, name, getattr(self, name) >= least, f"{least} or more")
            require_field(self, "tau", self.tau > 0, "above 0")

        def constants(self, num_experts: int) -> int:
            return self.num_constant_experts or max(
                num_experts // 4 - self.num_zero_experts - self.num_copy_experts, 1
            )

        def zero_computation(self, num_experts: int) -> int:
            """Number of experts without computation."""
            return self.constants(num_experts) + self.num_copy_experts + self.num_zero_experts

        def check(self, num_experts: int) -> None:
            check_topk(
                self.topk,
                num_experts + self.zero_computation(num_experts),
                what="the number of choices",
            )

    def __init__(self, config, context):
        super().__init__(config, context)
        generator, choices = (
            context.generator(),
            context.num_experts + config.zero_computation(context.num_experts),
        )
        self.router = self.make_router(choices, generator)
        self.residual = (
            make_linear(choices, choices, context.init_std, generator)
            if context.layer
            else None
        )
        self.zero_computation_experts.extend(
            Constant(context, generator) for _ in range(config.constants(context.num_experts))
        )
        self.zero_computation_experts.extend(
            nn.Identity() for _ in range(config.num_copy_experts)
        )
        self.zero_computation_experts.extend(Zero() for _ in range(config.num_zero_experts))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return max(0, config.topk - config.zero_computation(num_experts)), min(
            config.topk, num_experts
        )

    def capacities(self, num_tokens: int, factor: float, minimum: int) -> list[int]:
        experts, others, c = self.num_experts, len(self.zero_computation_experts), self.config
        even = factor * c.topk * num_tokens / (c.tau * experts + others)
        expert, other = (
            min(num_tokens, max(minimum, math.ceil(rows))) for rows in (c.tau * even, even)
        )
        return [expert] * experts + [other] * others

    def forward(self, inp: GateInput) -> Routing:
        c, experts, num_tokens = self.config, self.num_experts, len(inp.x_TD)
        logits_TC = linear_fp32(inp.x_TD, self.router)
        if self.residual is not None and inp.carry is not None:
            logits_TC = logits_TC + linear_fp32(inp.carry, self.residual)
        probs_TC = logits_TC.softmax(-1)
        prob_Tk, choice_Tk = probs_TC.topk(c.topk, dim=-1)
        choice_A = choice_Tk.flatten()
        token_A = torch.arange(num_tokens, device=choice_A.device).repeat_interleave(c.topk)
        weighted_TC = torch.cat([probs_TC[:, :experts], c.tau * probs_TC[:, experts:]], -1)
        # Balance multiplies by the number of choices, which this paper does not.
        balance = LoadBalancingLoss.of(
            inp,
            weighted_TC,
            token_A,
            choice_A,
            coeff=c.loss_coeff / probs_TC.shape[1],
            scope=c.balance_scope,
            per_token=True,
        )
        constants_end = experts + c.constants(experts)
        copies_end = constants_end + c.num_copy_experts
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=choice_A,
            weight_A=prob_Tk.flatten(),
            **aux_losses(
                balance, extra=c.z_loss_coeff * z_loss(logits_TC) if c.z_loss_coeff else 0.0
            ),
            carry=logits_TC,
            metric_means={
                f"{name}_fraction": ((choice_A >= first) & (choice_A < end)).sum()
                / max(1, len(choice_A))
                for name, first, end in (
                    ("constant", experts, constants_end),
                    ("copy", constants_end, copies_end),
                    ("zero", copies_end, probs_TC.shape[1]),
                )
            },
        )
