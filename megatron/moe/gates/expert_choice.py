"""Expert choice: experts choose tokens, not tokens experts, so all loads are equal.

Paper: Mixture-of-Experts with Expert Choice Routing (Zhou et al. 2022).

    p = softmax(W x) over the experts
    expert e takes the C tokens t with the highest p_te,  w = p_te
    C = min(T, max(1, ceil(T * k / E)))  with k the average number of experts per token

A token may be taken by no expert (it then passes through the residual connection only)
or by all of them. The load is balanced by construction, so there is no balance loss.

Expert choice sees the future: whether an expert takes a token depends on all tokens of
the micro-batch, including later tokens of the same sequence. A causal language model
trained with it reports a loss that cannot be reached when generating token by token,
and its routing depends on the rest of the batch. It is meant for encoders and for
analysis; the gate warns about this once.

Departures: C is rounded up and is at least 1 (the paper divides evenly), so k is a
lower bound of the average, not its exact value. The paper's optional cap on the experts
per token, a linear program, is not implemented.

Shape suffixes: T tokens, D hidden, E experts, C tokens per expert, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import SimBalConfig, check_topk, require_field
from megatron.moe.routing import GateInput, Routing, RoutingScores


class ExpertChoiceGate(Gate, name="expert_choice"):
    """Assign to each expert its C highest-scoring tokens."""

    sees_other_tokens: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config(SimBalConfig):
        topk: int = 2
        """average number of experts per token: each expert takes
        ceil(tokens * topk / experts) tokens"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 0, num_experts

    def forward(self, inp: GateInput) -> Routing:
        self.warn_once(
            "--gate is expert_choice: it looks at all tokens of the micro-batch, which in a "
            "causal model includes the future, so its loss is lower than generation can "
            "reach; use it for encoders and analysis, or choose another --gate"
        )
        num_tokens = len(inp.x_TD)
        per_expert = -(-num_tokens * self.config.topk // self.num_experts)
        per_expert = min(num_tokens, max(1, per_expert))
        logits_TE = linear_fp32(inp.x_TD, self.router)
        probs_TE = logits_TE.softmax(-1)
        weight_EC, token_EC = probs_TE.t().topk(per_expert, dim=-1)

        token_A = token_EC.flatten()
        device = token_A.device
        expert_A = torch.arange(self.num_experts, device=device).repeat_interleave(per_expert)
        taken_T = torch.zeros(num_tokens, device=device).index_fill_(0, token_A, 1.0)
        return Routing(
            token_A=token_A,
            expert_A=expert_A,
            weight_A=weight_EC.flatten(),
            aux_loss=probs_TE.new_zeros(()),
            metric_means={
                "top1_probability": probs_TE.detach().amax(-1).sum() / max(1, num_tokens),
                "untaken_token_fraction": (1 - taken_T).sum() / max(1, num_tokens),
            },
            router_logits_TC=logits_TE,
            scores=RoutingScores(share_TC=probs_TE.detach()),
        )
