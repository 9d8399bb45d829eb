"""The gate contract: what a gate is given, what it answers, and the losses most gates share.

Shape suffixes: T tokens on this rank, D hidden size, E routed experts, A assignments of a token to an expert, k experts
per token, G what a balance loss balances (experts, or groups of them), N sequences.

A gate's answer is a ragged list of assignments, not a dense mask and not a fixed k. That one choice covers a variable
number of experts per token (threshold, ReMoE), signed weights (TC-MoE), a million experts (PEER), routing by token id
(hash) and expert choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SCOPES = ("micro-batch", "sequence", "global-batch")
"""what a balance loss takes its loads over: this rank's micro-batch, each sequence, or all ranks' tokens of this
optimizer step so far"""


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
    num_sequences: int | None = None
    """N, so that nobody waits for the device to count them; None: the largest of sequence_T + 1"""


@dataclass(frozen=True, slots=True)
class LoadBalancingLoss:
    """A balance loss, coeff * G * mean_n sum_g f_ng P_ng, as its two factors. Made by `Balance.of`.

    f = count / total has no gradient, so it may count tokens that are not here: the layer adds what other ranks and
    earlier micro-batches of the step counted (scope global-batch) before it takes the `loss`. A gate communicates
    nothing.
    """

    count_NG: Tensor
    """fp32, choices of g in sequence n; one row for all tokens unless the scope is sequence"""
    total_N: Tensor
    """fp32, what the counts are divided by"""
    score_NG: Tensor
    """fp32, differentiable: mean score over the tokens behind the row"""
    coeff: float | Tensor
    scope: str

    @staticmethod
    def of(
        inp: GateInput,
        score_TG: Tensor,
        token_A: Tensor,
        choice_A: Tensor,
        *,
        coeff: float | Tensor,
        scope: str = "micro-batch",
        per_token: bool = False,
    ) -> LoadBalancingLoss:
        """The loss of scores [T, G] and choices.

        Args:
            score_TG: fp32; they sum to 1 over G in most papers.
            token_A, choice_A: int64, who chose which g.
            per_token: f is choices / tokens instead of choices / all choices.
        """
        (num_tokens, size), device = score_TG.shape, score_TG.device
        rows = _num_sequences(inp) if scope == "sequence" else 1
        row_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        if scope == "sequence" and inp.sequence_T is not None:
            row_T = inp.sequence_T
        count_NG = torch.zeros(rows * size, device=device)
        count_NG.scatter_add_(
            0, row_T[token_A] * size + choice_A, torch.ones_like(choice_A, dtype=torch.float32)
        )
        count_NG = count_NG.view(rows, size)
        member_NT = (row_T == torch.arange(rows, device=device)[:, None]).to(score_TG.dtype)
        tokens_N = member_NT.sum(-1)
        score_NG = (member_NT @ score_TG) / tokens_N.clamp_min(1)[:, None]
        return LoadBalancingLoss(
            count_NG, tokens_N if per_token else count_NG.sum(-1), score_NG, coeff, scope
        )

    def loss(self, count_NG: Tensor | None = None, total_N: Tensor | None = None) -> Tensor:
        """0-d fp32, from this rank's own counts or from those given; 0 when there are no tokens."""
        count_NG = self.count_NG if count_NG is None else count_NG
        total_N = self.total_N if total_N is None else total_N
        load_NG = (count_NG / total_N.clamp_min(1)[:, None]).detach()
        rows, size = load_NG.shape
        return self.coeff * size / max(1, rows) * (load_NG * self.score_NG).sum()


def _num_sequences(inp: GateInput) -> int:
    if inp.num_sequences is not None:
        return inp.num_sequences
    return (
        1
        if inp.sequence_T is None or not len(inp.sequence_T)
        else int(inp.sequence_T.max()) + 1
    )


@dataclass(frozen=True, slots=True)
class Routing:
    """What a gate answers. `check` states the rules."""

    token_A: Tensor
    """int64 in [0, T)"""
    expert_A: Tensor
    """int64 in [0, E + len(zero_computation_experts)); E and above never leave the rank"""
    weight_A: Tensor
    """fp32, differentiable, may be negative; repeated (token, expert) rows add up"""
    aux_loss: Tensor
    """0-d fp32, coefficient applied; 0 if there is none. All that this rank knows; `balance` comes on top"""
    priority_A: Tensor | None = None
    """who survives capacity, largest first; None: |weight|"""
    carry: Tensor | None = None
    """handed to the next mixture layer's gate"""
    token_major: bool = False
    """token_A is in ascending order, as the layer likes it: that saves it a sort"""
    metric_means: dict[str, Tensor] = field(default_factory=dict)
    """detached 0-d extras, means over this rank's tokens; loads, drops and experts per token come for free"""
    balance: tuple[LoadBalancingLoss, ...] = ()
    """losses of scope global-batch: the layer adds the other ranks' loads, then the loss"""
    metric_sums: dict[str, Tensor] = field(default_factory=dict)
    """detached fp32 or fp64 sums over this rank's tokens, in training added up over micro-batches and ranks for
    `Gate.post_optimizer_step`, and over a log interval for `Gate.summarise`"""

    def check(self, num_tokens: int, num_choices: int) -> None:
        """Raise AssertionError where the answer breaks the contract; `num_choices` is E + len(zero_computation_experts)."""
        shape = self.token_A.shape
        assert len(shape) == 1, f"token_A must be one-dimensional, got shape {tuple(shape)}"
        for name, t, dtype in (
            ("token_A", self.token_A, torch.int64),
            ("expert_A", self.expert_A, torch.int64),
            ("weight_A", self.weight_A, torch.float32),
        ):
            assert t.shape == shape, (
                f"{name} has shape {tuple(t.shape)}, token_A {tuple(shape)}"
            )
            assert t.dtype == dtype, f"{name} is {t.dtype}, the contract says {dtype}"
        for name in ("expert_A", "weight_A", "priority_A", "aux_loss"):
            t = getattr(self, name)
            assert t is None or t.device == self.token_A.device, (
                f"{name} is on {t.device}, not on the token's device"
            )
        assert self.priority_A is None or self.priority_A.shape == shape, (
            "priority_A must have one entry each"
        )
        assert self.aux_loss.dim() == 0 and self.aux_loss.dtype == torch.float32, (
            "aux_loss must be a 0-d fp32 tensor"
        )
        for name, t, bound in (
            ("token_A", self.token_A, num_tokens),
            ("expert_A", self.expert_A, num_choices),
        ):
            if t.numel():
                low, high = int(t.min()), int(t.max())
                assert low >= 0 and high < bound, (
                    f"{name} spans [{low}, {high}], allowed [0, {bound})"
                )
        if self.token_major:
            assert bool((self.token_A.diff() >= 0).all()), (
                "token_major is set, but token_A is not in ascending order"
            )


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What one optimizer step counted for one mixture layer, summed over ranks and micro-batches."""

    load_E: Tensor
    """fp32, wanted assignments per routed expert"""
    num_tokens: Tensor
    """0-d fp32"""
    metric_sums: dict[str, Tensor]
    """the gate's own, fp64"""
    load_LE: Tensor
    """fp32, the loads of all mixture layers that have such a gate, in order"""
