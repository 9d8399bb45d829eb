"""Running the cells of a study, with a stand-in for pretrain_gpt.py that has the same flags."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from helpers.studies import FAKE_PROGRAM, run_study, tiny_plan
from helpers.waiting import wait_until
from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.cell_process import CellLocked, CellProcess, error_of_log
from megatron.analysis.compare.cell_size import CellSize
from megatron.analysis.compare.cell_state import CellState
from megatron.analysis.compare.devices import Device, parse_devices, threads_per_rank
from megatron.analysis.compare.measured import (
    Measured,
    completed_iterations,
    experts_by_layer,
    measure,
)
from megatron.analysis.compare.plan_table import plan_text
from megatron.analysis.compare.results import StudyResults
from megatron.analysis.compare.results_table import results_text
from megatron.log import get_logger
from megatron.training.metrics_file import read_metrics, without_repeated_steps

IDS = ["gate-topk_seed-1", "gate-topk_seed-2", "gate-xmoe_seed-1", "gate-xmoe_seed-2"]
COEFFICIENTS = [0.1, 0.01, 0.001]
"""The stand-in has the lowest loss with 0.01"""


def cell(out: Path, cell_id: str) -> CellState:
    return CellState.read(out / "cells" / cell_id)


def starts(out: Path, cell_id: str) -> list[str]:
    """Lines of a cell's log: one for each time its program started."""
    return (out / "cells" / cell_id / "log.txt").read_text().splitlines()


def rows(results: StudyResults) -> dict[str, list[dict]]:
    found = {}
    for result in results:
        curve = without_repeated_steps(read_metrics(result.metrics_path))
        found[result.cell_id] = [row for row in curve if row["kind"] != "run"]
    return found


def test_all_cells_run_and_are_measured(tmp_path):
    summary, results = run_study(tmp_path)
    assert summary.finished == [IDS[0], IDS[2], IDS[1], IDS[3]]  # seed by seed
    assert not summary.failed and not summary.interrupted
    assert [result.cell_id for result in results] == IDS
    first = results.cells[0]
    assert first.state == "finished" and first.is_finished and first.attempts == 1
    assert first.held_out_loss == pytest.approx(5 - 0.2 + 0.001)
    assert first.experts_per_token == 2.0
    assert (first.parameters_total, first.active_parameters) == (28992, 24896.0)
    assert first.wall_seconds > 0
    assert cell(tmp_path / "out", IDS[0]).flops_per_token == 2000.0
    # 20 steps of 4 samples with 32 tokens
    text = plan_text(tiny_plan(tmp_path), CellFolders(tmp_path / "out"))
    assert f"{20 * 4 * 32 * 2000.0:.3g}" == "5.12e+06" and text.count("5.12e+06") == 2
    command = (first.folder / "command.txt").read_text()
    assert "CUDA_VISIBLE_DEVICES=''" in command and f"{FAKE_PROGRAM} --num-layers=2" in command
    assert f"--save {first.folder}/checkpoints --load {first.folder}/checkpoints" in command


def test_finished_cells_never_run_again(tmp_path):
    _, before = run_study(tmp_path)
    summary, after = run_study(tmp_path)
    assert after == before and sorted(summary.finished) == IDS
    assert all(len(starts(tmp_path / "out", cell_id)) == 1 for cell_id in IDS)


def test_failed_cells_are_recorded_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "gate-topk_seed-2")
    summary, results = run_study(tmp_path)
    assert summary.failed == {IDS[1]: "the fake run fails"}
    assert sorted(summary.finished) == [IDS[0], *IDS[2:]]
    failed = cell(tmp_path / "out", IDS[1])
    assert (failed.state, failed.exit_code, failed.attempts) == ("failed", 2, 1)
    assert results.cells[1].error == "the fake run fails"
    assert "failed" in results_text(results)
    monkeypatch.delenv("FAKE_FAIL")
    summary, results = run_study(tmp_path)
    assert sorted(summary.finished) == IDS and not results.cells[1].error
    assert results.cells[1].attempts == 2 and len(starts(tmp_path / "out", IDS[0])) == 1


