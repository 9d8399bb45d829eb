"""What a reader must know of runs before comparing them: failures, NaN losses, early ends."""

from __future__ import annotations

import numpy as np

from megatron.analysis.report.runs import KindRows, ReportRun
from megatron.analysis.report.words import count_text


def run_problems(run: ReportRun) -> list[str]:
    """Return what is wrong with a run, one sentence each; [] for a run without problems."""
    found = []
    if run.source.state and run.source.state != "finished":
        found.append(f"The study lists it as {run.source.state}.")
    if run.source.error:
        found.append(f"It failed: {run.source.error}")
    if run.problem:
        found.append(f"{run.problem[0].upper()}{run.problem[1:]}.")
    elif run.is_empty:
        found.append("Its metrics file has no training row and no evaluation.")
    found += _losses_without_number(run.train, "training")
    for kind, rows in run.held_out.items():
        found += _losses_without_number(rows, kind)
    return found + _early_end(run) + _skipped(run)


def _losses_without_number(rows: KindRows, what: str) -> list[str]:
    loss_R = rows.values.get("loss")
    if loss_R is None:
        return []
    places = np.flatnonzero(~np.isfinite(loss_R))
    if not len(places):
        return []
    first = count_text(float(rows.iteration_R[places[0]]))
    return [
        f"The {what} loss is not a number in {len(places)} of {len(loss_R)} rows, first at "
        f"iteration {first}."
    ]


def _early_end(run: ReportRun) -> list[str]:
    planned = run.config.get("train", {}).get("train_iters")
    if not isinstance(planned, int) or not planned or not len(run.train):
        return []
    reached = float(run.train.iteration_R[-1])
    # A last interval that is shorter than --log-interval has a row of its own.
    if reached >= planned:
        return []
    return [f"It ended at iteration {count_text(reached)} of {count_text(planned)}."]


def _skipped(run: ReportRun) -> list[str]:
    found = []
    for metric, words in (
        (
            "bad_steps",
            "optimizer steps were skipped, because loss or gradient was not a number",
        ),
        ("loss_spikes", "loss spikes were detected"),
    ):
        values_R = run.train.values.get(metric)
        number = 0.0 if values_R is None else float(np.nansum(values_R))
        if number > 0:
            found.append(f"{count_text(number)} {words}.")
    return found
