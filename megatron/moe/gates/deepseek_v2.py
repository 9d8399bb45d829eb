"""DeepSeek-V2 routing: each token's experts lie on at most topk_group devices, and three losses balance the load.

Paper: DeepSeek-V2 (DeepSeek-AI 2024), sections 2.2.2 and 2.2.3; the expert and device losses are from DeepSeekMoE (Dai
et al. 2024). The experts stand in n_group equal groups, one on each of D = n_group devices; M = topk_group.

    s = softmax(W x);  keep the M groups with the largest maximum of s, the others' scores become -inf;
    I = top-k of what is left;  w_i = scale * s_i  (/ sum_{j in I} s_j with norm_topk_prob)

    experts        loss_coeff * sum_e f_e P_e                     f_e = E / (k T) * #{choices of e},  P_e = mean_t s_te
    devices        device_loss_coeff * sum_d f'_d P'_d            f'_d = mean_{e in d} f_e,  P'_d = sum_{e in d} P_e
    communication  communication_loss_coeff * sum_d f''_d P'_d    f''_d = D / (M T) * #{tokens with a choice in d}

with sums and means over the T tokens of one sequence, then the mean over sequences (balance_scope sequence).

Published: DeepSeek-V2 topk 6 of 160 experts, n_group 8, topk_group 3, routed_scaling_factor 16; V2-Lite 6 of 64 in one
group, factor 1; both without norm_topk_prob. Shared experts and the dense first layer are the layer's and the model's
options: --moe-shared-experts, --moe-first-k-dense.

Departures: groups are configured, whatever the ranks are, so that a model does not change with the machine. In one
group the device and communication losses are constants and left out. The released code has the expert loss only, masks
with 0 (a probability underflows to 0 and then ties with a masked one), and scales only where it does not normalise;
here routed_scaling_factor always applies. Dropping tokens over a device's budget is left to the layer's capacity, which
is per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import group_limited_scores, linear_fp32
from megatron.moe.gate_options import GroupConfig, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing


class DeepSeekV2Gate(Gate, name="deepseek_v2"):
    """The k most probable experts of the groups with the most probable experts."""

    @dataclass(frozen=True)
    class Config(GroupConfig):
        routed_scaling_factor: float = 1.0
        """multiplies every weight"""
        loss_coeff: float = 0.003
        """coefficient of the balance loss over experts"""
        device_loss_coeff: float = 0.05
        """coefficient of the balance loss over groups' choices; without effect in one group"""
        communication_loss_coeff: float = 0.02
        """coefficient of the balance loss over the tokens that groups receive; without effect in one group"""
        balance_scope: str = field(default="sequence", metadata={"choices": SCOPES})
        """whose tokens the balance losses count: each rank's micro-batch, each sequence, or those of all ranks and of
        the step's micro-batches so far"""

        def __post_init__(self):
            super().__post_init__()
            for name in ("device_loss_coeff", "communication_loss_coeff"):
                require_field(self, name, getattr(self, name) >= 0, "0 or more")

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    def forward(self, inp: GateInput) -> Routing:
        c, num_tokens = self.config, len(inp.x_TD)
        logits_TE = linear_fp32(inp.x_TD, self.router)
        probs_TE = logits_TE.softmax(-1)
        expert_Tk = (
            group_limited_scores(probs_TE.detach(), c.n_group, c.topk_group, best=1)
            .topk(c.topk, dim=-1)
            .indices
        )
        weight_Tk = probs_TE.gather(-1, expert_Tk)
        if c.norm_topk_prob:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True).clamp_min(1e-20)
        token_A = torch.arange(num_tokens, device=expert_Tk.device).repeat_interleave(c.topk)
        terms = self._balance(inp, probs_TE, token_A, expert_Tk.flatten())
        stats = {"top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens)}
        if c.n_group > 1:
            stats["groups_per_token"] = terms[-1].count_NG.sum() / max(1, num_tokens)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_Tk.flatten(),
            weight_A=(weight_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(
                *terms, extra=c.z_loss_coeff * z_loss(logits_TE) if c.z_loss_coeff else 0.0
            ),
            metric_means=stats,
        )

    def _balance(
        self, inp: GateInput, probs_TE: Tensor, token_A: Tensor, expert_A: Tensor
    ) -> list[LoadBalancingLoss]:
        """The losses over experts, over groups' choices, and over the tokens that groups receive, in this order."""
        c, scope = self.config, self.config.balance_scope
        terms = [
            LoadBalancingLoss.of(
                inp, probs_TE, token_A, expert_A, coeff=c.loss_coeff, scope=scope
            )
        ]
        if c.n_group > 1:
            size = self.num_experts // c.n_group
            probs_TG, group_A = (
                probs_TE.unflatten(-1, (c.n_group, size)).sum(-1),
                expert_A // size,
            )
            reached_TG = torch.zeros_like(probs_TG, dtype=torch.bool)
            reached_TG[token_A, group_A] = True
            sent_A, to_A = reached_TG.nonzero(
                as_tuple=True
            )  # one choice per token and group, however many experts
            terms += [
                LoadBalancingLoss.of(
                    inp, probs_TG, token_A, group_A, coeff=c.device_loss_coeff, scope=scope
                ),
                LoadBalancingLoss.of(
                    inp,
                    probs_TG,
                    sent_A,
                    to_A,
                    coeff=c.communication_loss_coeff / c.topk_group,
                    scope=scope,
                    per_token=True,
                ),
            ]
        return terms
