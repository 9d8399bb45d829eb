"""Routing metrics computed in plain Python, one assignment and one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass


@dataclass
class RecordedPass:
    """What one forward pass of a layer routed, as lists without padding."""

    step: int
    rank: int
    x: list[list[float]]
    """the router's input by token"""
    experts: list[list[tuple[int, float]]]
    """by token: its choices before capacity, and their weights"""
    dispatched: list[int]
    """rows by choice after capacity"""
    dispatched_by_token: list[int]
    ranked: list[list[float]] | None
    """by token: the scores that its choices were ranked by"""
    selected: list[list[int]] | None
    """by token: the selected columns of `ranked`; None: its choices"""
    shares: list[list[float]] | None
    """by token: scores that need not sum to 1"""


def record_passes(passes: list[RecordedPass], step: int, rank: int):
    """Return an observer of a layer that appends what it routes."""

    def observe(inp, routing, plan) -> None:
        rows = range(len(inp.x_TD))
        if inp.padding_T is not None:
            rows = [t for t in rows if not inp.padding_T[t]]
        experts = {t: [] for t in range(len(inp.x_TD))}
        for t, e, w in zip(
            routing.token_A.tolist(),
            routing.expert_A.tolist(),
            routing.weight_A.tolist(),
            strict=True,
        ):
            experts[t].append((e, w))
        scores = routing.scores
        logits = routing.router_logits_TC
        ranked, shares, selected = logits, None, None
        if logits is not None:
            shares = logits.detach().softmax(-1)
        if scores is not None:
            ranked = ranked if scores.ranked_TC is None else scores.ranked_TC
            shares = shares if scores.share_TC is None else scores.share_TC
            selected = scores.selected_Tk
        x = inp.x_TD.float().tolist()
        passes.append(
            RecordedPass(
                step,
                rank,
                [x[t] for t in rows],
                [experts[t] for t in rows],
                plan.dispatched_C.tolist(),
                [plan.dispatched_T.tolist()[t] for t in rows],
                *(None if t is None else t.tolist() for t in (ranked, selected, shares)),
            )
        )

    return observe


def naive_metrics(
    passes: list[RecordedPass], num_experts: int, ep_size: int, world_size: int
) -> dict[str, float]:
    """Return the metrics of one layer from the passes of all ranks."""
    load = Counter()
    mass = Counter()
    for one in passes:
        for choices in one.experts:
            for expert, weight in choices:
                load[expert] += 1
                mass[expert] += abs(weight)
    loads = [load[e] for e in range(num_experts)]
    masses = [mass[e] for e in range(num_experts)]
    mean = sum(loads) / num_experts
    per_token = sorted(n for one in passes for n in one.dispatched_by_token)
    values = [abs(v) for one in passes for row in one.x for v in row]
    metrics = {
        "load_min_over_mean": min(loads) / mean,
        "load_cv": deviation(loads) / mean,
        "max_violation": (max(loads) - mean) / mean,
        "max_violation_batch": batch_violation(passes, num_experts),
        "dead_expert_fraction": loads.count(0) / num_experts,
        "load_entropy": entropy(loads),
        "gate_mass_cv": deviation(masses) / (sum(masses) / num_experts),
        "router_input_rms": math.sqrt(sum(v * v for v in values) / len(values)),
        "load_by_expert": [n / sum(load.values()) for n in loads],
        "gate_mass_by_expert": [m / sum(mass.values()) for m in masses],
    }
    for percent in (10, 50, 90, 99):
        rank = math.ceil(percent * len(per_token) / 100)
        metrics[f"experts_per_token_p{percent}"] = per_token[rank - 1]
    if ep_size > 1:
        metrics["rank_rows_max_over_mean"] = received(passes, num_experts, ep_size, world_size)
    shares = [row for one in passes for row in one.shares or ()]
    if shares:
        metrics["router_entropy"] = sum(map(entropy, shares)) / len(shares)
    pairs = [pair for one in passes for pair in boundaries(one)]
    if pairs:
        margins = [low - high for low, high in pairs]
        ties = [abs(low - high) <= max(abs(low), abs(high)) / 256 for low, high in pairs]
        metrics["choice_margin"] = sum(margins) / len(margins)
        metrics["near_tie_fraction"] = sum(ties) / len(ties)
    return metrics


def input_percentile(passes: list[RecordedPass], percent: int) -> float:
    """The smallest absolute value of the router's input that a share of all reaches."""
    values = sorted(abs(v) for one in passes for row in one.x for v in row)
    return values[math.ceil(percent * len(values) / 100) - 1]


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def entropy(weights: list[float]) -> float:
    total = sum(weights)
    shares = [weight / total for weight in weights if weight > 0] if total else []
    return -sum(share * math.log(share) for share in shares)


def batch_violation(passes: list[RecordedPass], num_experts: int) -> float:
    """The mean of each step's MaxVio."""
    violations = []
    for step in sorted({one.step for one in passes}):
        loads = Counter()
        for one in passes:
            for choices in one.experts if one.step == step else ():
                loads.update(e for e, _ in choices if e < num_experts)
        mean = sum(loads.values()) / num_experts
        violations.append((max(loads.values()) - mean) / mean)
    return sum(violations) / len(violations)


def received(
    passes: list[RecordedPass], num_experts: int, ep_size: int, world_size: int
) -> float:
    """Largest over mean number of rows that a rank receives."""
    rows = [0] * world_size
    for one in passes:
        for expert in range(num_experts):
            owner = one.rank // ep_size * ep_size + expert // (num_experts // ep_size)
            rows[owner] += one.dispatched[expert]
    return max(rows) / (sum(rows) / world_size)


def boundaries(one: RecordedPass) -> list[tuple[float, float]]:
    """The lowest selected and the highest other score of the tokens that have both."""
    pairs = []
    for t, row in enumerate(one.ranked or ()):
        chosen = {e for e, _ in one.experts[t]}
        if one.selected is not None:
            chosen = set(one.selected[t])
        inside = [row[c] for c in chosen]
        outside = [v for c, v in enumerate(row) if c not in chosen and v > -math.inf]
        if inside and outside:
            pairs.append((min(inside), max(outside)))
    return pairs
