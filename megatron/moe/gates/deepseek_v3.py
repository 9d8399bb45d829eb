"""DeepSeek-V3 routing: a bias on each expert's score, moved after every step against its load, balances the choice.

Papers: DeepSeek-V3 (DeepSeek-AI 2024), section 2.1.2; auxiliary-loss-free load balancing (Wang et al. 2024). The
experts stand in n_group equal groups.

    s = sigmoid(W x);  a group's score is the sum of its 2 highest s + b (of 1, if it has one expert);
    keep the topk_group best groups, the others' s + b become -inf;  I = top-k of s + b
    w_i = scale * s_i / sum_{j in I} s_j  (norm_topk_prob; without it scale * s_i): s without b

    after each optimizer step in training:  b_e += bias_update_speed * sign(mean(c) - c_e),  c_e the choices of e on all
    ranks and in all micro-batches of the step

    aux = loss_coeff * sum_e f_e P_e,  f_e = E / (k T) * #{t: s_te is among the k highest s of t},
    P_e = mean_t s_te / sum_j s_tj, per sequence of T tokens, then the mean over sequences (balance_scope sequence)

Published: topk 8 of 256 experts, n_group 8, topk_group 4, routed_scaling_factor 2.5, bias_update_speed 1e-3 (0 for the
last 500B of 14.8T tokens), loss_coeff 1e-4. Shared experts and dense first layers are the layer's and the model's
options: --moe-shared-experts, --moe-first-k-dense.

Notes: f_e counts the highest scores and not the choices, as the paper writes it: neither b nor the groups enter the
loss, which so sees what the router wants and not what the bias made of it. The paper scores a group by its k/topk_group
best experts, the released code by 2, which is the same at the published sizes; here 2. The bias is DeepSeek's
e_score_correction_bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import group_limited_scores, linear_fp32, normalized_scores
from megatron.moe.gate_options import GroupConfig, require_field
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing, StepTotals


class DeepSeekV3Gate(Gate, name="deepseek_v3"):
    """The k experts with the highest biased scores in the best groups, weighted by their unbiased scores."""

    expert_bias: Tensor
    """fp32 [E], added to the scores for the choice only; `post_optimizer_step` moves it"""

    @dataclass(frozen=True)
    class Config(GroupConfig):
        norm_topk_prob: bool = True
        """divide the chosen scores by their sum"""
        routed_scaling_factor: float = 2.5
        """multiplies every weight"""
        bias_update_speed: float = 1e-3
        """step of an expert's bias after each optimizer step; 0: no bias"""
        loss_coeff: float = 1e-4
        """coefficient of the balance loss"""
        balance_scope: str = field(default="sequence", metadata={"choices": SCOPES})
        """whose tokens the balance loss counts: each rank's micro-batch, each sequence, or those of all ranks and of
        the step's micro-batches so far"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "bias_update_speed", self.bias_update_speed >= 0, "0 or more")

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.register_buffer("expert_bias", torch.zeros(self.num_experts))

    def forward(self, inp: GateInput) -> Routing:
        c, num_tokens = self.config, len(inp.x_TD)
        logits_TE = linear_fp32(inp.x_TD, self.router)
        biased_TE = logits_TE.detach().sigmoid() + self.expert_bias
        expert_Tk = (
            group_limited_scores(biased_TE, c.n_group, c.topk_group, best=2)
            .topk(c.topk, dim=-1)
            .indices
        )
        logit_Tk = logits_TE.gather(-1, expert_Tk)
        weight_Tk = (
            normalized_scores(logit_Tk, "sigmoid") if c.norm_topk_prob else logit_Tk.sigmoid()
        )
        token_A = torch.arange(num_tokens, device=expert_Tk.device).repeat_interleave(c.topk)
        probs_TE = normalized_scores(logits_TE, "sigmoid")
        highest_Tk = logits_TE.detach().topk(c.topk, dim=-1).indices
        balance = LoadBalancingLoss.of(
            inp,
            probs_TE,
            token_A,
            highest_Tk.flatten(),
            coeff=c.loss_coeff,
            scope=c.balance_scope,
        )
        moved_Tk = (expert_Tk[:, :, None] != highest_Tk[:, None]).all(-1)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_Tk.flatten(),
            weight_A=(weight_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(
                balance, extra=c.z_loss_coeff * z_loss(logits_TE) if c.z_loss_coeff else 0.0
            ),
            metric_means={
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens),
                # share of the choices that bias and groups moved away from the k highest scores
                "bias_changed_fraction": moved_Tk.sum() / max(1, moved_Tk.numel()),
                "expert_bias_max_minus_min": self.expert_bias.amax() - self.expert_bias.amin(),
            },
        )

    def post_optimizer_step(self, step: StepTotals) -> None:
        # fp64, because the mean of equal loads must be exactly their value: such a bias does not move.
        load_E = step.load_E.double()
        direction_E = (load_E.mean() - load_E).sign().float()
        self.expert_bias.add_(direction_E, alpha=self.config.bias_update_speed)
