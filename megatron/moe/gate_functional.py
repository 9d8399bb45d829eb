"""Functions that several gates share.

Shape suffixes: T tokens, D hidden, E experts, G groups of experts, m experts of a
group, k experts per token, N features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def make_linear(columns: int, rows: int, std: float, generator: torch.Generator) -> nn.Linear:
    """Return a bias-free [rows, columns] linear layer drawn from N(0, std^2)."""
    linear = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(linear.weight, std=std, generator=generator)
    return linear


def linear_fp32(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """Compute x W^T in fp32, even under autocast.

    Rounded to bf16, the logits of different experts would often be equal.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), linear.weight.float())


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


def normalized_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Return the scores, softmax or sigmoid of the logits, divided by their sum.

    Normalised sigmoids are computed as softmax(log sigmoid(z)), which is the same and
    stays exact where the sigmoids themselves underflow to 0.
    """
    if score_function == "sigmoid":
        logits_TE = F.logsigmoid(logits_TE)
    return logits_TE.softmax(-1)


def select_topk(
    logits_TE: Tensor, k: int, score_function: str, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the k best experts of each token.

    Experts are ranked by logit, which orders them as scores do and does not saturate.

    Args:
        score_function: softmax or sigmoid.
        norm: divide the selected scores by their sum.
    Returns:
        Scores of the selected experts [T, k], the experts [T, k], and the scores of all
        experts divided by their sum [T, E].
    """
    logit_Tk, expert_Tk = logits_TE.topk(k, dim=-1)
    normalized_TE = normalized_scores(logits_TE, score_function)
    if norm:
        score_Tk = normalized_scores(logit_Tk, score_function)
    elif score_function == "softmax":
        score_Tk = normalized_TE.gather(-1, expert_Tk)
    else:
        score_Tk = logit_Tk.sigmoid()
    return score_Tk, expert_Tk, normalized_TE
