"""BlockFFN: normalised ReLU routing, with losses for sparsity across neighbour tokens.

Paper: BlockFFN (Song et al. 2025). A token uses all experts with a positive logit; an
RMSNorm gives their weights a magnitude of their own, so that the losses act on the
pattern only. Consecutive tokens should use the same few experts, which saves memory
traffic when they are decoded together.

    z = W x,  a = relu(z),  I = {e: a_e > 0},  w = g * a / sqrt(mean_e a_e^2 + eps)
        g: learned [E], 1 at the start
    aux = locality_coeff * mean BCE(sigmoid(alpha z_t), sigmoid(alpha z_{t+1}))
            over neighbours t, t + 1 of a sequence, and experts
        + lambda * mean_e (1 - prod_{t in chunk} (1 - a_te / sum_j a_tj))
            averaged over chunks of chunk_length consecutive tokens of a sequence
    lambda: chunk_coeff in the first chunk_warmup_steps steps, then after every
    chunk_interval steps times r, the ratio of the chunk loss in these steps and in those
    before; if r is above 1, times r limited to [1.025, 4]

Published values are the defaults: locality_coeff 2e-3, alpha 100, chunk_coeff 0.05
(0.1 for 2.8B), chunk_length 64, chunk_interval 100, chunk_warmup_steps 1000. Experts are
MLPs without a gate: --activation silu.

Departures: each layer follows its own chunk loss; the paper has one lambda. The last
chunk of a sequence may be shorter. As in the paper, there is no balance loss.

Shape suffixes: T tokens, D hidden, E experts, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32
from megatron.moe.gate_options import SimBalConfig, require_field, setting
from megatron.moe.neighbour_losses import chunk_loss, continues_sequence, locality_loss
from megatron.moe.routing import GateInput, Routing, RoutingScores, StepTotals

_EPS = 1e-6
_GROWTH = (1.025, 4.0)
"""Range of the factor of lambda when the chunk loss has grown."""


class BlockFFNGate(Gate, name="blockffn"):
    """Select all experts with a positive logit; weigh them after an RMSNorm."""

    @dataclass(frozen=True)
    class Config(SimBalConfig):
        locality_coeff: float = 2e-3
        """coefficient of the activation locality loss"""
        locality_sharpness: float = field(
            default=100.0, metadata={"needs": setting("locality_coeff")}
        )
        """factor of the logits in the sigmoid of the locality loss"""
        chunk_coeff: float = 5e-2
        """coefficient of the chunk sparsification loss at the start"""
        chunk_length: int = field(default=64, metadata={"needs": setting("chunk_coeff")})
        """consecutive tokens of a chunk"""
        chunk_interval: int = field(default=100, metadata={"needs": setting("chunk_coeff")})
        """optimizer steps between changes of the chunk loss's coefficient; 0: constant"""
        chunk_warmup_steps: int = field(
            default=1000, metadata={"needs": setting("chunk_interval")}
        )
        """optimizer steps before the first change of the chunk loss's coefficient"""

        def __post_init__(self):
            super().__post_init__()
            for name in ("locality_coeff", "chunk_coeff"):
                require_field(self, name, getattr(self, name) >= 0, "0 or more")
            require_field(self, "locality_sharpness", self.locality_sharpness > 0, "above 0")
            require_field(self, "chunk_length", self.chunk_length >= 1, "1 or more")
            allowed = "0 (constant) or more"
            require_field(self, "chunk_interval", self.chunk_interval >= 0, allowed)
            warmup = self.chunk_warmup_steps
            require_field(self, "chunk_warmup_steps", warmup >= 0, "0 or more")

    chunk_lambda: Tensor
    """Coefficient of the chunk loss: 0-d fp32, like the other three buffers."""
    num_steps: Tensor
    window_sum: Tensor
    """Sum of the chunk loss over the steps since the last change."""
    previous_mean: Tensor
    """Mean of the chunk loss in the interval before; 0: there was none."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.norm_weight_E = nn.Parameter(torch.ones(context.num_experts))
        coeff = torch.tensor(config.chunk_coeff, dtype=torch.float32)
        self.register_buffer("chunk_lambda", coeff)
        for name in ("num_steps", "window_sum", "previous_mean"):
            self.register_buffer(name, torch.zeros(()))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 0, num_experts

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        logits_TE = linear_fp32(inp.x_TD, self.router)
        relu_TE = logits_TE.relu()
        token_A, expert_A = relu_TE.nonzero(as_tuple=True)
        mean_square_T1 = relu_TE.square().mean(-1, keepdim=True)
        weight_TE = relu_TE * (mean_square_T1 + _EPS).rsqrt() * self.norm_weight_E.float()

        follows_T = continues_sequence(inp)
        chunk_sum, num_chunks = chunk_loss(relu_TE, follows_T, c.chunk_length)
        aux_loss = self.chunk_lambda * chunk_sum / num_chunks.clamp_min(1)
        if c.locality_coeff:
            locality = locality_loss(logits_TE, follows_T, c.locality_sharpness)
            aux_loss = aux_loss + c.locality_coeff * locality
        num_positive = (relu_TE.detach() > 0).sum()
        return Routing(
            token_A=token_A,
            token_major=True,
            expert_A=expert_A,
            weight_A=weight_TE[token_A, expert_A],
            aux_loss=aux_loss,
            metric_means={
                "sparsity": 1 - num_positive / max(1, relu_TE.numel()),
                "chunk_lambda": self.chunk_lambda.clone(),
            },
            metric_sums={"chunk_loss": chunk_sum.detach(), "chunks": num_chunks},
            router_logits_TC=logits_TE,
            scores=RoutingScores(share_TC=relu_TE.detach()),
        )

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"used_per_chunk_fraction": sums["chunk_loss"] / sums["chunks"].clamp_min(1)}

    @torch.no_grad()
    def post_optimizer_step(self, step: StepTotals) -> None:
        """Adapt lambda to the change of the chunk loss at the end of an interval."""
        c = self.config
        if not c.chunk_interval:
            return
        sums = step.metric_sums
        self.num_steps.add_(1)
        self.window_sum.add_((sums["chunk_loss"] / sums["chunks"].clamp_min(1)).float())
        is_end = self.num_steps % c.chunk_interval == 0
        mean = self.window_sum / c.chunk_interval
        ratio = mean / self.previous_mean
        factor = torch.where(ratio > 1, ratio.clamp(*_GROWTH), ratio)
        is_change = is_end & (self.num_steps > c.chunk_warmup_steps) & (self.previous_mean > 0)
        self.chunk_lambda.mul_(torch.where(is_change, factor, 1))
        self.previous_mean.copy_(torch.where(is_end, mean, self.previous_mean))
        self.window_sum.mul_(~is_end)
