"""Folders of studies with metrics made by hand, as tools/compare_gates.py leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.analysis.compare.cell_state import FINISHED, CellState
from megatron.analysis.compare.results import StudyRecord, StudyResults

Row = dict[str, Any]


def train_row(iteration: int, **values: Any) -> Row:
    """A training row of a run with 100 tokens per step, 10 FLOPs per token and 20 ms a step."""
    row = {"kind": "train", "iteration": iteration, "loss": 5.0, "step_time_ms": 20.0}
    return row | {"consumed_tokens": 100 * iteration, "flops_per_token": 10.0} | values


def eval_row(iteration: int, loss: float, kind: str = "eval") -> Row:
    return {
        "kind": kind,
        "iteration": iteration,
        "loss": loss,
        "consumed_tokens": 100 * iteration,
    }


def curve_rows(losses: list[float], **values: Any) -> list[Row]:
    """Rows of a run with an evaluation every 10 iterations, the first at iteration 0."""
    rows: list[Row] = [{"kind": "run", "iteration": 0}]
    for interval, loss in enumerate(losses):
        iteration = 10 * interval
        if iteration:
            rows.append(train_row(iteration, **values))
        rows.append(eval_row(iteration, loss))
    return rows


class StudyFolder:
    """The output folder of a study, to which cells are added."""

    def __init__(
        self, folder: Path, axes: list[str], baseline: dict[str, str], **record: Any
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        StudyRecord("study", axes, baseline, **record).write(folder)

    def add(
        self, axes: dict[str, str], seed: int, rows: list[Row] | None, **state: Any
    ) -> None:
        """Add a cell, finished unless `state` says otherwise; None: without metrics.jsonl."""
        cell_id = "_".join([*axes.values(), f"seed-{seed}"])
        cell_folder = self.folder / "cells" / cell_id
        values = {"flags": {}, "state": FINISHED, "parameters_total": 1000} | state
        CellState(cell_id=cell_id, axes=axes, seed=seed, **values).write(cell_folder)
        if rows is not None:
            lines = [json.dumps(row) + "\n" for row in rows]
            (cell_folder / "metrics.jsonl").write_text("".join(lines))

    def read(self) -> StudyResults:
        return StudyResults.read(self.folder)
