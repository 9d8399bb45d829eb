"""Metrics of training rows that a report shows as curves, in this order."""

from __future__ import annotations

from megatron.analysis.report.charts import CurveAxis
from megatron.analysis.report.runs import ReportRun

MetricCharts = dict[str, tuple[str, CurveAxis]]
"""Title of the chart and its y axis, by name of the metric"""

BALANCE: MetricCharts = {
    "load_imbalance_max_over_mean": (
        "Largest load",
        CurveAxis("load of the busiest expert / mean"),
    ),
    "load_min_over_mean": (
        "Smallest load",
        CurveAxis("load of the idlest expert / mean", True),
    ),
    "load_cv": ("Variation of loads", CurveAxis("coefficient of variation", True)),
    "max_violation": (
        "MaxVio over the interval",
        CurveAxis("MaxVio (largest load / mean − 1)", True),
    ),
    "max_violation_batch": (
        "MaxVio per step",
        CurveAxis("MaxVio (largest load / mean − 1)", True),
    ),
    "dead_expert_fraction": ("Dead experts", CurveAxis("share of experts", True, "~%")),
    "load_entropy": ("Entropy of the load", CurveAxis("entropy, nats")),
    "router_entropy": ("Entropy of the router", CurveAxis("entropy per token, nats")),
    "experts_per_token": ("Experts per token", CurveAxis("experts per token")),
    "experts_per_token_p10": (
        "Experts per token, 10th percentile",
        CurveAxis("experts per token"),
    ),
    "experts_per_token_p90": (
        "Experts per token, 90th percentile",
        CurveAxis("experts per token"),
    ),
    "experts_per_token_p99": (
        "Experts per token, 99th percentile",
        CurveAxis("experts per token"),
    ),
    "dropped_assignment_fraction": (
        "Dropped assignments",
        CurveAxis("share of assignments", True, "~%"),
    ),
    "zero_computation_fraction": (
        "Zero-computation experts",
        CurveAxis("share of assignments", True, "~%"),
    ),
    "choice_margin": (
        "Margin of the choice",
        CurveAxis("last chosen − first not chosen score", True),
    ),
    "near_tie_fraction": ("Near ties", CurveAxis("share of tokens", True, "~%")),
    "top1_probability": ("Largest probability", CurveAxis("mean of the tokens' largest score")),
    "rank_rows_max_over_mean": ("Rows per rank", CurveAxis("rows of the busiest rank / mean")),
    "bias_changed_fraction": (
        "Choices changed by the bias",
        CurveAxis("share of assignments", True, "~%"),
    ),
    "moe_aux_loss": ("Auxiliary loss", CurveAxis("as added to the loss")),
}
"""Metrics of MoE layers"""

PROBE_METRICS: MetricCharts = {
    "routing_churn": (
        "Changed choices (churn)",
        CurveAxis("share since the last probe", True, "~%"),
    ),
    "router_saturation": (
        "Kept choices (saturation)",
        CurveAxis("share since the last checkpoint", format="~%"),
    ),
    "router_drift": (
        "Drift of the router",
        CurveAxis("relative change since the last probe", True),
    ),
    "coactivation_mean": (
        "Co-activation, mean",
        CurveAxis("share of an expert's tokens", True, "~%"),
    ),
    "coactivation_max": (
        "Co-activation, largest",
        CurveAxis("share of an expert's tokens", True, "~%"),
    ),
    "expert_similarity_mean": ("Similarity of experts, mean", CurveAxis("cosine of weights")),
    "expert_similarity_max": ("Similarity of experts, largest", CurveAxis("cosine of weights")),
    "router_similarity_mean": (
        "Similarity of router rows, mean",
        CurveAxis("cosine of weights"),
    ),
    "router_similarity_max": (
        "Similarity of router rows, largest",
        CurveAxis("cosine of weights"),
    ),
}
"""Metrics of the routing probe"""

OPTIMIZATION: MetricCharts = {
    "grad_norm": ("Gradient norm", CurveAxis("norm before clipping")),
    "lr": ("Learning rate", CurveAxis("learning rate", True, "~e")),
    "router_input_rms": ("Input of the router", CurveAxis("root mean square")),
    "router_input_p99": ("Input of the router, 99th percentile", CurveAxis("absolute value")),
}
"""Metrics of the optimizer and of what the router receives"""


def gradient_parts(runs: list[ReportRun]) -> MetricCharts:
    """Return the gradient norms of the model's parts that the runs have recorded."""
    names = {name: None for run in runs for name in run.train.values}
    return {
        name: (f"Gradient norm: {name.partition('/')[2]}", CurveAxis("norm before clipping"))
        for name in names
        if name.startswith("grad_norm/")
    }


def count_metrics(runs: list[ReportRun], charts: MetricCharts) -> int:
    """Return how many of these metrics the runs have recorded."""
    tables = [table for run in runs for table in (run.train, run.probe) if table is not None]
    names = {name for table in tables for name in table.values}
    return len(names & {*charts})
