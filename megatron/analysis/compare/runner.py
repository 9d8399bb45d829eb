"""Runs the cells of a study, several at a time on given devices, and records what becomes of them.

A finished cell is never run again. An interrupted or killed cell continues from its checkpoints, a
failed one is tried again with the next start of the runner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_process import (
    CellLocked,
    CellProcess,
    lock_deadline,
    pretrain_command,
)
from megatron.analysis.compare.cell_state import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    PLANNED,
    RUNNING,
    CellState,
)
from megatron.analysis.compare.changed_cells import conflict
from megatron.analysis.compare.devices import Device, threads_per_rank
from megatron.analysis.compare.measured import completed_iterations, measure
from megatron.analysis.compare.output import initial_state
from megatron.analysis.compare.plan import PlannedCell, PlannedTuning, StudyPlan
from megatron.analysis.compare.tuning import choose, shared_run
from megatron.log import get_logger

if TYPE_CHECKING:
    from tqdm import tqdm

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class RunnerOptions:
    """How the cells are run."""

    program: Path
    """pretrain_gpt.py"""
    devices: Sequence[Device]
    """each runs one cell at a time"""
    remove_checkpoints: bool = False
    """delete the checkpoints of a cell that has finished"""


@dataclass
class RunSummary:
    """Cells by what became of them; those that other starts of the runner finished count, too."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """error by cell"""
    interrupted: list[str] = field(default_factory=list)
    stop_signal: int = 0
    """signal that ended the runner; 0: it came to the end"""


@dataclass(frozen=True)
class _Running:
    planned: PlannedCell
    state: CellState
    process: CellProcess


@dataclass(frozen=True)
class _Locked:
    """A cell that processes of a killed runner still run."""

    planned: PlannedCell
    deadline: float
    """until when it is waited for, as `time.monotonic`"""


class StudyRunner:
    """Runs all cells of a plan that have not finished.

    Args:
        plan: the study, planned.
        folders: its output folders, which the caller has locked.
        options: devices and the program.
    """

    def __init__(self, plan: StudyPlan, folders: CellFolders, options: RunnerOptions):
        self.plan = plan
        self.folders = folders
        self.options = options
        self.summary = RunSummary()
        self._threads = threads_per_rank(options.devices, plan.study.ranks)
        self._running: list[_Running] = []
        self._waiting: list[PlannedCell] = []
        self._locked: dict[str, _Locked] = {}
        self._tunings: list[PlannedTuning] = list(plan.tunings)
        self._signals: list[int] = []
        self._num_runs = len(plan.runs)
        self._bar: tqdm | None = None

    def run(self) -> RunSummary:
        """Run the cells to the end, or until SIGINT or SIGTERM; a second signal kills them.

        Raises:
            OSError: a file of the study cannot be written.
        """
        from tqdm import tqdm

        self._waiting = self._in_running_order()
        with self._stop_signals(), tqdm(total=self._num_runs, unit="cell", disable=None) as bar:
            self._bar = bar
            try:
                while self._has_more() and not self._signals:
                    self._start_cells()
                    self._collect()
                    time.sleep(_POLL_SECONDS)
                self._stop()
            finally:
                for running in self._running:  # after an error
                    running.process.kill()
        return self.summary

    def _has_more(self) -> bool:
        return bool(self._waiting or self._locked or self._running)

    # Starting

    def _in_running_order(self) -> list[PlannedCell]:
        """Return all runs: those that tune flags, then all configurations seed by seed.

        A study that is stopped early has then compared all configurations with some seeds, and
        a slow drift of the machine's speed does not fall on one configuration.
        """
        seeds = {seed: place for place, seed in enumerate(self.plan.study.seeds)}
        cells = sorted(self.plan.cells, key=lambda run: seeds[run.cell.seed])
        return [*(run for tuning in self.plan.tunings for run in tuning.cells), *cells]

    def _start_cells(self) -> None:
        """Start cells on the devices that are free."""
        busy = [running.process.device for running in self._running]
        free = list(self.options.devices)
        for device in busy:
            free.remove(device)
        for locked in list(self._locked.values()):
            if free and self._start(locked.planned, free[0]):
                free.pop(0)
        while free and not self._signals:
            planned = self._next_cell()
            if planned is None:
                return
            if self._start(planned, free[0]):
                free.pop(0)

    def _next_cell(self) -> PlannedCell | None:
        """Return the next cell that has to run and whose tuned flag is known; None: none is ready.

        Cells that have finished before, and those whose tuning failed, are counted and passed.
        """
        for planned in list(self._waiting):
            resolved = self._resolved(planned)
            if resolved is None:
                continue
            self._waiting.remove(planned)
            is_tuned = planned.cell.tuning is not None
            if not self._is_settled(resolved, is_tuned=is_tuned):
                return resolved
        return None

    def _resolved(self, planned: PlannedCell) -> PlannedCell | None:
        """Return the cell with its tuned flag; None: its tuning has not ended."""
        if planned.cell.tuning is None:
            return planned
        tuning = self._tuning_of(planned)
        unsettled = [*self._waiting, *(locked.planned for locked in self._locked.values())]
        unsettled += [running.planned for running in self._running]
        if any(run in unsettled for run in tuning.cells):
            return None
        choice = choose(tuning, self.folders)
        if choice is None:
            return planned
        return replace(planned, cell=planned.cell.with_tuned(choice["value"]))

    def _tuning_of(self, planned: PlannedCell) -> PlannedTuning:
        return next(t for t in self._tunings if t.group.axes == planned.cell.axes)

    def _tuning_record(self, planned: PlannedCell) -> dict | None:
        """Return how the tuned flag of a cell was chosen; None: it has none."""
        if planned.cell.is_tuning:
            return None
        for tuning in self._tunings:
            if tuning.group.axes == planned.cell.axes:
                return choose(tuning, self.folders)
        return None

    def _is_settled(self, planned: PlannedCell, *, is_tuned: bool) -> bool:
        """Return whether a cell need not run: it has finished, or it cannot be run.

        A finished cell keeps its results and the value with which it ran, whatever its grid
        chooses now: its other seeds do not run with another one.

        Args:
            is_tuned: the cell has a flag of a grid.
        """
        cell = planned.cell
        state = CellState.read(self.folders.of(cell)) or initial_state(planned)
        is_finished = state.state == FINISHED
        if cell.tuning is not None and not is_finished:
            error = f"every run that tunes --{cell.tuning.flag} failed or has no finite loss"
            self._record(planned, replace(state, state=FAILED, error=error))
            return True
        # Only a tuned value can differ here: other changes are refused before the start.
        error = ""
        if is_tuned and cell.tuning is None:
            error = conflict(cell, self.folders)
        if error:
            get_logger().warning("cell %s: %s", cell.cell_id, error)
            self._count(replace(state, state=FAILED, error=error))
            return True
        if is_finished:
            self._settle(planned, state)
            return True
        return self._adopt_tuning_run(planned)

    def _settle(self, planned: PlannedCell, state: CellState) -> None:
        """Count a cell that has finished before, and do what was asked for since."""
        folder = self.folders.of(planned.cell)
        tuning = self._tuning_record(planned)
        if tuning is not None and tuning != state.tuning:  # its grid has other losses now
            replace(state, tuning=tuning).write(folder)
        self._remove_checkpoints(folder)
        self._count(state)

    def _adopt_tuning_run(self, planned: PlannedCell) -> bool:
        """Take the results of the tuning run with the same flags; return whether there is one."""
        shared = shared_run(planned, self._tunings, self.folders)
        if shared is None:
            return False
        state = replace(
            shared.state,
            cell_id=planned.cell.cell_id,
            axes=planned.cell.axes,
            tuning=self._tuning_record(planned),
            same_as=shared.relative_path,
        )
        self._record(planned, state)
        return True

    def _start(self, planned: PlannedCell, device: Device) -> bool:
        """Start a cell, and return whether its processes run."""
        cell = planned.cell
        folder = self.folders.of(cell)
        before = CellState.read(folder) or initial_state(planned)
        state = replace(
            initial_state(planned),
            state=RUNNING,
            attempts=before.attempts + 1,
            wall_seconds=before.wall_seconds,
            device=device.name,
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            tuning=self._tuning_record(planned),
        )
        command = pretrain_command(self.options.program, cell.run_words(folder))
        try:
            process = CellProcess.start(folder, command, device, cell.ranks, self._threads)
        except CellLocked:
            self._wait_for_lock(planned, before)
            return False
        self._locked.pop(cell.cell_id, None)
        state.write(folder)
        self._running.append(_Running(planned, state, process))
        get_logger().info("cell %s: started on %s", cell.cell_id, device.name)
        return True

    def _wait_for_lock(self, planned: PlannedCell, state: CellState) -> None:
        """Let other cells run until those processes have ended, or have had their time."""
        cell_id = planned.cell.cell_id
        locked = self._locked.get(cell_id)
        if locked is None:
            self._locked[cell_id] = _Locked(planned, lock_deadline())
            get_logger().info("cell %s: waiting for an earlier process", cell_id)
        elif time.monotonic() > locked.deadline:
            del self._locked[cell_id]
            error = "processes of an earlier runner still run it; end them"
            self._record(planned, replace(state, state=FAILED, error=error))

    # Ending

    def _collect(self) -> None:
        """Record the cells whose processes have ended."""
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            state = self._ended_state(running, code)
            self._record(running.planned, state)
            if state.state == FINISHED:
                self._remove_checkpoints(running.process.folder)

    def _ended_state(self, running: _Running, code: int) -> CellState:
        """Return the state of a cell whose processes have ended."""
        planned = running.planned
        folder = running.process.folder
        wall_seconds = running.state.wall_seconds + running.process.seconds
        ended = replace(running.state, exit_code=code, wall_seconds=wall_seconds)
        metrics_path = folder / "metrics.jsonl"
        is_complete = code == 0 and completed_iterations(metrics_path) >= planned.iterations
        if not is_complete and self._signals:
            return replace(ended, state=INTERRUPTED)
        if code != 0:
            return replace(ended, state=FAILED, error=running.process.error_line(code))
        if not is_complete:
            return replace(ended, state=INTERRUPTED, error="it was stopped before its end")
        try:
            measured = measure(
                metrics_path, planned.size, planned.iterations, self.plan.study.held_out
            )
        except ValueError as error:
            return replace(ended, state=FAILED, error=str(error))
        return replace(ended, state=FINISHED, **dataclasses.asdict(measured))

    def _remove_checkpoints(self, folder: Path) -> None:
        """Delete the checkpoints of a finished cell if the options say so."""
        if not self.options.remove_checkpoints:
            return
        try:
            shutil.rmtree(folder / "checkpoints")
        except FileNotFoundError:
            pass  # of an earlier start, or of a cell that has the results of a grid's run
        except OSError as error:
            get_logger().warning("cell %s: its checkpoints remain: %s", folder.name, error)

    def _stop(self) -> None:
        """Let the running cells save their checkpoints and end, if a signal has come."""
        if not self._signals:
            return
        self.summary.stop_signal = self._signals[0]
        if self._running:
            get_logger().info(
                "%s: %d running cell(s) save a checkpoint and end; a second signal ends them "
                "immediately",
                signal.Signals(self._signals[0]).name,
                len(self._running),
            )
        for running in self._running:
            running.process.terminate()
        while self._running:
            if len(self._signals) > 1:
                for running in self._running:
                    running.process.kill()
            self._collect()
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of ending."""
        previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, self._note_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, _: object) -> None:
        self._signals.append(number)

    # Records

    def _record(self, planned: PlannedCell, state: CellState) -> None:
        """Write the state of a cell that has ended, and log it."""
        state.write(self.folders.of(planned.cell))
        self._count(state)
        message = f"cell {state.cell_id}: {state.state}"
        if state.state == FINISHED:
            message += (
                f" in {state.wall_seconds:.1f} s, held-out loss {state.held_out_loss:.4f}"
            )
        if state.same_as:
            message += " (the tuning run with the same flags)"
        if state.error:
            message += f": {state.error}"
        get_logger().info("%s", message)

    def _count(self, state: CellState) -> None:
        if state.state == FINISHED:
            self.summary.finished.append(state.cell_id)
        elif state.state == FAILED:
            self.summary.failed[state.cell_id] = state.error
        elif state.state != PLANNED:
            self.summary.interrupted.append(state.cell_id)
        if self._bar is not None:
            self._bar.update()
