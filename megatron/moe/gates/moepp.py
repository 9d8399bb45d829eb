"""MoE++: top-k over MLP experts and experts without computation (zero, copy, constant).

Paper: MoE++ (Jin et al. 2024). A token that needs less computation visits fewer MLPs,
and each layer's router sees how the previous layer's router scored the token.

    z^l = W x + W_g z^{l-1}  (W_g from the second MoE layer on)
    p = softmax(z) over all C choices,  w = top-k(p)
    choices: MLP experts first, then
        constant experts: a_0 x + a_1 v, a = softmax(W_c x)
        copy experts: x
        zero experts: 0
    aux = loss_coeff * sum_i eta_i f_i P_i + z_loss_coeff * mean_t logsumexp(z_t)^2
        f_i = assignments to i / tokens,  P_i = mean_t p_ti
        eta_i = 1 for MLP experts, tau for the N others, which therefore receive 1 / tau
        times the tokens
    capacity of an MLP expert:   factor * tau * k T / (tau E + N)
    capacity of another choice:  factor * k T / (tau E + N)

As in the paper, f sums to k and there is no factor C: with uniform routing the loss is
about loss_coeff * k / C, where that of other gates is loss_coeff. The gradient flows
through z^{l-1} into earlier routers; without a carry the residual is left out. The
paper gives no initial weights; these are the released code's: N(0, init_std^2), and
N(0, 1) for v.

Departures: the paper's capacity has no k, so that its factor of 1.1 would drop almost
half of the assignments at k = 2. The released model divides the selected p by their sum
without the zero expert's, multiplies the input by k, and has a two-layer router;
equations 1 and 6, which are implemented here, do not.

Shape suffixes: T tokens, D hidden, E MLP experts, C choices, k choices per token,
A assignments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate, GateContext
from megatron.moe.gate_functional import ZeroExpert, linear_fp32, make_linear
from megatron.moe.gate_options import RouterLossConfig, check_topk, require_field, setting
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing, RoutingScores


class Constant(nn.Module):
    """Return a_0 x + a_1 v with a = softmax(W_c x): v replaces part of the token."""

    def __init__(self, context: GateContext, generator: torch.Generator):
        super().__init__()
        self.mix = make_linear(context.hidden_size, 2, context.init_std, generator)
        self.vector = nn.Parameter(torch.empty(context.hidden_size))
        nn.init.normal_(self.vector, generator=generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        share_T2 = linear_fp32(x_TD, self.mix).softmax(-1)
        y_TD = share_T2[:, :1] * x_TD.float() + share_T2[:, 1:] * self.vector.float()
        return y_TD.to(x_TD.dtype)


class MoEPlusPlusGate(Gate, name="moepp"):
    """Select the top k of MLP and zero-computation experts."""

    @dataclass(frozen=True)
    class Config(RouterLossConfig):
        topk: int = 2
        """choices per token: MLP experts and zero-computation experts together"""
        num_zero_experts: int = 1
        """number of experts that return 0"""
        num_copy_experts: int = 1
        """number of experts that return their input"""
        num_constant_experts: int = -1
        """number of experts that mix their input with a learned vector; -1: a quarter of
        the number of experts, less zero and copy experts, but at least 1 (the paper has
        2 for 8 experts)"""
        tau: float = field(
            default=0.75,
            metadata={
                "needs": setting("loss_coeff")
                | setting("moe_train_capacity_factor")
                | setting("moe_eval_capacity_factor")
            },
        )
        """weight of zero-computation experts in the balance loss and of MLP experts in
        the capacity: a smaller value sends more tokens to zero-computation experts"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 or more")
            for kind, least in (("zero", 0), ("copy", 0), ("constant", -1)):
                name = f"num_{kind}_experts"
                require_field(self, name, getattr(self, name) >= least, f"{least} or more")
            require_field(self, "tau", self.tau > 0, "above 0")

        def num_constants(self, num_experts: int) -> int:
            """Return the number of constant experts."""
            if self.num_constant_experts >= 0:
                return self.num_constant_experts
            others = self.num_zero_experts + self.num_copy_experts
            return max(num_experts // 4 - others, 1)

        def num_zero_computation(self, num_experts: int) -> int:
            """Return the number of zero-computation experts of all three kinds."""
            constants = self.num_constants(num_experts)
            return constants + self.num_copy_experts + self.num_zero_experts

        def check(self, num_experts: int) -> None:
            num_choices = num_experts + self.num_zero_computation(num_experts)
            check_topk(self.topk, num_choices, what="the number of choices")

    def __init__(self, config, context):
        super().__init__(config, context)
        num_experts = context.num_experts
        num_choices = num_experts + config.num_zero_computation(num_experts)
        generator = context.generator()
        self.router = self.make_router(num_choices, generator)
        self.residual = None
        if context.gate_layer > 0:
            self.residual = make_linear(num_choices, num_choices, context.init_std, generator)
        constants = config.num_constants(num_experts)
        paths = [Constant(context, generator) for _ in range(constants)]
        paths += [nn.Identity() for _ in range(config.num_copy_experts)]
        paths += [ZeroExpert() for _ in range(config.num_zero_experts)]
        self.zero_computation_experts.extend(paths)

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        fewest = max(0, config.topk - config.num_zero_computation(num_experts))
        return fewest, min(config.topk, num_experts)

    def capacities(self, num_tokens: int, factor: float, minimum: int) -> list[int]:
        c = self.config
        num_others = len(self.zero_computation_experts)
        even = factor * c.topk * num_tokens / (c.tau * self.num_experts + num_others)

        def rounded(rows: float) -> int:
            return min(num_tokens, max(minimum, math.ceil(rows)))

        return [rounded(c.tau * even)] * self.num_experts + [rounded(even)] * num_others

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        num_experts = self.num_experts
        logits_TC = linear_fp32(inp.x_TD, self.router)
        if self.residual is not None and inp.carry is not None:
            logits_TC = logits_TC + linear_fp32(inp.carry, self.residual)
        probs_TC = logits_TC.softmax(-1)
        num_tokens, num_choices = probs_TC.shape
        prob_Tk, choice_Tk = probs_TC.topk(c.topk, dim=-1)

        choice_A = choice_Tk.flatten()
        token_A = torch.arange(num_tokens, device=choice_A.device).repeat_interleave(c.topk)
        weighted = [probs_TC[:, :num_experts], c.tau * probs_TC[:, num_experts:]]
        balance = LoadBalancingLoss.of(
            inp,
            torch.cat(weighted, -1),
            token_A,
            choice_A,
            # LoadBalancingLoss multiplies by the number of choices; the paper does not.
            coeff=c.loss_coeff / num_choices,
            scope=c.balance_scope,
            per_token=True,
        )
        z_term = 0.0
        if c.z_loss_coeff:
            z_term = c.z_loss_coeff * z_loss(logits_TC)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=choice_A,
            weight_A=prob_Tk.flatten(),
            **aux_losses(balance, extra=z_term),
            carry=logits_TC,
            metric_means=self._fractions(choice_A),
            router_logits_TC=logits_TC,
            scores=RoutingScores(share_TC=probs_TC.detach()),
        )

    def _fractions(self, choice_A: Tensor) -> dict[str, Tensor]:
        """Return the fraction of assignments to each zero-computation kind."""
        c = self.config
        sizes = {"constant": c.num_constants(self.num_experts)}
        sizes |= {"copy": c.num_copy_experts, "zero": c.num_zero_experts}
        fractions = {}
        first = self.num_experts
        for kind, size in sizes.items():
            chosen_A = (choice_A >= first) & (choice_A < first + size)
            fractions[f"{kind}_fraction"] = chosen_A.sum() / max(1, len(choice_A))
            first += size
        return fractions
