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

from megatron.moe.gate_bias import BIAS_RULES
from megatron.moe.gate_functional import SCORE_FUNCTIONS
from megatron.moe.gate_options import setting
from megatron.moe.gate_topk import TopKBaseGate, TopKConfig
from megatron.moe.routing import SCOPES, GateInput, Routing


class DeepSeekV3Gate(TopKBaseGate, name="deepseek_v3"):
    """Select the k highest biased scores in the best groups."""

    @dataclass(frozen=True)
    class Config(TopKConfig):
        score_function: str = field(default="sigmoid", metadata={"choices": SCORE_FUNCTIONS})
        bias_rule: str = field(default="sign", metadata={"choices": tuple(BIAS_RULES)})
        group_score_best: int = field(
            default=2, metadata={"choices": (1, 2), "needs": setting("n_group", above=1)}
        )
        norm_topk_prob: bool = True
        """divide the scores of the selected experts by their sum"""
        routed_scaling_factor: float = 2.5
        """factor applied to every weight"""
        loss_coeff: float = 1e-4
        """coefficient of the balance loss"""
        balance_scope: str = field(
            default="sequence", metadata={"choices": SCOPES, "needs": setting("loss_coeff")}
        )
        """tokens that the balance loss counts: each rank's micro-batch, each sequence,
        or those of all ranks and of the step's micro-batches so far"""

    def forward(self, inp: GateInput) -> Routing:
        selection = self.select(self.logits(inp.x_TD))
        balance = self.balance_loss(inp, selection, selection.highest_Tk)
        return self.make_routing(selection, balance)