def test_two_cells_run_at_a_time(tmp_path, monkeypatch):
    """Two seeds of topk wait for each other: they hold until both have reached their middle."""
    monkeypatch.setenv("FAKE_HOLD", "gate-topk")
    folders = [tmp_path / "out" / "cells" / cell_id for cell_id in IDS[:2]]

    def release() -> None:
        wait_until(lambda: all((f / "holds").exists() for f in folders), "two running cells")
        for folder in folders:
            (folder / "go").touch()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    summary, results = run_study(tmp_path, devices="cpu,cpu")
    thread.join()
    assert sorted(summary.finished) == IDS
    one_by_one = tmp_path / "one"
    one_by_one.mkdir()
    monkeypatch.delenv("FAKE_HOLD")
    assert rows(results) == rows(run_study(one_by_one)[1])


def test_signal_ends_cells_which_then_continue(tmp_path, monkeypatch):
    """The running cell saves a checkpoint; the next start continues it from there."""
    monkeypatch.setenv("FAKE_HOLD", IDS[1])
    out = tmp_path / "out"

    def interrupt() -> None:
        wait_until((out / "cells" / IDS[1] / "holds").exists, "the third cell")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    summary, results = run_study(tmp_path)
    thread.join()
    assert summary.stop_signal == signal.SIGTERM
    assert (summary.finished, summary.interrupted) == ([IDS[0], IDS[2]], [IDS[1]])
    assert [result.state for result in results] == [
        "finished",
        "interrupted",
        "finished",
        "planned",
    ]
    monkeypatch.delenv("FAKE_HOLD")
    summary, results = run_study(tmp_path)
    assert sorted(summary.finished) == IDS
    assert starts(out, IDS[1]) == ["starting at iteration 0", "starting at iteration 10"]
    uninterrupted = tmp_path / "other"
    uninterrupted.mkdir()
    assert rows(results) == rows(run_study(uninterrupted)[1])


