"""The gate contract: what a gate receives and what it returns.

Shape suffixes: T tokens on this rank, R those that are not padding, D hidden, E routed
experts, C choices (experts and what else the gate chooses from), A assignments of a token to
an expert, G balanced units (experts, or groups of them), N sequences.

A gate returns a ragged list of assignments, not a dense mask and not a fixed k. This
covers a variable number of experts per token (threshold, ReMoE), signed weights
(TC-MoE), a million experts (PEER), routing by token id (hash) and expert choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

SCOPES = ("micro-batch", "sequence", "global-batch")
"""Tokens over which a balance loss takes its loads: this rank's micro-batch, each
sequence, or all ranks' tokens of the current optimizer step so far."""

_MAX_MATMUL_ROWS = 32
"""Largest number of sequences whose scores are added up by a matrix product"""


@dataclass(frozen=True, slots=True)
class GateInput:
    """Input of a gate."""

    x_TD: Tensor
    """token rows in the compute dtype; gates compute scores in fp32"""
    token_ids_T: Tensor | None = None
    """int64 token ids, for routing by token id"""
    sequence_T: Tensor | None = None
    """int64 number of each token's sequence, or of its document where the batch has
    documents, for sequence-wise balance"""
    carry: Tensor | None = None
    """carry returned by the gate of the previous MoE layer with the same gate (MoE++:
    residual logits), which has no rows for padding"""
    progress: float = 0.0
    """consumed / total training samples, in [0, 1]"""
    num_sequences: int | None = None
    """N, given by the caller to avoid a device sync; None: the maximum of sequence_T +
    1. Sequences without tokens count nowhere"""
    padding_T: Tensor | None = None
    """bool, True where a row is padding; None: no padding. `Gate.__call__` removes
    these rows, so a gate's forward never sees them"""
    unpadded_R: Tensor | None = None
    """int64 rows that are not padding, given by the caller to avoid a device sync; None:
    computed from padding_T"""

    @property
    def num_tokens(self) -> int:
        """Number of rows that are not padding."""
        if self.padding_T is None:
            return len(self.x_TD)
        return len(self._unpadded_rows())

    def _unpadded_rows(self) -> Tensor:
        if self.unpadded_R is not None:
            return self.unpadded_R
        return self.padding_T.logical_not().nonzero().flatten()

    def without_padding(self) -> GateInput:
        """Return the input of the rows that are not padding.

        Its `unpadded_R` has their numbers. Without `padding_T` the input itself is
        returned. Synchronises with the device unless `unpadded_R` is given.
        """
        if self.padding_T is None:
            return self
        num_rows = len(self.x_TD)
        assert self.padding_T.shape == (num_rows,), (
            f"padding_T has shape {tuple(self.padding_T.shape)}, x_TD has {num_rows} rows"
        )
        rows_R = self._unpadded_rows()
        per_token = {"token_ids_T": self.token_ids_T, "sequence_T": self.sequence_T}
        selected = {n: t if t is None else t[rows_R] for n, t in per_token.items()}
        return replace(
            self, x_TD=self.x_TD[rows_R], padding_T=None, unpadded_R=rows_R, **selected
        )


