"""Quantiles of a global batch per expert, from histograms that are summed over ranks.

Quantile balancing (Kimi K3) and expert_threshold (arXiv 2603.11535) need, for every expert,
a quantile over the tokens of all ranks and micro-batches. Gathering T x E values would cost
more than the layer; a histogram of 1,000 bins per expert costs 8 kB, which the all-reduce
after the step adds to the loads (256 experts: 2 MB per layer). All ranks must agree on the
range of the bins, so it follows from a buffer that is the same on all ranks.

Shape suffixes: T tokens, E experts, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 1000
"""Bins per expert, as in Kimi K3's report"""


def histogram(values_TE: Tensor, low_E: Tensor, high_E: Tensor) -> Tensor:
    """Count values in equal bins of [low, high].

    Values out of the range are counted in the first or the last bin, so a quantile that
    lies outside is found over several steps when the range follows the result.

    Args:
        values_TE: fp32, without gradient.
        low_E: lower end of each expert's range.
        high_E: upper end, above the lower one.
    Returns:
        fp32 [E, B].
    """
    num_experts = values_TE.shape[1]
    position_TE = (values_TE - low_E) / (high_E - low_E) * NUM_BINS
    # A NaN would be no index. The step that contains it is skipped, with its counts.
    bin_TE = position_TE.nan_to_num(0.0).clamp(0, NUM_BINS - 1).long()
    expert_E = torch.arange(num_experts, device=values_TE.device)
    flat_A = (expert_E * NUM_BINS + bin_TE).flatten()
    counts = torch.zeros(num_experts * NUM_BINS, device=values_TE.device)
    counts.scatter_add_(0, flat_A, torch.ones_like(flat_A, dtype=torch.float32))
    return counts.view(num_experts, NUM_BINS)


def quantile(counts_EB: Tensor, low_E: Tensor, high_E: Tensor, q: float) -> Tensor:
    """Return the value below which a share `q` of each expert's values lies.

    It is interpolated linearly within its bin, so it is exact up to the width of a bin.

    Args:
        counts_EB: `histogram`, summed over ranks and micro-batches; at least one value per
            expert.
        q: in (0, 1].
    Returns:
        fp64 [E].
    """
    counts_EB = counts_EB.double()
    below_EB = counts_EB.cumsum(-1)
    target_E1 = q * below_EB[:, -1:]
    # The first bin up to whose end the share is reached; its count is never 0.
    bin_E1 = torch.searchsorted(below_EB, target_E1).clamp_max(NUM_BINS - 1)
    count_E1 = counts_EB.gather(-1, bin_E1)
    before_E1 = below_EB.gather(-1, bin_E1) - count_E1
    fraction_E1 = (target_E1 - before_E1) / count_E1
    position_E = (bin_E1 + fraction_E1).squeeze(-1) / NUM_BINS
    return low_E + position_E * (high_E - low_E).double()
