"""Functions that several gates share.

Shape suffixes: T tokens, D hidden, E experts, G groups of experts, m experts of a
group, k experts per token, N features or vectors, P dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_LENGTH = 1e-8
"""Length up to which a vector counts as zero; its square does not underflow in fp32."""


def group_limited_scores(score_TE: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """Mask the scores of all groups but the best `topk_group` of each token.

    Groups are ranked by the sum of their `best` highest scores. Masked scores are -inf
    rather than 0, because a score may be negative or may have underflowed to 0.
    """
    score_TGm = score_TE.unflatten(-1, (n_group, score_TE.shape[-1] // n_group))
    highest_TGb = score_TGm.topk(min(best, score_TGm.shape[-1]), dim=-1).values
    group_Tg = highest_TGb.sum(-1).topk(topk_group, dim=-1).indices
    masked_TG = torch.ones_like(score_TGm[..., 0], dtype=torch.bool).scatter(
        -1, group_Tg, False
    )
    return score_TGm.masked_fill(masked_TG[..., None], float("-inf")).flatten(-2)


def make_linear(
    columns: int, rows: int, std: float, generator: torch.Generator, *, bias: bool = False
) -> nn.Linear:
    """Return a [rows, columns] linear layer drawn from N(0, std^2); its bias is 0."""
    linear = nn.Linear(columns, rows, bias=bias)
    nn.init.normal_(linear.weight, std=std, generator=generator)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def linear_fp32(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """Compute x W^T, plus the bias if there is one, in fp32, even under autocast.

    Rounded to bf16, the logits of different experts would often be equal.
    """
    bias = linear.bias
    if bias is not None:
        bias = bias.float()
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), linear.weight.float(), bias)


def sum_and_square_sum(rows_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum fp32 values and their squares over tokens in fp64.

    The sums are exact enough to compute the variance from them. The rows are not copied
    to fp64: their mean is subtracted before they are squared in fp32.
    """
    num_tokens = len(rows_TN)
    total_N = rows_TN.sum(0, dtype=torch.float64)
    mean_N = (total_N / max(1, num_tokens)).float()
    square_N = (rows_TN - mean_N).square().sum(0, dtype=torch.float64)
    wide_mean_N = mean_N.double()
    return total_N, square_N + wide_mean_N * (2 * total_N - num_tokens * wide_mean_N)


SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
"""softmax(z), sigmoid(z) and sqrt(log(1 + exp(z))), the last from DeepSeek-V4"""

_LINEAR_LOG_SOFTPLUS = -15.0
"""Logit up to which log(log(1 + exp(z))) is z in fp32: the error is exp(z) / 2."""


def log_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Return values whose softmax is the scores divided by their sum.

    They are log s for sigmoid and sqrtsoftplus, which do not underflow where s does, and
    the logits for softmax.
    """
    if score_function == "sigmoid":
        return F.logsigmoid(logits_TE)
    if score_function == "sqrtsoftplus":
        is_low_TE = logits_TE < _LINEAR_LOG_SOFTPLUS
        # The branch that is not selected must have a finite gradient, too.
        log_TE = F.softplus(logits_TE.clamp_min(_LINEAR_LOG_SOFTPLUS)).log()
        return 0.5 * torch.where(is_low_TE, logits_TE, log_TE)
    return logits_TE


def expert_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Return the scores s of all experts.

    Args:
        score_function: one of `SCORE_FUNCTIONS`.
    """
    if score_function == "sigmoid":
        return logits_TE.sigmoid()
    if score_function == "sqrtsoftplus":
        # The square root itself has an infinite gradient where softplus underflows.
        return log_scores(logits_TE, score_function).exp()
    return logits_TE.softmax(-1)


def normalized_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Return the scores divided by their sum.

    They are computed as softmax(log s), which is the same and stays exact where the
    scores themselves underflow to 0.
    """
    return log_scores(logits_TE, score_function).softmax(-1)


def selected_weights(
    logits_TE: Tensor,
    expert_Tk: Tensor,
    score_function: str,
    norm: bool,
    floor: float = 0.0,
    normalized_TE: Tensor | None = None,
) -> Tensor:
    """Return the weights [T, k] of selected experts.

    Args:
        logits_TE: logits of all experts, which softmax needs.
        norm: divide the selected scores by their sum.
        floor: lower bound of that sum (ERNIE 4.5); 0: none.
        normalized_TE: `normalized_scores` of all experts, if the caller has them.
    """
    logit_Tk = logits_TE.gather(-1, expert_Tk)
    if norm and not floor:
        return normalized_scores(logit_Tk, score_function)
    if score_function == "softmax":
        if normalized_TE is None:
            normalized_TE = logits_TE.softmax(-1)
        score_Tk = normalized_TE.gather(-1, expert_Tk)
    else:
        score_Tk = expert_scores(logit_Tk, score_function)
    if norm:
        score_Tk = score_Tk / score_Tk.sum(-1, keepdim=True).clamp_min(floor)
    return score_Tk


def select_topk(
    logits_TE: Tensor, k: int, score_function: str, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the k best experts of each token.

    Experts are ranked by logit, which orders them as scores do and does not saturate.

    Args:
        score_function: one of `SCORE_FUNCTIONS`.
        norm: divide the selected scores by their sum.
    Returns:
        Scores of the selected experts [T, k], the experts [T, k], and the scores of all
        experts divided by their sum [T, E].
    """
    expert_Tk = logits_TE.topk(k, dim=-1).indices
    normalized_TE = normalized_scores(logits_TE, score_function)
    score_Tk = selected_weights(
        logits_TE, expert_Tk, score_function, norm, normalized_TE=normalized_TE
    )
    return score_Tk, expert_Tk, normalized_TE


class ZeroExpert(nn.Module):
    """A zero-computation expert that returns zeros. The layer dispatches no rows to it."""

    is_zero = True

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)


def unit_vectors(vectors_NP: Tensor) -> Tensor:
    """Scale vectors to length 1; (almost) zero vectors become 0 without gradient."""
    length_N1 = torch.linalg.vector_norm(vectors_NP, dim=-1, keepdim=True)
    nonzero_N1 = length_N1 > _MIN_LENGTH
    divisor_N1 = torch.where(nonzero_N1, length_N1, 1.0)
    return torch.where(nonzero_N1, vectors_NP / divisor_N1, 0.0)