def test_second_signal_kills_the_cells(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_HOLD", IDS[0])
    monkeypatch.setenv("FAKE_IGNORES", IDS[0])
    log = tmp_path / "out" / "cells" / IDS[0] / "holds"

    def interrupt() -> None:
        wait_until(log.exists, "the first cell")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    summary, _ = run_study(tmp_path)
    thread.join()
    assert summary.stop_signal == signal.SIGINT and summary.interrupted == [IDS[0]]
    assert cell(tmp_path / "out", IDS[0]).exit_code == -signal.SIGKILL


def test_stopped_runs_are_not_finished(tmp_path):
    """A run that ends early with exit code 0, as after a SIGTERM by a scheduler, continues."""
    stops = tmp_path / "stops.py"
    text = FAKE_PROGRAM.read_text()
    stops.write_text(text.replace("self.is_stopping = False", "self.is_stopping = True"))
    summary, results = run_study(tmp_path, program=stops, seeds=[1])
    assert summary.interrupted == [IDS[0], IDS[2]] and not summary.finished
    assert results.cells[0].error == "it was stopped before its end"
    summary, _ = run_study(tmp_path, seeds=[1])
    assert summary.finished == [IDS[0], IDS[2]]
    assert starts(tmp_path / "out", IDS[0])[1] == "starting at iteration 1"


def test_runs_without_held_out_loss_fail(tmp_path):
    summary, _ = run_study(tmp_path, seeds=[1], eval={"set": "test"})
    assert "has no loss of kind test at iteration 20" in summary.failed[IDS[0]]


def test_measured_experts_are_compared(tmp_path, monkeypatch):
    """A dynamic gate that uses more experts than declared is flagged after the run."""
    match = {"reference": {"gate": "topk"}, "tolerance": 0.05}
    monkeypatch.setenv("FAKE_EXPERTS", "3")
    _, results = run_study(tmp_path, match=match)
    flagged = [result for result in results if result.mismatch]
    assert [result.cell_id for result in flagged] == IDS[2:]
    # Each expert of the one MoE layer has 2 x 32 x 32 parameters.
    expected = "active parameters 26,944 against 24,896 (8.2% apart; tolerance 5.0%)"
    assert flagged[0].mismatch == expected
    assert flagged[0].active_parameters == 24896 + 2048
    assert f"not matched: {IDS[2]}: measured {expected}" in results_text(results)


def test_checkpoints_are_removed_on_request(tmp_path, monkeypatch):
    """Those of the cells that finish, and of those that have finished before."""
    folders = [tmp_path / "out" / "cells" / cell_id for cell_id in IDS]
    run_study(tmp_path, seeds=[1])
    assert (folders[0] / "checkpoints").exists()
    monkeypatch.setenv("FAKE_FAIL", IDS[1])
    run_study(tmp_path, remove_checkpoints=True)
    there = [(folder / "checkpoints").exists() for folder in folders]
    assert there == [False, True, False, False]
    run_study(tmp_path, remove_checkpoints=True)  # there are none any more


def test_checkpoints_are_removed_after_the_result_is_recorded(tmp_path, monkeypatch):
    """Those that cannot be removed are reported, and the cell has finished all the same."""
    states = []

    def refuse(path: Path) -> None:
        states.append(CellState.read(path.parent).state)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("megatron.analysis.compare.runner.shutil.rmtree", refuse)
    messages = []
    monkeypatch.setattr(
        get_logger(), "warning", lambda text, *values: messages.append(text % values)
    )
    summary, _ = run_study(tmp_path, seeds=[1], remove_checkpoints=True)
    assert summary.finished == [IDS[0], IDS[2]] and states == ["finished"] * 2
    assert messages[0].startswith(f"cell {IDS[0]}: its checkpoints remain: [Errno 13]")


# Tuning

GRID = {"where": {"gate": "topk"}, "flag": "moe-loss-coeff", "values": COEFFICIENTS, "seed": 1}


def test_tuning_picks_the_lowest_loss(tmp_path):
    """With runs of half the length; the value is recorded and used with all seeds."""
    summary, results = run_study(tmp_path, tune=[{**GRID, "tokens": 1280}])
    assert sorted(summary.finished[-4:]) == IDS and len(summary.finished) == 7
    for result in results.cells[:2]:
        assert result.flags["moe-loss-coeff"] == 0.01
        assert result.tuning["value"] == 0.01 and result.tuning["tokens"] == 1280
        losses = {str(c): 5 - 0.1 + abs(math.log10(c) + 2) + 0.001 for c in COEFFICIENTS}
        assert result.tuning["losses"] == pytest.approx(losses)
        assert "--moe-loss-coeff=0.01" in (result.folder / "command.txt").read_text()
    assert [result.tuning for result in results.cells[2:]] == [None, None]
    assert "moe-loss-coeff" not in results.cells[2].flags
    assert len(list((tmp_path / "out" / "tuning").iterdir())) == 3
    assert "tuned: gate=topk: --moe-loss-coeff 0.01 (seed 1; held-out losses 0.1: 5.9010, " in (
        results_text(results)
    )
    assert "edge of its grid" not in results_text(results)
    again, unchanged = run_study(tmp_path, tune=[{**GRID, "tokens": 1280}])
    assert again.finished == summary.finished and unchanged == results


def test_tuning_run_of_full_length_is_its_cell(tmp_path):
    summary, results = run_study(tmp_path, tune=[GRID], devices="cpu,cpu")
    first = results.cells[0]
    assert not (tmp_path / "out" / "cells" / IDS[0] / "log.txt").exists()
    assert first.folder == tmp_path / "out" / "tuning" / "gate-topk_moe-loss-coeff-0.01_seed-1"
    assert first.is_finished and first.held_out_loss == pytest.approx(4.801)
    assert first.tuning["value"] == 0.01
    assert len(summary.finished) == 7
    _, unchanged = run_study(tmp_path, tune=[GRID])
    assert unchanged == results


def test_failed_and_diverged_runs_are_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "moe-loss-coeff-0.01_")
    grid = {**GRID, "values": [0, 0.01, 0.2], "tokens": 640}
    summary, results = run_study(tmp_path, tune=[grid])
    tuning = results.cells[0].tuning
    assert tuning["value"] == 0.2
    assert math.isnan(tuning["losses"]["0"]) and tuning["losses"]["0.01"] is None
    assert list(summary.failed) == ["gate-topk_moe-loss-coeff-0.01_seed-1"]
    text = results_text(results)
    assert "held-out losses 0: nan, 0.01: failed, 0.2: " in text
    assert "; it is at the edge of its grid" in text


def test_cells_fail_without_a_tuned_value(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "moe-loss-coeff")
    summary, _ = run_study(tmp_path, tune=[{**GRID, "tokens": 640}])
    for cell_id in IDS[:2]:
        assert summary.failed[cell_id].startswith(
            "every run that tunes --moe-loss-coeff failed"
        )
    assert summary.finished == IDS[2:]
    monkeypatch.delenv("FAKE_FAIL")
    summary, _ = run_study(tmp_path, tune=[{**GRID, "tokens": 640}])
    assert not summary.failed and sorted(summary.finished[-4:]) == IDS


