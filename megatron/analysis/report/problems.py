"""What a reader must know of runs before comparing them: failures, NaN losses, early ends."""

from __future__ import annotations

import math

import numpy as np

from megatron.analysis.report.runs import KindRows, ReportRun
from megatron.analysis.report.words import count_text
from megatron.config.training import LENGTH_FIELDS


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
    """Compare where the training rows end with the length of the run, in the unit of its flag.

    A last interval that is shorter than --log-interval has a row of its own.
    """
    train = run.config.get("train", {})
    lengths = {unit: train.get(name) for unit, name in LENGTH_FIELDS.items()}
    found = [(unit, planned) for unit, planned in lengths.items() if planned]
    if not found or not len(run.train):
        return []
    unit, planned = found[0]
    iteration = float(run.train.iteration_R[-1])
    reached = iteration
    least = planned
    if unit != "iterations":
        reached = float(run.train.tokens_R[-1])
    if unit == "samples":
        reached /= run.config.get("model", {}).get("seq_length") or math.nan
        # A last step that would exceed the length is left out.
        least = planned - _step_samples(run) + 1
    if not reached < least:
        return []
    end = f"It ended at iteration {count_text(iteration)}"
    if unit == "iterations":
        return [f"{end} of {count_text(planned)}."]
    return [f"{end}, after {count_text(reached)} of {count_text(planned)} {unit}."]


def _step_samples(run: ReportRun) -> int:
    """Return the samples of a step after a ramp-up."""
    train = run.config["train"]
    ranks = run.start("world_size") or 1
    return train.get("global_batch_size") or train.get("micro_batch_size", 1) * ranks


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
