"""DeepSeek-V3 routing: per-expert biases, updated after each step, balance loads.

Papers: DeepSeek-V3 (DeepSeek-AI 2024), section 2.1.2; auxiliary-loss-free load
balancing (Wang et al. 2024). The experts form n_group equal groups.

    s = sigmoid(W x)
    a group's score is the sum of its 2 highest s + b (of 1, if it has one expert)
    keep the topk_group best groups; the s + b of the others become -inf
    I = top-k of s + b
    w_i = scale * s_i / sum_{j in I} s_j    (scale * s_i without norm_topk_prob)

The weights use s without b.

    after each optimizer step in training:
        b_e += bias_update_speed * sign(mean(c) - c_e)
        c_e: assignments to e on all ranks and in all micro-batches of the step

    aux = loss_coeff * sum_e f_e P_e
        f_e = E / (k T) * #{t: s_te is among the k highest s of t}
        P_e = mean_t s_te / sum_j s_tj

aux is computed per sequence of T tokens and averaged over sequences (balance_scope
sequence).

Published values: topk 8 of 256 experts, n_group 8, topk_group 4, routed_scaling_factor
2.5, bias_update_speed 1e-3 (0 for the last 500B of 14.8T tokens), loss_coeff 1e-4.
Shared experts and dense first layers are options of the layer and the model:
--moe-shared-experts, --moe-first-k-dense.

Notes: f_e counts the highest scores, not the assignments, as the paper writes it:
neither b nor the groups enter the loss, which therefore measures the router's
preference before the bias corrects it. The paper scores a group by its k / topk_group
best experts, the released code by 2, which is the same at the published sizes; here it
is 2. The bias corresponds to DeepSeek's e_score_correction_bias.

Shape suffixes: T tokens, D hidden, E experts, k experts per token, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import group_limited_scores, linear_fp32, normalized_scores
from megatron.moe.gate_options import GroupConfig, require_field, setting
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing, StepTotals


class DeepSeekV3Gate(Gate, name="deepseek_v3"):
    """Select the k highest biased scores in the best groups."""

    expert_bias: Tensor
    """Bias [E] in fp32 that is added to the scores for selection only."""

    @dataclass(frozen=True)
    class Config(GroupConfig):
        norm_topk_prob: bool = True
        """divide the scores of the selected experts by their sum"""
        routed_scaling_factor: float = 2.5
        """factor applied to every weight"""
        bias_update_speed: float = 1e-3
        """amount by which an expert's bias changes after each optimizer step; 0: no
        bias"""
        loss_coeff: float = 1e-4
        """coefficient of the balance loss"""
        balance_scope: str = field(
            default="sequence", metadata={"choices": SCOPES, "needs": setting("loss_coeff")}
        )
        """tokens that the balance loss counts: each rank's micro-batch, each sequence,
        or those of all ranks and of the step's micro-batches so far"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "bias_update_speed", self.bias_update_speed >= 0, "0 or more")

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.register_buffer("expert_bias", torch.zeros(self.num_experts))

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        logits_TE = linear_fp32(inp.x_TD, self.router)
        biased_TE = logits_TE.detach().sigmoid() + self.expert_bias
        limited_TE = group_limited_scores(biased_TE, c.n_group, c.topk_group, best=2)
        expert_Tk = limited_TE.topk(c.topk, dim=-1).indices
        logit_Tk = logits_TE.gather(-1, expert_Tk)
        if c.norm_topk_prob:
            weight_Tk = normalized_scores(logit_Tk, "sigmoid")
        else:
            weight_Tk = logit_Tk.sigmoid()

        all_T = torch.arange(len(inp.x_TD), device=expert_Tk.device)
        token_A = all_T.repeat_interleave(c.topk)
        probs_TE = normalized_scores(logits_TE, "sigmoid")
        highest_Tk = logits_TE.detach().topk(c.topk, dim=-1).indices
        highest_A = highest_Tk.flatten()
        balance = LoadBalancingLoss.of(
            inp, probs_TE, token_A, highest_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        z_term = 0.0
        if c.z_loss_coeff:
            z_term = c.z_loss_coeff * z_loss(logits_TE)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_Tk.flatten(),
            weight_A=(weight_Tk * c.routed_scaling_factor).flatten(),
            **aux_losses(balance, extra=z_term),
            metric_means=self._metric_means(probs_TE, expert_Tk, highest_Tk),
        )

    def _metric_means(
        self, probs_TE: Tensor, expert_Tk: Tensor, highest_Tk: Tensor
    ) -> dict[str, Tensor]:
        """Return the top-1 probability and the effect of the bias on the selection."""
        changed_Tk = (expert_Tk[:, :, None] != highest_Tk[:, None]).all(-1)
        bias_E = self.expert_bias
        return {
            "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, len(probs_TE)),
            # Fraction of the assignments that are not among the token's k highest
            # scores.
            "bias_changed_fraction": changed_Tk.sum() / max(1, changed_Tk.numel()),
            "expert_bias_max_minus_min": bias_E.amax() - bias_E.amin(),
        }

    def post_optimizer_step(self, step: StepTotals) -> None:
        """Raise the bias of underloaded experts and lower that of overloaded ones."""
        # fp64: the mean of equal loads must be exactly their value, so that no bias
        # changes.
        load_E = step.load_E.double()
        direction_E = (load_E.mean() - load_E).sign().float()
        self.expert_bias.add_(direction_E, alpha=self.config.bias_update_speed)
