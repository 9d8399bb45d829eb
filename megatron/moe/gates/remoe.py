"""ReMoE: an expert's weight is the ReLU of its logit; those above 0 are used.

Paper: ReMoE (Wang et al. 2024), fully differentiable routing. The number of experts per
token is learned; an L1 penalty whose strength follows the measured sparsity keeps its
mean at k.

    R = relu(W x),  I = {e: R_e > 0},  w = R       (no top-k, not renormalised)
    aux = lambda * E / (k T^2) * sum_e (sum_t R_te) * #{t: R_te > 0}
        = lambda / k * E * sum_e f_e P_e
    after each optimizer step: lambda *= factor^sign((1 - k/E) - S)
        S: fraction of zeros in R over all MoE layers, ranks and micro-batches

Training starts nearly dense, because any R of a token may be above 0, and becomes
sparse once lambda has grown. The losses of MoE layers are summed, as in the released
code; if they are averaged, lambda settles at a value as many times larger. One lambda
serves all layers: each layer holds a copy in a buffer, and all copies are updated
identically.

Departures: lambda is limited to [1e-30, 1e30], because it could not recover from 0 or
infinity after a long one-sided phase; balance_scope selects the tokens that f counts.

Shape suffixes: T tokens, D hidden, E experts, A assignments, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import ScopeConfig, SimBalConfig, check_topk, require_field
from megatron.moe.losses import aux_losses
from megatron.moe.routing import (
    GateInput,
    LoadBalancingLoss,
    Routing,
    RoutingScores,
    StepTotals,
)


class ReMoEGate(Gate, name="remoe"):
    """Select all experts with a positive logit, which is also their weight."""

    @dataclass(frozen=True)
    class Config(SimBalConfig, ScopeConfig):
        topk: int = 2
        """target for the mean number of experts per token"""
        lambda_init: float = 1e-8
        """strength of the L1 penalty in the first step"""
        lambda_factor: float = 1.2
        """factor by which the penalty grows after a step with too many experts per
        token and shrinks after one with too few"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            require_field(self, "lambda_init", self.lambda_init > 0, "above 0")
            allowed = "1 (constant) or more"
            require_field(self, "lambda_factor", self.lambda_factor >= 1, allowed)

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    reg_lambda: Tensor
    """Strength of the L1 penalty: 0-d fp32."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        lambda_init = torch.tensor(config.lambda_init, dtype=torch.float32)
        self.register_buffer("reg_lambda", lambda_init)

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        """Return the mean number that training settles at, and the dense start.

        A token may have no expert at all.
        """
        return min(config.topk, num_experts), num_experts

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        logits_TE = linear_fp32(inp.x_TD, self.router)
        relu_TE = logits_TE.relu()
        token_A, expert_A = relu_TE.nonzero(as_tuple=True)
        penalty = LoadBalancingLoss.of(
            inp,
            relu_TE,
            token_A,
            expert_A,
            coeff=self.reg_lambda / c.topk,
            scope=c.balance_scope,
            per_token=True,
        )
        num_positive = (relu_TE.detach() > 0).sum()
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=relu_TE[token_A, expert_A],
            **aux_losses(penalty),
            metric_means={
                "sparsity": 1 - num_positive / max(1, relu_TE.numel()),
                "lambda": self.reg_lambda.clone(),
            },
            router_logits_TC=logits_TE,
            scores=RoutingScores(share_TC=relu_TE.detach()),
        )

    @torch.no_grad()
    def post_optimizer_step(self, step: StepTotals) -> None:
        """Update lambda by the sparsity of all layers, so that all copies agree."""
        # (1 - k/E) - S has the sign of the number of assignments minus k per token and
        # layer. Without tokens the sign is 0 and lambda does not change.
        target = self.config.topk * len(step.load_LE) * step.num_tokens.double()
        surplus = step.load_LE.double().sum() - target
        self.reg_lambda.mul_((self.config.lambda_factor ** surplus.sign()).float())
        self.reg_lambda.clamp_(1e-30, 1e30)
