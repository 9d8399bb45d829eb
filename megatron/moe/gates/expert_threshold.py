"""Expert threshold: an expert takes every token whose score exceeds its threshold.

Paper: Expert Threshold Routing (Sun et al. 2026, arXiv 2603.11535), the causal form of
expert choice: experts choose tokens by their rank among all recent tokens instead of
those of the batch.

    z = W x,  token t takes e iff z_te > theta_e,  w = sigmoid(z)
    after each optimizer step in training:
        theta_e = d theta_e + (1 - d) q_e
        q_e: the value that a share k / E of the step's tokens exceeds in z_:e, over all
             ranks and micro-batches
    in the first threshold_warmup_steps steps a token takes the k experts with the largest
    z_te - theta_e

On average an expert takes k / E of the tokens, so loads are balanced without an
auxiliary loss, and a token has k experts on average: some have more, some none, which
pass through the residual connection only. A token's experts do not depend on other
tokens of its batch, and evaluation uses the thresholds as they are.

Departures: the quantile is interpolated in a histogram of width 0.016
(`quantile_histogram`) instead of read from sorted scores, so a step needs no gather. The
paper warms up with expert choice, for 4,000 steps; here the warm-up is causal, too. d
starts at 0 and grows to threshold_decay, so that early thresholds forget the initial
weights. The paper's limits of an expert's load in training are left to the layer's
capacity. Its expert that all tokens use is --moe-shared-experts.

Shape suffixes: T tokens, D hidden, E experts, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import SimBalConfig, check_topk, require_field
from megatron.moe.quantile_histogram import histogram, quantile
from megatron.moe.routing import GateInput, Routing, RoutingScores, StepTotals

_RANGE = 8.0
"""Half of the histogram's range around the thresholds, in logits."""


class ExpertThresholdGate(Gate, name="expert_threshold"):
    """Select all experts whose threshold the token's logit exceeds."""

    @dataclass(frozen=True)
    class Config(SimBalConfig):
        topk: int = 2
        """mean number of experts per token"""
        threshold_decay: float = 0.99
        """decay of the moving average of an expert's threshold, per optimizer step"""
        threshold_warmup_steps: int = 100
        """optimizer steps in which every token has exactly --topk experts, while the
        thresholds are estimated"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            in_range = 0 <= self.threshold_decay < 1
            require_field(self, "threshold_decay", in_range, "0 <= decay < 1")
            at_least_one = self.threshold_warmup_steps >= 1
            # The initial thresholds are no estimate.
            require_field(self, "threshold_warmup_steps", at_least_one, "1 or more")

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    expert_threshold: Tensor
    """Threshold [E] of the experts' logits: fp32."""
    num_updates: Tensor
    """Optimizer steps that the thresholds have seen: 0-d fp32."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.register_buffer("expert_threshold", torch.zeros(context.num_experts))
        self.register_buffer("num_updates", torch.zeros(()))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 0, num_experts

    def forward(self, inp: GateInput) -> Routing:
        logits_TE = linear_fp32(inp.x_TD, self.router)
        margin_TE = logits_TE.detach() - self.expert_threshold
        selected_TE = self._select(margin_TE)
        token_A, expert_A = selected_TE.nonzero(as_tuple=True)
        num_experts_T = selected_TE.sum(-1)
        step_sums = {}
        if self.training:
            counts_EB = self.decide(histogram, logits_TE.detach(), *self._range())
            step_sums["logit_counts"] = counts_EB
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=logits_TE[token_A, expert_A].sigmoid(),
            aux_loss=logits_TE.new_zeros(()),
            metric_means={
                "untaken_token_fraction": (num_experts_T == 0).sum() / max(1, len(logits_TE)),
            },
            step_sums=step_sums,
            router_logits_TC=logits_TE,
            scores=RoutingScores(ranked_TC=margin_TE),
        )

    def _select(self, margin_TE: Tensor) -> Tensor:
        """Return bool [T, E]: the experts of each token, by the distance to the thresholds."""
        best_Tk = margin_TE.topk(self.config.topk, dim=-1).indices
        warmup_TE = torch.zeros_like(margin_TE, dtype=torch.bool).scatter(-1, best_Tk, True)
        is_warmup = self.num_updates < self.config.threshold_warmup_steps
        return torch.where(is_warmup, warmup_TE, margin_TE > 0)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.expert_threshold - _RANGE, self.expert_threshold + _RANGE

    def state_metrics(self) -> dict[str, Tensor]:
        return {"expert_threshold": self.expert_threshold}

    @torch.no_grad()
    def post_optimizer_step(self, step: StepTotals) -> None:
        """Move the thresholds towards the quantile of this step's tokens."""
        if self.config.topk == self.num_experts:
            return  # The gate stays in its warm-up: all experts take all tokens.
        counts_EB = step.step_sums["logit_counts"]
        share = 1 - self.config.topk / self.num_experts
        quantile_E = quantile(counts_EB, *self._range(), share)
        decay = self.num_updates / (self.num_updates + 10)
        decay = decay.clamp_max(self.config.threshold_decay)
        updated_E = quantile_E.lerp(self.expert_threshold.double(), decay.double())
        has_tokens = step.num_tokens > 0
        self.expert_threshold.copy_(torch.where(has_tokens, updated_E, self.expert_threshold))
        self.num_updates.add_(has_tokens)
