"""LongCat-Flash: top-k over FFN experts and identity paths, with a wanted mean of FFNs.

Paper: LongCat-Flash (Meituan 2025), zero-computation experts and expert bias adaptation.
A token chooses K of N FFN experts and Z paths that return their input, so easy tokens
use fewer FFNs; a bias holds the mean number of FFN experts per token at K_e.

    p = softmax(W x) over all N + Z choices,  I = top-K of p + b
    w_i = scale * p_i                  (not renormalised)
    after each optimizer step in training, for the FFN experts:
        b_i += bias_update_speed * (K_e / K * 1 / N - T_i / (K T))
        T_i: tokens of i, T: tokens, over all ranks and micro-batches

The sum of the updates is the error of the FFN share, and their differences balance the
FFN experts; the identity paths have no bias. Unlike DeepSeek-V3's rule it is
proportional to the error, whose loop gain is about bias_update_speed: the loads settle
in 1 / bias_update_speed steps.

Published values: N 512, Z 256, K 12, K_e 8, scale 6. Selection and weights are those of
the released inference code; the report is the source of the update, of which it
publishes no speed.

Departures: the bias starts at 0 and its speed is constant (the report lets it decay).
The report's balance loss between device groups is left out. The identity paths of a token
are one assignment with the sum of their weights.

Shape suffixes: T tokens, D hidden, E FFN experts, C choices, k choices per token,
A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import SimBalConfig, check_topk, require_field
from megatron.moe.routing import GateInput, Routing, RoutingScores, StepTotals


class LongCatGate(Gate, name="longcat"):
    """Select the top k of FFN experts and identity paths."""

    @dataclass(frozen=True)
    class Config(SimBalConfig):
        topk: int = 2
        """choices per token: FFN experts and identity paths together"""
        num_identity_experts: int = -1
        """number of paths that return their input; -1: half the number of experts, at
        least 1"""
        target_ffn_experts: float = 0.0
        """mean number of FFN experts per token that the biases aim at; 0: two thirds of
        --topk"""
        bias_update_speed: float = 1e-2
        """share of an expert's load error by which its bias changes after each
        optimizer step"""
        routed_scaling_factor: float = 6.0
        """factor applied to every weight"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 or more")
            is_count = self.num_identity_experts >= -1
            require_field(self, "num_identity_experts", is_count, "-1 (automatic) or more")
            in_range = 0 <= self.target_ffn_experts <= self.topk
            allowed = f"0 (two thirds of --topk) to --topk, which is {self.topk}"
            require_field(self, "target_ffn_experts", in_range, allowed)
            require_field(self, "bias_update_speed", self.bias_update_speed >= 0, "0 or more")

        def num_identities(self, num_experts: int) -> int:
            """Return the number of identity paths."""
            if self.num_identity_experts >= 0:
                return self.num_identity_experts
            return max(1, num_experts // 2)

        def target(self, num_experts: int) -> float:
            """Return the mean number of FFN experts per token to aim at."""
            wanted = self.target_ffn_experts or self.topk * 2 / 3
            if not self.num_identities(num_experts):
                wanted = self.topk
            return min(wanted, num_experts)

        def check(self, num_experts: int) -> None:
            num_choices = num_experts + self.num_identities(num_experts)
            check_topk(self.topk, num_choices, what="the number of choices")
            fewest = self.topk - self.num_identities(num_experts)
            reachable = max(0, fewest) <= self.target(num_experts)
            allowed = f"at least {fewest}, because only the other choices can be identities"
            require_field(self, "target_ffn_experts", reachable, allowed)

    expert_bias: Tensor
    """Bias [E] in fp32 that is added to the FFN experts' scores for selection only."""

    def __init__(self, config, context):
        super().__init__(config, context)
        num_identities = config.num_identities(context.num_experts)
        self.router = self.make_router(context.num_experts + num_identities)
        self.register_buffer("expert_bias", torch.zeros(context.num_experts))
        if num_identities:
            self.zero_computation_experts.append(nn.Identity())

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        fewest = max(0, config.topk - config.num_identities(num_experts))
        return fewest, min(config.topk, num_experts)

    def capacity_k(self) -> int:
        return max(1, round(self.config.target(self.num_experts)))

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        logits_TC = linear_fp32(inp.x_TD, self.router)
        probs_TC = logits_TC.softmax(-1)
        num_tokens, num_choices = probs_TC.shape
        bias_C = torch.zeros(num_choices, device=probs_TC.device)
        bias_C[: self.num_experts] = self.expert_bias
        ranked_TC = probs_TC.detach() + bias_C
        choice_Tk = ranked_TC.topk(c.topk, dim=-1).indices
        weight_Tk = probs_TC.gather(-1, choice_Tk) * c.routed_scaling_factor
        is_ffn_Tk = choice_Tk < self.num_experts
        chosen_T = is_ffn_Tk.sum(-1)

        # One more column holds the identity paths of a token together.
        identity_T1 = (weight_Tk * ~is_ffn_Tk).sum(-1, keepdim=True)
        has_identity_T1 = (~is_ffn_Tk).any(-1, keepdim=True)
        last_T1 = torch.full_like(choice_Tk[:, :1], self.num_experts)
        token_A, column_A = torch.cat([is_ffn_Tk, has_identity_T1], -1).nonzero(as_tuple=True)
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=torch.cat([choice_Tk, last_T1], -1)[token_A, column_A],
            weight_A=torch.cat([weight_Tk, identity_T1], -1)[token_A, column_A],
            aux_loss=probs_TC.new_zeros(()),
            metric_means={
                "top1_probability": probs_TC.detach().amax(-1).sum() / max(1, num_tokens),
                "ffn_experts_per_token": chosen_T.sum() / max(1, num_tokens),
                "expert_bias_max_minus_min": self.expert_bias.amax() - self.expert_bias.amin(),
            },
            router_logits_TC=logits_TC,
            scores=RoutingScores(
                ranked_TC=ranked_TC, selected_Tk=choice_Tk, share_TC=probs_TC.detach()
            ),
        )

    def state_metrics(self) -> dict[str, Tensor]:
        return {"expert_bias": self.expert_bias}

    @torch.no_grad()
    def post_optimizer_step(self, step: StepTotals) -> None:
        """Move the biases towards equal loads that sum to the wanted number of FFNs."""
        c = self.config
        k = c.topk
        target = c.target(self.num_experts) / (k * self.num_experts)
        share_E = step.load_E.double() / (k * step.num_tokens.double().clamp_min(1))
        error_E = (target - share_E) * (step.num_tokens > 0)
        self.expert_bias.add_((c.bias_update_speed * error_E).float())