# Processes


def test_ranks_find_each_other(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "print(*(os.environ[name] for name in names), flush=True)\n"
        "sys.exit(3 if os.environ['RANK'] == '1' else 0)\n"
    )
    process = CellProcess.start(tmp_path, [sys.executable, str(program)], Device("cpu"), 2, 1)
    code = wait_until(lambda: process.poll(), "the end of both ranks")
    assert code == 3
    lines = sorted(line.split() for line in (tmp_path / "log.txt").read_text().splitlines())
    assert [line[:4] for line in lines] == [
        ["0", "0", "2", "127.0.0.1"],
        ["1", "1", "2", "127.0.0.1"],
    ]
    assert lines[0][4] == lines[1][4]


def test_failed_rank_ends_the_others(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('error: rank 1 is broken')\n"
        "while True: time.sleep(0.01)\n"
    )
    process = CellProcess.start(tmp_path, [sys.executable, str(program)], Device("cpu"), 2, 1)
    code = wait_until(lambda: process.poll(), "the end of both ranks")
    assert code in (1, -signal.SIGTERM)
    assert "rank 1 is broken" in process.error_line(code)


def test_processes_lock_their_cell(tmp_path, monkeypatch):
    command = ["sleep", "1000"]
    process = CellProcess.start(tmp_path, command, Device("cpu"), 1, 1)
    try:
        with pytest.raises(CellLocked):
            CellProcess.start(tmp_path, command, Device("cpu"), 1, 1)
    finally:
        process.kill()
    assert process.poll() == -signal.SIGKILL
    assert process.error_line(-signal.SIGKILL) == "ended by SIGKILL (out of memory?)"
    CellProcess.start(tmp_path, ["true"], Device("cpu"), 1, 1).kill()


def test_programs_that_cannot_start_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError):
        CellProcess.start(tmp_path, [str(tmp_path / "none")], Device("cpu"), 1, 1)


def test_cell_of_a_killed_runner_is_waited_for(tmp_path, monkeypatch):
    """Its processes still hold the lock; the cells behind it run until they have ended."""
    folder = tmp_path / "out" / "cells" / IDS[0]
    process = CellProcess.start(folder, ["sleep", "1000"], Device("cpu"), 1, 1)

    def is_behind_finished() -> bool:
        state = CellState.read(tmp_path / "out" / "cells" / IDS[2])
        return state is not None and state.state == "finished"

    def release() -> None:
        wait_until(is_behind_finished, "the end of the cell behind")
        process.kill()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        summary, _ = run_study(tmp_path, seeds=[1])
    finally:
        process.kill()
    thread.join()
    assert summary.finished == [IDS[2], IDS[0]]


def test_cell_that_stays_locked_fails(tmp_path, monkeypatch):
    folder = tmp_path / "out" / "cells" / IDS[0]
    process = CellProcess.start(folder, ["sleep", "1000"], Device("cpu"), 1, 1)
    monkeypatch.setattr("megatron.analysis.compare.cell_process.LOCK_SECONDS", 0.5)
    try:
        summary, _ = run_study(tmp_path, seeds=[1])
    finally:
        process.kill()
    assert "processes of an earlier runner still run it" in summary.failed[IDS[0]]
    assert summary.finished == [IDS[2]]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], ""),
        (["12:00:00 loss 3", "Killed"], "Killed"),
        (["error: first", "[rank 1] error: second"], "first"),
        (["[rank 1] error: another rank ended, and", "[rank 0] error: full disk"], "full disk"),
        (
            ["error: SIGTERM outside of the training loop: x"],
            "SIGTERM outside of the training loop",
        ),
        (
            ["Traceback ...", "  x", "torch.OutOfMemoryError: CUDA", "y"],
            "torch.OutOfMemoryError",
        ),
        (["error: rank 1 ended, and", "ValueError: x"], "ValueError: x"),
    ],
)
def test_error_of_a_log_is_its_cause(lines, found):
    assert error_of_log("\n".join(lines)).startswith(found)
    assert bool(error_of_log("\n".join(lines))) == bool(found)


# Devices


