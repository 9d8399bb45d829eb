"""Top-k routing: each token goes to the k experts with the highest scores.

Papers: GShard (Lepikhin et al. 2020), Switch Transformer (Fedus et al. 2021), Mixtral,
OLMoE.

    z = W x,  s = softmax(z), sigmoid(z) or sqrt(softplus(z)),  I = top-k(s)
    w_i = scale * s_i                  (divided by sum_{j in I} s_j with norm_topk_prob)
    aux = loss_coeff * E * sum_e f_e P_e + z_loss_coeff * mean_t logsumexp(z_t)^2

with f_e the fraction of the assignments that go to expert e, and P_e the mean over
tokens of s_e / sum_j s_j. For softmax that division changes nothing. Biases, groups
and other options of released models are described in `megatron.moe.gate_topk`.

Departures: Switch's jitter (multiplicative noise on the gate's input) is applied in
training only, so evaluation is deterministic. With softmax and k = 1 the probability
itself is the weight, and norm_topk_prob is refused: every weight would be 1, and the
router would receive no gradient.

Shape suffixes: T tokens, D hidden, E experts, k experts per token, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.moe.gate_options import require_field
from megatron.moe.gate_topk import TopKBaseGate, TopKConfig
from megatron.moe.routing import GateInput, Routing


class TopKGate(TopKBaseGate, name="topk"):
    """Select the k highest-scoring experts of each token."""

    @dataclass(frozen=True)
    class Config(TopKConfig):
        jitter: float = 0.0
        """multiply the gate's input by uniform noise in [1 - jitter, 1 + jitter], in
        training only"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "jitter", 0 <= self.jitter < 1, "0 <= jitter < 1")

    def forward(self, inp: GateInput) -> Routing:
        jitter = self.config.jitter
        x_TD = inp.x_TD.float()
        if self.training and jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        selection = self.select(self.logits(x_TD))
        balance = self.balance_loss(inp, selection, selection.expert_Tk)
        return self.make_routing(selection, balance)