@dataclass(frozen=True, slots=True)
class LoadBalancingLoss:
    """A balance loss, coeff * G * mean_n sum_g f_ng P_ng, stored as its two factors.

    The load f = count / total has no gradient, so it may include tokens of other ranks.
    A gate does not communicate: for scope global-batch the layer adds the counts of
    other ranks and of earlier micro-batches of the step before it calls `loss`. Made by
    `LoadBalancingLoss.of`.
    """

    count_NG: Tensor
    """fp32, number of times that sequence n chose g; one row unless the scope is
    sequence"""
    total_N: Tensor
    """fp32, divisor of the counts"""
    score_NG: Tensor
    """fp32, differentiable mean score over the tokens of the row"""
    coeff: float | Tensor
    scope: str
    num_rows: Tensor | int
    """number of rows with tokens, at least 1: the loss is their mean"""

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
        """Count the choices and average the scores of each sequence or of all tokens.

        Sequences without tokens do not enter the mean over sequences.

        Args:
            score_TG: fp32 scores; in most papers they sum to 1 over G.
            token_A: int64, token of each choice.
            choice_A: int64, chosen g of each choice.
            per_token: divide counts by the number of tokens instead of that of choices.
        """
        num_tokens, size = score_TG.shape
        device = score_TG.device
        num_rows = 1
        row_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        if scope == "sequence":
            num_rows = _num_sequences(inp)
            if inp.sequence_T is not None:
                row_T = inp.sequence_T
        count_NG = torch.zeros(num_rows * size, device=device)
        ones_A = torch.ones_like(choice_A, dtype=torch.float32)
        count_NG.scatter_add_(0, row_T[token_A] * size + choice_A, ones_A)
        count_NG = count_NG.view(num_rows, size)
        tokens_N = torch.zeros(num_rows, device=device)
        tokens_N.scatter_add_(0, row_T, torch.ones_like(row_T, dtype=torch.float32))
        score_NG = _sum_rows(score_TG, row_T, num_rows) / tokens_N.clamp_min(1)[:, None]
        total_N = tokens_N if per_token else count_NG.sum(-1)
        if num_rows > 1:
            num_rows = (tokens_N > 0).sum().clamp_min(1)
        return LoadBalancingLoss(count_NG, total_N, score_NG, coeff, scope, num_rows)

    def loss(self, count_NG: Tensor | None = None, total_N: Tensor | None = None) -> Tensor:
        """Compute the loss from this rank's counts, or from the counts given.

        Returns:
            0-d fp32; 0 when there are no tokens.
        """
        if count_NG is None:
            count_NG = self.count_NG
        if total_N is None:
            total_N = self.total_N
        load_NG = (count_NG / total_N.clamp_min(1)[:, None]).detach()
        size = load_NG.shape[1]
        return self.coeff * size / self.num_rows * (load_NG * self.score_NG).sum()


def _sum_rows(score_TG: Tensor, row_T: Tensor, num_rows: int) -> Tensor:
    """Add up the scores of the tokens of each row: [N, G].

    The product with a [N, T] matrix is fast and deterministic on a GPU, but packed
    batches may have thousands of documents, and autograd would keep the matrix.
    """
    if num_rows > _MAX_MATMUL_ROWS:
        total_NG = score_TG.new_zeros(num_rows, score_TG.shape[1])
        return total_NG.index_add(0, row_T, score_TG)
    row_N1 = torch.arange(num_rows, device=row_T.device)[:, None]
    return (row_T == row_N1).to(score_TG.dtype) @ score_TG


def _num_sequences(inp: GateInput) -> int:
    if inp.num_sequences is not None:
        return inp.num_sequences
    if inp.sequence_T is None or len(inp.sequence_T) == 0:
        return 1
    return int(inp.sequence_T.max()) + 1


@dataclass(frozen=True, slots=True)
class RoutingScores:
    """What a gate compared in order to choose, for metrics only.

    The tensors are detached and fp32, without rows for padding. A gate passes tensors that
    it has computed anyway. The columns are choices: routed experts, then zero-computation
    experts, unless `selected_Tk` is given.
    """

    ranked_TC: Tensor | None = None
    """scores by which the gate ranked the choices of each token, with biases; -inf where a
    choice was excluded. None: they are the router's logits, in the same order"""
    selected_Tk: Tensor | None = None
    """int64 columns of ranked_TC that each token selected, for gates whose columns are not
    the choices of `Routing.expert_A`; None: those of the assignments"""
    share_TC: Tensor | None = None
    """scores of all choices, 0 or more; metrics divide them by their sum. None: the softmax
    of the router's logits"""


