"""Top-k routing: each token goes to the k experts with the highest scores.

Papers: GShard (Lepikhin et al. 2020), Switch Transformer (Fedus et al. 2021), Mixtral,
OLMoE.

    z = W x,  s = softmax(z), sigmoid(z) or sqrt(softplus(z)),  I = top-k(s)
    w_i = scale * s_i                  (divided by sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

with f_e the fraction of the assignments that go to expert e, and P_e the mean over
tokens of s_e / sum_j s_j. For softmax that division changes nothing. Biases, groups
and other options of released models are described in `megatron.moe.gate_topk`.

With num_null_experts n (AdaMoE, Zeng et al. 2024) the choices are E experts and n nulls,
which return 0: the score of a selected null counts in norm_topk_prob and is then lost.
The balance loss is over all choices, with the mean f of the nulls for each of them, so
that it sets their average use and not which of them a token takes.

Departures: Switch's jitter (multiplicative noise on the gate's input) is applied in
training only, so evaluation is deterministic. With softmax and k = 1 the probability
itself is the weight, and norm_topk_prob is refused: every weight would be 1, and the
router would receive no gradient.

Shape suffixes: T tokens, D hidden, E experts, k experts per token, A assignments.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron.moe.gate_functional import ZeroExpert
from megatron.moe.gate_options import check_topk, require_field
from megatron.moe.gate_topk import TopKBaseGate, TopKConfig
from megatron.moe.routing import GateInput, Routing


class TopKGate(TopKBaseGate, name="topk"):
    """Select the k highest-scoring experts of each token."""

    @dataclass(frozen=True)
    class Config(TopKConfig):
        jitter: float = 0.0
        """multiply the gate's input by uniform noise in [1 - jitter, 1 + jitter], in
        training only"""
        num_null_experts: int = 0
        """number of choices that return 0, by which a token uses fewer experts"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "jitter", 0 <= self.jitter < 1, "0 <= jitter < 1")
            require_field(self, "num_null_experts", self.num_null_experts >= 0, "0 or more")
            alone = self.n_group == 1 and self.bias_rule == "none" and not self.expert_scale
            # Groups, biases and scales belong to experts.
            allowed = "0 with --n-group above 1, --bias-rule or --expert-scale"
            require_field(self, "num_null_experts", alone or not self.num_null_experts, allowed)

        def check(self, num_experts: int) -> None:
            num_choices = num_experts + self.num_null_experts
            if self.num_null_experts:
                check_topk(self.topk, num_choices, what="the number of experts and nulls")
            super().check(num_choices)

    def __init__(self, config, context):
        super().__init__(config, context)
        num_nulls = config.num_null_experts
        if num_nulls:
            rows = context.num_experts + num_nulls
            self.router = self.make_router(rows, bias=config.router_bias)
            self.zero_computation_experts.extend(ZeroExpert() for _ in range(num_nulls))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        fewest = max(0, config.topk - config.num_null_experts)
        return min(fewest, num_experts), min(config.topk, num_experts)

    def forward(self, inp: GateInput) -> Routing:
        jitter = self.config.jitter
        x_TD = inp.x_TD.float()
        if self.training and jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        selection = self.select(self.logits(x_TD))
        balance = self.balance_loss(inp, selection, selection.expert_Tk)
        if self.config.num_null_experts:
            count_NC = balance.count_NG.clone()
            nulls = count_NC[:, self.num_experts :]
            nulls.copy_(nulls.mean(-1, keepdim=True).expand_as(nulls))
            balance = dataclasses.replace(balance, count_NG=count_NC)
        return self.make_routing(selection, balance)
