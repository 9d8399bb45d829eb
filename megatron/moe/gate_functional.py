"""Functions that several gates share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_limited_scores(score_TE: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """The scores in the `topk_group` groups whose `best` highest scores have the largest sum, -inf elsewhere.

    Not 0: a score may be negative, or have underflowed to 0.
    """
    score_TGm = score_TE.unflatten(-1, (n_group, score_TE.shape[-1] // n_group))
    highest_TGb = score_TGm.topk(min(best, score_TGm.shape[-1]), dim=-1).values
    group_Tg = highest_TGb.sum(-1).topk(topk_group, dim=-1).indices
    closed_TG = torch.ones_like(score_TGm[..., 0], dtype=torch.bool).scatter(
        -1, group_Tg, False
    )
    return score_TGm.masked_fill(closed_TG[..., None], float("-inf")).flatten(-2)


def make_linear(columns: int, rows: int, std: float, generator: torch.Generator) -> nn.Linear:
    """A bias-free [rows, columns] linear layer drawn from N(0, std^2)."""
    linear = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(linear.weight, std=std, generator=generator)
    return linear


def linear_fp32(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """x W^T in fp32 even under autocast: bf16 logits would tie experts that differ."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), linear.weight.float())


def sum_and_square_sum(rows_TN: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 sums over tokens of fp32 values and of their squares, so exact that the variance can be had from them.

    Without an fp64 copy of the rows: squared in fp32 is what is left of them without their mean.
    """
    number, total_N = len(rows_TN), rows_TN.sum(0, dtype=torch.float64)
    mean_N = (total_N / max(1, number)).float()
    square_N = (rows_TN - mean_N).square().sum(0, dtype=torch.float64)
    return total_N, square_N + mean_N.double() * (2 * total_N - number * mean_N.double())


def normalized_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores, softmax or sigmoid of the logits, divided by their sum.

    For sigmoid as softmax(log sigmoid(z)), which is the same, also where the scores themselves underflow to 0.
    """
    return (logits_TE if score_function == "softmax" else F.logsigmoid(logits_TE)).softmax(-1)


def select_topk(
    logits_TE: Tensor, k: int, score_function: str, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [T, k] of the k best experts, with `norm` divided by their sum; the experts; the shares of all [T, E]).

    The best by logit, which orders experts as scores do and does not saturate.
    """
    logit_Tk, expert_Tk = logits_TE.topk(k, dim=-1)
    shares_TE = normalized_scores(logits_TE, score_function)
    if norm:
        score_Tk = normalized_scores(logit_Tk, score_function)
    else:
        score_Tk = (
            shares_TE.gather(-1, expert_Tk)
            if score_function == "softmax"
            else logit_Tk.sigmoid()
        )
    return score_Tk, expert_Tk, shares_TE
