"""Metrics of one MoE layer, computed on the host from the sums that it counted.

Shape suffixes: C choices (routed and zero-computation experts), E routed experts, N numbers
of experts per token, P ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.magnitude_histogram import magnitude_percentile
from megatron.moe.routing_details import MAX_LISTED_EXPERTS
from megatron.parallel.groups import Groups

_PERCENTILES = (10, 50, 90, 99)

LayerMetrics = dict[str, float]


def load_metrics(assigned_C: Tensor, num_experts: int) -> LayerMetrics:
    """Return how evenly the gate used its routed experts, before capacity.

    - load_min_over_mean, load_cv: smallest load, and standard deviation of the loads, over
      the mean load,
    - max_violation: (largest load - mean load) / mean load, MaxVio of Wang et al. 2024
      (arXiv 2408.15664),
    - dead_expert_fraction: share of the experts without any assignment,
    - load_entropy: entropy in nats of the experts' shares of the assignments; log E when
      the loads are equal.

    Without any assignment all are 0, but for the dead experts.
    """
    load_E = assigned_C[:num_experts]
    mean = load_E.mean()
    some = mean.clamp_min(1 / num_experts)
    share_E = load_E / load_E.sum().clamp_min(1)
    return {
        "load_min_over_mean": float(load_E.min() / some),
        "load_cv": float(load_E.std(correction=0) / some),
        "max_violation": max_violation(load_E),
        "dead_expert_fraction": float((load_E == 0).double().mean()),
        "load_entropy": float(torch.special.entr(share_E).sum()),
    }


def max_violation(load_E: Tensor) -> float:
    """Return (largest load - mean load) / mean load; 0 without any load."""
    mean = load_E.mean()
    return float((load_E.max() - mean) / mean.clamp_min(1 / len(load_E)))


def experts_per_token_percentiles(histogram_N: Tensor) -> LayerMetrics:
    """Return the smallest numbers of experts that at least 10 %, 50 %, ... of the tokens have
    at most; 0 without tokens."""
    below_N = histogram_N.cumsum(0)
    percentiles = {}
    for percent in _PERCENTILES:
        # In integers, because a rounded product may fall on the other side of a count.
        number = int((100 * below_N < percent * below_N[-1]).sum())
        percentiles[f"experts_per_token_p{percent}"] = float(number)
    return percentiles


def detail_metrics(gate: Gate, sums: Mapping[str, Tensor]) -> LayerMetrics:
    """Return the metrics of `routing_details`; those that were not measured are missing.

    - gate_mass_cv: standard deviation over mean of the routed experts' sums of absolute
      weights, the coefficient of variation of their importance (Shazeer et al. 2017),
    - router_entropy: mean entropy in nats of a token's scores divided by their sum,
    - choice_margin: mean difference between a token's lowest selected score and its highest
      score that is not selected,
    - near_tie_fraction: share of the tokens whose two scores bf16 may not tell apart,
    - router_input_rms, router_input_p99: root mean square, and 99th percentile of the
      absolute values, of what the router gets.
    """
    tokens = float(sums.get("detailed_tokens", torch.zeros(())))
    if not tokens:
        return {}
    metrics = {
        "router_input_rms": _ratio(sums, "router_input_squares", "router_input_values") ** 0.5,
        "router_input_p99": magnitude_percentile(sums["router_input_counts"], 99),
    }
    if "gate_mass_C" in sums:
        mass_E = sums["gate_mass_C"][: gate.num_experts]
        mean = mass_E.mean().clamp_min(torch.finfo(torch.float64).tiny)
        metrics["gate_mass_cv"] = float(mass_E.std(correction=0) / mean)
    if "router_entropy_sum" in sums:
        metrics["router_entropy"] = float(sums["router_entropy_sum"]) / tokens
    if "margin_tokens" in sums and sums["margin_tokens"] > 0:
        metrics["choice_margin"] = _ratio(sums, "margin_sum", "margin_tokens")
        metrics["near_tie_fraction"] = _ratio(sums, "near_ties", "margin_tokens")
    return metrics


def _ratio(sums: Mapping[str, Tensor], numerator: str, denominator: str) -> float:
    return float(sums[numerator] / sums[denominator])


def shares_by_expert(total_C: Tensor | None, num_experts: int) -> list[float] | None:
    """Return each routed expert's share of the total of all choices.

    None: it was not counted, or there are more than MAX_LISTED_EXPERTS experts.
    """
    if total_C is None or num_experts > MAX_LISTED_EXPERTS:
        return None
    total = total_C.sum()
    if total != 0:
        total_C = total_C / total
    return total_C[:num_experts].tolist()


def received_rows(dispatched_C: Tensor, num_experts: int, groups: Groups) -> Tensor:
    """Return the rows that this rank sent to each rank of its expert-parallel group: fp64 [P].

    Summed over ranks, these are the rows that each rank received. P is the number of all
    ranks; those of other expert-parallel groups get none from this one.
    """
    sent_P = dispatched_C[:num_experts].view(groups.ep_size, -1).sum(-1)
    first = groups.rank - groups.ep_rank
    rows_P = torch.zeros(groups.world_size, dtype=torch.float64, device=sent_P.device)
    rows_P[first : first + groups.ep_size] = sent_P
    return rows_P


def state_metrics(gate: Gate) -> LayerMetrics:
    """Return the gate's state, see `Gate.state_metrics`."""
    metrics = {}
    for name, value in gate.state_metrics().items():
        value = value.detach().double().cpu()
        if value.dim() == 0:
            metrics[name] = float(value)
            continue
        metrics[f"{name}_min"] = float(value.min())
        metrics[f"{name}_max"] = float(value.max())
        metrics[f"{name}_mean"] = float(value.mean())
        metrics[f"{name}_std"] = float(value.std(correction=0))
    return metrics