@dataclass(frozen=True, slots=True)
class Routing:
    """Output of a gate. `check` verifies the rules."""

    token_A: Tensor
    """int64 in [0, T)"""
    expert_A: Tensor
    """int64 in [0, E + len(zero_computation_experts)); numbers from E on are the
    zero-computation experts, whose rows never leave the rank"""
    weight_A: Tensor
    """fp32, differentiable, may be negative; repeated (token, expert) pairs add up"""
    aux_loss: Tensor
    """0-d fp32, coefficients applied, 0 if there is none: losses that this rank can
    compute alone. Those in `balance` are added by the layer"""
    priority_A: Tensor | None = None
    """priority under capacity, largest first; None: |weight|"""
    carry: Tensor | None = None
    """passed to the gate of the next MoE layer with the same gate, threaded through the
    layers as in jax.lax.scan; without rows for padding, see `GateInput.padding_T`"""
    token_major: bool = False
    """token_A is in ascending order, which saves the layer a sort"""
    metric_means: dict[str, Tensor] = field(default_factory=dict)
    """detached 0-d metrics, means over this rank's tokens; the layer itself already
    counts loads, drops and experts per token"""
    balance: tuple[LoadBalancingLoss, ...] = ()
    """balance losses of scope global-batch: the layer adds the loads of other ranks to
    them, and then the losses to aux_loss"""
    metric_sums: dict[str, Tensor] = field(default_factory=dict)
    """detached fp32 or fp64 sums over this rank's tokens. The layer sums them over
    ranks and micro-batches for `Gate.post_optimizer_step` (training only), and over a
    logging interval for `Gate.summarise`"""
    step_sums: dict[str, Tensor] = field(default_factory=dict)
    """like metric_sums, but for `Gate.post_optimizer_step` alone: large tensors such as
    histograms, which no metric needs. Left empty in evaluation"""
    logits_TE: Tensor | None = None
    """fp32, differentiable logits of the router, without rows for padding. A gate that
    returns them gets the z-loss of its option z_loss_coeff from the layer, see
    `megatron.moe.losses.named_losses`; None: the gate has none, or has added the loss to
    aux_loss itself"""
    router_logits_TC: Tensor | None = None
    """fp32 logits of all choices of the gate, without rows for padding, for programs that
    record them; None: they are `logits_TE`, or the gate has none"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """0-d fp32 losses by name, coefficients applied: the layer adds them to aux_loss,
    and the log has each as `moe_<name>`"""
    scores: RoutingScores | None = None
    """what the gate compared, for metrics; None: its logits, if it returns any"""

    @property
    def choice_logits_TC(self) -> Tensor | None:
        """Logits of the router by choice, without rows for padding; None: the gate has none."""
        if self.router_logits_TC is not None:
            return self.router_logits_TC
        return self.logits_TE

    def with_padding(self, unpadded_R: Tensor) -> Routing:
        """Return the routing with tokens numbered as they are with padding.

        Args:
            unpadded_R: see `GateInput`.
        """
        return replace(self, token_A=unpadded_R[self.token_A])

    def check(
        self,
        num_tokens: int,
        num_choices: int,
        finite: bool = True,
        num_logits: int | None = None,
    ) -> None:
        """Verify the gate contract. Synchronises with the device.

        Args:
            num_choices: E + len(zero_computation_experts).
            finite: refuse weights, priorities and losses that are NaN or infinite, too.
            num_logits: number of tokens that are not padding, for which logits have rows;
                None: all.
        Raises:
            AssertionError: the routing breaks the contract; the message names the
                field.
        """
        self.check_layout()
        _check_range("token_A", self.token_A, num_tokens)
        _check_range("expert_A", self.expert_A, num_choices)
        if num_logits is None:
            num_logits = num_tokens
        _check_rows("logits_TE", self.logits_TE, num_logits)
        _check_rows("router_logits_TC", self.router_logits_TC, num_logits)
        if self.scores is not None:
            _check_rows("scores.ranked_TC", self.scores.ranked_TC, num_logits)
            _check_rows("scores.share_TC", self.scores.share_TC, num_logits)
            _check_rows("scores.selected_Tk", self.scores.selected_Tk, num_logits, torch.int64)
        for name, loss in self.losses.items():
            assert name.isidentifier() and name != "aux_loss", (
                f"losses has the name {name!r}; allowed: a Python name other than aux_loss"
            )
            assert loss.dim() == 0 and loss.dtype == torch.float32, (
                f"the loss {name!r} must be a 0-d fp32 tensor, got {loss.dim()}-d {loss.dtype}"
            )
        if self.token_major:
            assert bool((self.token_A.diff() >= 0).all()), (
                "token_major is set, but token_A is not in ascending order"
            )
        if finite:
            for name in ("weight_A", "priority_A", "aux_loss"):
                _check_finite(name, getattr(self, name))
            for name, loss in self.losses.items():
                _check_finite(f"the loss {name!r}", loss)

    def check_layout(self) -> None:
        """Verify shapes, dtypes and devices, without synchronising with the device.

        Raises:
            AssertionError: as `check`.
        """
        for name in ("token_A", "expert_A", "weight_A", "aux_loss"):
            tensor = getattr(self, name)
            assert isinstance(tensor, Tensor), (
                f"{name} is of type {type(tensor).__name__}; allowed: a tensor"
            )
        shape = self.token_A.shape
        assert len(shape) == 1, f"token_A must be one-dimensional, got shape {tuple(shape)}"
        dtypes = {"token_A": torch.int64, "expert_A": torch.int64, "weight_A": torch.float32}
        for name, dtype in dtypes.items():
            tensor = getattr(self, name)
            assert tensor.shape == shape, (
                f"{name} has shape {tuple(tensor.shape)}, token_A has {tuple(shape)}"
            )
            assert tensor.dtype == dtype, f"{name} is {tensor.dtype}; allowed: {dtype}"
        for name in ("expert_A", "weight_A", "priority_A", "aux_loss"):
            tensor = getattr(self, name)
            assert tensor is None or tensor.device == self.token_A.device, (
                f"{name} is on {tensor.device}, token_A on {self.token_A.device}"
            )
        assert self.priority_A is None or self.priority_A.shape == shape, (
            f"priority_A has shape {tuple(self.priority_A.shape)}, token_A has {tuple(shape)}"
        )
        assert self.aux_loss.dim() == 0 and self.aux_loss.dtype == torch.float32, (
            f"aux_loss must be a 0-d fp32 tensor, got {self.aux_loss.dim()}-d "
            f"{self.aux_loss.dtype}"
        )


def _check_rows(
    name: str, rows: Tensor | None, num_rows: int, dtype: torch.dtype = torch.float32
) -> None:
    """Raise AssertionError unless a tensor has two dimensions, a row per token and a dtype."""
    if rows is None:
        return
    assert rows.dim() == 2 and len(rows) == num_rows, (
        f"{name} has shape {tuple(rows.shape)}; allowed: ({num_rows}, experts)"
    )
    assert rows.dtype == dtype, f"{name} is {rows.dtype}; allowed: {dtype}"


def _check_finite(name: str, tensor: Tensor | None) -> None:
    """Raise AssertionError if a value is NaN or infinite."""
    if tensor is None:
        return
    # Detached: autograd would save tensors that a recomputed pass does not.
    num_bad = int((~tensor.detach().isfinite()).sum())
    assert num_bad == 0, (
        f"{name} has {num_bad} of {tensor.numel()} values that are NaN or infinite; "
        "allowed: finite ones"
    )


def _check_range(name: str, tensor: Tensor, bound: int) -> None:
    """Raise AssertionError unless all values are in [0, bound)."""
    if tensor.numel() == 0:
        return
    low = int(tensor.min())
    high = int(tensor.max())
    assert low >= 0 and high < bound, f"{name} spans [{low}, {high}], allowed [0, {bound})"


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Totals of an MoE layer over the ranks and micro-batches of an optimizer step."""

    load_E: Tensor
    """fp32, assignments per routed expert before capacity"""
    num_tokens: Tensor
    """0-d fp32"""
    metric_sums: dict[str, Tensor]
    """fp64 sums of the gate's own `Routing.metric_sums`"""
    load_LE: Tensor
    """fp32, load_E of all MoE layers of the model with the same gate, in order"""
    step_sums: dict[str, Tensor] = field(default_factory=dict)
    """fp64 sums of the gate's own `Routing.step_sums`"""