def test_devices_are_parsed(monkeypatch):
    assert parse_devices("cpu,cpu", 3) == [Device("cpu")] * 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    one, two = parse_devices("cuda:0+1,cuda:4+2", 2)
    assert (one.gpus, two.gpus) == (["0", "1"], ["4", "2"])
    assert two.environment(5) == {"CUDA_VISIBLE_DEVICES": "4,2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-a")
    assert one.environment(5) == {"CUDA_VISIBLE_DEVICES": "7,GPU-a"}
    # Cells may share a GPU.
    assert parse_devices("cuda:1,cuda:1", 1) == [Device("cuda:1")] * 2
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Device("cpu").environment(5)["OMP_NUM_THREADS"] == "5"
    assert Device("cpu").environment(5)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Device("cpu").environment(5)["OMP_NUM_THREADS"] == "3"
    assert parse_devices("", 1) == [Device("cpu")]  # DS_ACCELERATOR is cpu in tests
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert parse_devices("", 2) == [Device("cuda:0+1")]
    assert parse_devices("", 3) == [Device("cpu")]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert threads_per_rank([Device("cpu")] * 2 + [Device("cuda:0")], 2) == 2
    assert threads_per_rank([Device("cpu")] * 20, 2) == 1


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    """Whether CUDA_VISIBLE_DEVICES is set or not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert parse_devices("cuda:1", 1) == [Device("cuda:1")]
    allowed = "allowed: a GPU that this process sees, counted from 0"
    with pytest.raises(ValueError, match=f"--devices is 'cuda:2'; {allowed}. It sees 2\\.$"):
        parse_devices("cuda:2", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8,9")
    with pytest.raises(ValueError, match="It sees 2 with CUDA_VISIBLE_DEVICES=7,8,9"):
        parse_devices("cuda:0,cuda:2", 1)


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [
        ("gpu", 1, "--devices is 'gpu'; allowed: cpu, cuda:0"),
        ("cpu,", 1, "--devices is ''; allowed"),
        ("cuda:0+0", 2, "--devices is 'cuda:0.0'; allowed: each GPU once"),
        ("cuda:0", 2, "--devices is 'cuda:0'; allowed: as many GPUs .*The study has 2 rank"),
    ],
)
def test_wrong_devices_are_refused(text, ranks, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(text, ranks)


# Measurements


def train_row(iteration: int, experts: list, zero: list | None = None) -> dict:
    row = {"kind": "train", "iteration": iteration, "experts_per_token": 9.0}
    row["experts_per_token_by_layer"] = experts
    if zero is not None:
        row["zero_computation_fraction_by_layer"] = zero
    return row


def test_experts_are_averaged_over_the_last_part():
    """By steps, without zero-computation experts, per layer; None: the layer has none."""
    rows = [
        train_row(10, [8.0, 8.0]),
        train_row(14, [2.0, 4.0], [0.5, None]),
        train_row(20, [3.0, 4.0], [0.0, None]),
    ]
    expected = [(4 * 1.0 + 6 * 3.0) / 10, 4.0]
    assert experts_by_layer(rows, 2, 10) == pytest.approx(expected)
    assert experts_by_layer(rows, 2, 100) == [3.0, 4.0]
    assert experts_by_layer([], 2, 0) == [] and experts_by_layer(rows, 0, 0) == []
    mean_only = [{"kind": "train", "iteration": 1, "experts_per_token": 2.5}]
    assert experts_by_layer(mean_only, 2, 0) == [2.5, 2.5]


def test_runs_without_routing_metrics_are_measured(tmp_path):
    """Their active parameters are known where the gates leave no choice."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "iteration": 4}, {"kind": "eval", "iteration": 4, "loss": 2.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = CellSize(1000, 400, 400, routed=(800,), num_experts=(4,))
    assert measure(path, fixed, 4, "eval") == Measured(2.5, "eval", None, 400.0)
    dynamic = CellSize(1000, 400, 1000, routed=(800,), num_experts=(4,))
    assert measure(path, dynamic, 4, "eval") == Measured(2.5, "eval", None, None)
    dense = CellSize(1000, 1000, 1000)
    assert measure(path, dense, 4, "eval") == Measured(2.5, "eval", None, 1000.0)


def test_completed_iterations_count_one_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert completed_iterations(path) == 0
    kinds = [("train", 5), ("train", 10), ("run", 5), ("train", 7)]
    path.write_text("".join(json.dumps({"kind": k, "iteration": i}) + "\n" for k, i in kinds))
    assert completed_iterations(path) == 7
