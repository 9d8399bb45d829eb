"""The gate contract: what a gate is given, what it answers, and the losses most gates share.

Letters: T tokens on this rank, D hidden size, E routed experts, A assignments of a token to an expert, k experts
per token.

A gate's answer is a ragged list of assignments, not a dense mask and not a fixed k. That one choice covers a variable
number of experts per token (threshold, ReMoE), signed weights (TC-MoE), a million experts (PEER), routing by token id
(hash) and expert choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GateInput:
    """What a gate may look at."""

    x_TD: Tensor
    """token rows in the compute dtype; a gate scores in fp32"""
    token_ids_T: Tensor | None = None
    """int64 token ids, for hash routing"""
    sequence_T: Tensor | None = None
    """int64 number of the sequence each token belongs to, for sequence-wise balance"""
    carry: Tensor | None = None
    """what the previous mixture layer's gate returned (MoE++'s residual logits)"""
    progress: float = 0.0
    """consumed / total samples, in [0, 1]"""


@dataclass(frozen=True, slots=True)
class Routing:
    """What a gate answers. `check` states the rules."""

    token_A: Tensor
    """int64 in [0, T)"""
    expert_A: Tensor
    """int64 in [0, E + len(local_paths)); E and above never leave the rank"""
    weight_A: Tensor
    """fp32, differentiable, may be negative; repeated (token, expert) rows add up"""
    aux_loss: Tensor
    """0-d fp32, coefficient applied; 0 if there is none"""
    priority_A: Tensor | None = None
    """who survives capacity, largest first; None: |weight|"""
    carry: Tensor | None = None
    """handed to the next mixture layer's gate"""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """detached 0-d extras, means over this rank's tokens; loads, drops and experts per token come for free"""

    def check(self, num_tokens: int, num_choices: int) -> None:
        """Raise AssertionError where the answer breaks the contract; `num_choices` is E + len(local_paths)."""
        shape = self.token_A.shape
        assert len(shape) == 1, f"token_A must be one-dimensional, got shape {tuple(shape)}"
        for name, t, dtype in (("token_A", self.token_A, torch.int64), ("expert_A", self.expert_A, torch.int64),
                               ("weight_A", self.weight_A, torch.float32)):
            assert t.shape == shape, f"{name} has shape {tuple(t.shape)}, token_A {tuple(shape)}"
            assert t.dtype == dtype, f"{name} is {t.dtype}, the contract says {dtype}"
        for name in ("expert_A", "weight_A", "priority_A", "aux_loss"):
            t = getattr(self, name)
            assert t is None or t.device == self.token_A.device, f"{name} is on {t.device}, not on the token's device"
        assert self.priority_A is None or self.priority_A.shape == shape, "priority_A must have one entry each"
        assert self.aux_loss.dim() == 0 and self.aux_loss.dtype == torch.float32, "aux_loss must be a 0-d fp32 tensor"
        for name, t, bound in (("token_A", self.token_A, num_tokens), ("expert_A", self.expert_A, num_choices)):
            if t.numel():
                low, high = int(t.min()), int(t.max())
                assert low >= 0 and high < bound, f"{name} spans [{low}, {high}], allowed [0, {bound})"


@dataclass(frozen=True, slots=True)
class FFNContext:
    """What a block hands to its feed-forward layer, dense or mixture, beside the hidden states."""

    token_ids_BS: Tensor | None = None
    carry: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class FFNOutput:
    """What every feed-forward layer, dense or mixture, returns."""

    y: Tensor
    """[B, S, D], to be added to the residual stream"""
    aux_loss: Tensor | None = None
    """0-d fp32, None from a dense layer"""
    carry: Tensor | None = None


def mean_load(expert_A: Tensor, num_experts: int) -> Tensor:
    """f_e: share of all assignments that go to each expert.

    Args:
        expert_A: int64 [A].
    Returns:
        fp32 [E], sums to 1 (all zeros when there are no assignments).
    """
    counts = torch.zeros(num_experts, device=expert_A.device, dtype=torch.float32)
    counts.scatter_add_(0, expert_A, torch.ones_like(expert_A, dtype=torch.float32))
    return counts / max(1, expert_A.numel())


def balance_loss(load_E: Tensor, scores_TE: Tensor) -> Tensor:
    """E * sum_e f_e P_e (GShard; Switch Transformer, eq. 4); 1 when uniform.

    Args:
        load_E: fp32 [E], f_e: share of assignments per expert, no gradient flows through it.
        scores_TE: fp32 [T, E] scores that sum to 1 over experts; P_e is their mean over tokens.
    Returns:
        0-d fp32; 0 when there are no tokens.
    """
    num_tokens, num_experts = scores_TE.shape
    return num_experts * (load_E.detach() * scores_TE.sum(0) / max(1, num_tokens)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(z_t)^2 (ST-MoE, eq. 5): keeps logits small.

    Args:
        logits_TE: fp32 [T, E].
    Returns:
        0-d fp32; 0 when there are no tokens.
    """
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])
