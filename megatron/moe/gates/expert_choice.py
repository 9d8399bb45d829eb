"""Expert choice: experts choose tokens instead of tokens experts, so every expert has the same load.

Paper: Mixture-of-Experts with Expert Choice Routing (Zhou et al. 2022).

    p = softmax(W x) over the experts;  expert e takes the C tokens t with the highest p_te;  w = p_te
    C = min(T, max(1, ceil(T * k / E)))  with k the average number of experts per token

A token may be taken by no expert (then it passes through the residual only) or by all of them. Load is balanced by
construction: there is no balance loss.

It sees the future: whether an expert takes a token depends on all tokens of the micro-batch, later ones of the same
sequence included. A causal language model trained with it has a loss that no model reaches which writes token by
token, and its choices depend on what else is in the batch. It is meant for encoders and for analysis, and says so once.

Departures: C is rounded up and at least 1 (the paper divides evenly), so k is the least average, not the exact one. The
paper's optional cap on the experts of a token, a linear program, is left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import check_topk, require_field
from megatron.moe.routing import GateInput, Routing


class ExpertChoiceGate(Gate, name="expert_choice"):
    """Each expert's C highest-scoring tokens."""

    sees_other_tokens: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        topk: int = 2
        """average number of experts per token; each expert takes ceil(tokens * topk / experts) tokens"""

        def __post_init__(self):
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self._silent = context.layer > 0  # one layer speaks for all

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 0, num_experts

    def forward(self, inp: GateInput) -> Routing:
        if not self._silent:
            self._silent = True
            warnings.warn(
                "gate expert_choice looks at all tokens of the micro-batch, in a causal model at the future: "
                "its loss is lower than generation can reach; use it for encoders and analysis, or choose "
                "another --gate",
                stacklevel=2,
            )
        num_tokens = inp.x_TD.shape[0]
        taken = min(num_tokens, max(1, -(-num_tokens * self.config.topk // self.num_experts)))
        probs_TE = linear_fp32(inp.x_TD, self.router).softmax(-1)
        weight_EC, token_EC = probs_TE.t().topk(taken, dim=-1)
        token_A = token_EC.flatten()
        chosen_T = torch.zeros(num_tokens, device=token_A.device).index_fill_(0, token_A, 1.0)
        return Routing(
            token_A=token_A,
            expert_A=torch.arange(self.num_experts, device=token_A.device).repeat_interleave(
                taken
            ),
            weight_A=weight_EC.flatten(),
            aux_loss=probs_TE.new_zeros(()),
            metric_means={
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens),
                "untaken_token_fraction": (1 - chosen_T).sum() / max(1, num_tokens),
            },
        )
