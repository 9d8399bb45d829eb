"""DeepSeek-V2 routing: group-limited top-k with three balance losses.

Paper: DeepSeek-V2 (DeepSeek-AI 2024), sections 2.2.2 and 2.2.3; the expert and device
losses are from DeepSeekMoE (Dai et al. 2024). The experts form n_group equal groups,
one on each of D = n_group devices, and a token's experts lie in at most M = topk_group
groups.

    s = softmax(W x)
    keep the M groups with the largest maximum of s; all other scores become -inf
    I = top-k of the remaining scores
    w_i = scale * s_i                  (divided by sum_{j in I} s_j with norm_topk_prob)

    expert loss         loss_coeff * sum_e f_e P_e
        f_e = E / (k T) * #{choices of e},         P_e = mean_t s_te
    device loss         device_loss_coeff * sum_d f'_d P'_d
        f'_d = mean_{e in d} f_e,                  P'_d = sum_{e in d} P_e
    communication loss  communication_loss_coeff * sum_d f''_d P'_d
        f''_d = D / (M T) * #{tokens with a choice in d}

Sums and means are over the T tokens of one sequence, and the losses are averaged over
sequences (balance_scope sequence).

Published values: DeepSeek-V2 has topk 6 of 160 experts, n_group 8, topk_group 3 and
routed_scaling_factor 16; V2-Lite has 6 of 64 in one group and factor 1; neither sets
norm_topk_prob. Shared experts and the dense first layer are options of the layer and
the model: --moe-shared-experts, --moe-first-k-dense.

Departures: groups are configured independently of the ranks, so that a model does not
depend on the machine. With one group the device and communication losses are constants
and are left out. The released code has the expert loss only, masks with 0 (a
probability that underflows to 0 then ties with a masked one), and scales only where it
does not normalise; here routed_scaling_factor always applies. Dropping tokens over a
device's budget is left to the layer's capacity, which is per expert.

Shape suffixes: T tokens, D hidden, E experts, k experts per token, G groups, A
assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron.moe.gate_options import require_field, setting
from megatron.moe.gate_topk import TopKBaseGate, TopKConfig, TopKSelection
from megatron.moe.routing import SCOPES, GateInput, LoadBalancingLoss, Routing

_GROUPS = setting("n_group", above=1)
_LOSSES = (
    setting("loss_coeff") | setting("device_loss_coeff") | setting("communication_loss_coeff")
)


class DeepSeekV2Gate(TopKBaseGate, name="deepseek_v2"):
    """Select the k most probable experts of the groups with the highest maxima."""

    @dataclass(frozen=True)
    class Config(TopKConfig):
        loss_coeff: float = 0.003
        """coefficient of the balance loss over experts"""
        device_loss_coeff: float = field(default=0.05, metadata={"needs": _GROUPS})
        """coefficient of the balance loss over the assignments to groups"""
        communication_loss_coeff: float = field(default=0.02, metadata={"needs": _GROUPS})
        """coefficient of the balance loss over the tokens that groups receive"""
        balance_scope: str = field(
            default="sequence", metadata={"choices": SCOPES, "needs": _LOSSES}
        )
        """tokens that the balance losses count: each rank's micro-batch, each sequence,
        or those of all ranks and of the step's micro-batches so far"""

        def __post_init__(self):
            super().__post_init__()
            for name in ("device_loss_coeff", "communication_loss_coeff"):
                require_field(self, name, getattr(self, name) >= 0, "0 or more")

    def forward(self, inp: GateInput) -> Routing:
        selection = self.select(self.logits(inp.x_TD))
        balance = self._balance_losses(inp, selection)
        means = {}
        if self.config.n_group > 1:
            num_tokens = max(1, len(inp.x_TD))
            means["groups_per_token"] = balance[-1].count_NG.sum() / num_tokens
        return self.make_routing(selection, *balance, metric_means=means)

    def _balance_losses(
        self, inp: GateInput, selection: TopKSelection
    ) -> list[LoadBalancingLoss]:
        """Return the expert, device and communication losses, in this order.

        With one group there is only the expert loss.
        """
        c = self.config
        scope = c.balance_scope
        expert_loss = self.balance_loss(inp, selection, selection.expert_Tk)
        if c.n_group == 1:
            return [expert_loss]
        group_size = self.num_experts // c.n_group
        probs_TG = selection.normalized_TE.unflatten(-1, (c.n_group, group_size)).sum(-1)
        token_A = selection.token_A
        group_A = selection.expert_Tk.flatten() // group_size
        device_loss = LoadBalancingLoss.of(
            inp, probs_TG, token_A, group_A, coeff=c.device_loss_coeff, scope=scope
        )
        # A group receives a token once, however many of the token's experts it holds.
        receives_TG = torch.zeros_like(probs_TG, dtype=torch.bool)
        receives_TG[token_A, group_A] = True
        sent_token_A, sent_group_A = receives_TG.nonzero(as_tuple=True)
        communication_loss = LoadBalancingLoss.of(
            inp,
            probs_TG,
            sent_token_A,
            sent_group_A,
            coeff=c.communication_loss_coeff / c.topk_group,
            scope=scope,
            per_token=True,
        )
        return [expert_loss, device_loss, communication_loss]
