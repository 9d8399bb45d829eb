"""DynMoE: an expert takes a token whose direction is closer than a learned threshold.

Paper: DynMoE (Guo et al. 2024), top-any gating. The number of experts per token and the
thresholds are learned.

    s_te = sigmoid(cos(x_t, v_e)),  I_t = {e: s_te > sigmoid(G_e)},  k_t = |I_t|
    w = 1 / k_t; its gradient is that of (s_te - sigmoid(G_e)) / k_t for e in I_t
        (straight-through: as if the step from 0 to 1 were the identity)
    in evaluation a token without any expert takes that with the highest s, w = 1
    aux = diversity_coeff * || V V^T - 1 ||_2   V: the v_e scaled to length 1
        + simplicity_coeff * mean_e || v_e ||_2
        + efficiency_coeff * mean_te [e in I_t]
        + loss_coeff * E * sum_e f_e P_e
            f_e: assignments to e / tokens,  P_e = mean_t w_te

In training such a token passes through the residual connection only. The diversity
loss is the Frobenius norm. The paper has the first two losses; the released code adds
the last two, all with the same coefficient, 0.01 in its language models. The efficiency
and balance losses have straight-through gradients, too.

Departures: the paper adds an expert for tokens that no expert takes, and removes
experts that take none, at intervals; here the number of experts is fixed. The released
balance loss leaves tokens without experts out of its means. V starts with N(0,
init_std^2) like other routers instead of orthogonal rows, G with 0.

Shape suffixes: T tokens, D hidden, E experts, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import unit_vectors
from megatron.moe.gate_options import ScopeConfig, require_field, setting
from megatron.moe.losses import aux_losses
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing, RoutingScores


class DynMoEGate(Gate, name="dynmoe"):
    """Select all experts whose learned threshold the token's cosine exceeds."""

    surrogate_gradients: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(ScopeConfig):
        diversity_coeff: float = 0.01
        """coefficient of the loss that makes expert embeddings orthogonal"""
        simplicity_coeff: float = 0.01
        """coefficient of the mean length of expert embeddings"""
        efficiency_coeff: float = 0.01
        """coefficient of the mean share of experts that a token uses"""
        loss_coeff: float = 0.01
        """coefficient of the balance loss"""
        balance_scope: str = field(
            default="micro-batch", metadata={"choices": SCOPES, "needs": setting("loss_coeff")}
        )

        def __post_init__(self):
            super().__post_init__()
            for name in ("diversity", "simplicity", "efficiency"):
                name = f"{name}_coeff"
                require_field(self, name, getattr(self, name) >= 0, "0 or more")
            if self.loss_coeff < 0:
                raise ValueError(f"--moe-loss-coeff is {self.loss_coeff}; allowed: 0 or more")

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.threshold_E = nn.Parameter(torch.zeros(context.num_experts))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 0, num_experts

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        direction_ED = unit_vectors(self.router.weight.float())
        score_TE = self._scores(inp.x_TD, direction_ED)
        ranked_TE = score_TE - self.threshold_E.float().sigmoid()
        margin_TE = ranked_TE.relu()
        # The value is 1 exactly, the gradient that of the margin, which is 0 elsewhere.
        gate_TE = (margin_TE > 0).float() + (margin_TE - margin_TE.detach())
        if not self.training:
            best_T1 = score_TE.argmax(-1, keepdim=True)
            is_empty_T1 = ~(margin_TE > 0).any(-1, keepdim=True)
            gate_TE = gate_TE.scatter_add(-1, best_T1, is_empty_T1.float())
        num_experts_T1 = gate_TE.detach().sum(-1, keepdim=True)
        weight_TE = gate_TE / num_experts_T1.clamp_min(1)
        token_A, expert_A = (gate_TE.detach() > 0).nonzero(as_tuple=True)

        balance = LoadBalancingLoss.of(
            inp,
            weight_TE,
            token_A,
            expert_A,
            coeff=c.loss_coeff,
            scope=c.balance_scope,
            per_token=True,
        )
        extra = self._embedding_losses(direction_ED)
        extra = extra + c.efficiency_coeff * gate_TE.sum() / max(1, gate_TE.numel())
        untaken = (num_experts_T1 == 0).sum() / max(1, len(score_TE))
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=weight_TE[token_A, expert_A],
            **aux_losses(balance, extra=extra),
            metric_means={
                "untaken_token_fraction": untaken,
                "learned_threshold_mean": self.threshold_E.detach().sigmoid().mean(),
            },
            scores=RoutingScores(ranked_TC=ranked_TE.detach(), share_TC=score_TE.detach()),
        )

    def _scores(self, x_TD: Tensor, direction_ED: Tensor) -> Tensor:
        """Return the sigmoids of the cosines of tokens and experts: fp32 [T, E]."""
        token_TD = unit_vectors(x_TD.float())
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(token_TD, direction_ED).sigmoid()

    def _embedding_losses(self, direction_ED: Tensor) -> Tensor:
        """Return the diversity and simplicity losses of the expert embeddings."""
        c = self.config
        with torch.autocast(direction_ED.device.type, enabled=False):
            gram_EE = F.linear(direction_ED, direction_ED)
        eye_EE = torch.eye(self.num_experts, device=gram_EE.device)
        diversity = torch.linalg.matrix_norm(gram_EE - eye_EE)
        lengths_E = torch.linalg.vector_norm(self.router.weight.float(), dim=-1)
        return c.diversity_coeff * diversity + c.simplicity_coeff * lengths_E.mean()
