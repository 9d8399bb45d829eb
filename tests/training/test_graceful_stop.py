"""GracefulStop, Watchdog and exit codes without a training run."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from helpers.waiting import LIMIT_SECONDS, wait_until
from megatron.config.fault_tolerance import FaultToleranceConfig
from megatron.exit_codes import classify_error, exit_code
from megatron.log import report_error
from megatron.parallel.groups import Groups
from megatron.training.graceful_stop import STOP_SIGNALS, GracefulStop
from megatron.training.watchdog import Watchdog

NO_LOSS = torch.tensor(0.0)
WATCHDOG_MINUTES = 0.0125
"""A limit of 0.6 s: long enough that a busy machine does not exceed it by itself."""


def wait_for_signal(stop: GracefulStop) -> None:
    wait_until(lambda: stop.stop_signal is not None, "the thread reads the signal")


def wait_past_limit(watchdog: Watchdog) -> None:
    """Wait until the watchdog has ticked for longer than its limit from now on."""
    ticks = watchdog._ticks + 1.5 * watchdog._limit_s / watchdog._tick_s
    wait_until(lambda: watchdog._ticks > ticks, "ticks past the limit")


# Stop signals


def test_stop_reads_signals_and_restores_handlers(capfd):
    """It ignores other signals, and a repetition within two seconds."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with GracefulStop(FaultToleranceConfig(), Groups()) as stop:
        status = stop.all_reduce_step_status(torch.tensor(2.0), torch.tensor(0.5))
        assert status.stop_reason == ""
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGCHLD)
        signal.raise_signal(signal.SIGINT)
        wait_for_signal(stop)
        status = stop.all_reduce_step_status(torch.tensor(2.0), torch.tensor(float("inf")))
    assert (status.stop_reason, status.lm_loss, status.bad_ranks) == ("SIGINT", 2.0, 1)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and "error" not in capfd.readouterr().err


def test_stop_leaves_ignored_signals_ignored():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with GracefulStop(FaultToleranceConfig(), Groups()) as stop:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            wait_for_signal(stop)
            assert stop.stop_signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _step_status(minutes: list[float], losses: list[float]) -> tuple:
    """On a rank of a run that started ten minutes ago: the status after a step."""
    rank = dist.get_rank()
    groups = Groups(rank=rank, world_size=dist.get_world_size())
    config = FaultToleranceConfig(exit_duration_in_mins=minutes[rank])
    stop = GracefulStop(config, groups, time.time() - 600)
    status = stop.all_reduce_step_status(torch.tensor(losses[rank]), torch.tensor(2.0 * rank))
    return status.lm_loss, status.aux_loss, status.bad_ranks, bool(status.stop_reason)


def test_step_status_agrees_on_all_ranks(ranks2):
    """Losses are means; one rank's request stops all, also if one has no loss."""
    assert ranks2.run(_step_status, [11.0, 11.0], [1.0, 2.0]) == [(1.5, 1.0, 0, False)] * 2
    assert ranks2.run(_step_status, [11.0, 9.0], [1.0, 2.0]) == [(1.5, 1.0, 0, True)] * 2
    for status in ranks2.run(_step_status, [0.0, 9.0], [float("nan"), 2.0]):
        assert status[0] != status[0] and status[1:] == (1.0, 1, True)


def test_stop_has_no_default_deadline():
    stop = GracefulStop(FaultToleranceConfig(), Groups(), time.time() - 1e9)
    assert stop.all_reduce_step_status(NO_LOSS, NO_LOSS).stop_reason == ""


# Watchdog


def test_watchdog_limits_waiting_for_a_batch(capfd):
    """Using a batch for longer is no fault; waiting that long for one is."""
    exit_codes = []
    ended = threading.Event()

    def batches():
        yield 1
        yield 2
        ended.wait(LIMIT_SECONDS)

    def end(code: int) -> None:
        exit_codes.append(code)
        ended.set()

    received = []
    with Watchdog(WATCHDOG_MINUTES, end) as watchdog:
        wait_past_limit(watchdog)
        for batch in watchdog.reading(batches(), "a batch of iteration 7"):
            received.append(batch)
            wait_past_limit(watchdog)
            assert not ended.is_set()
    assert received == [1, 2] and exit_codes == [3]
    message = capfd.readouterr().err
    assert message.startswith(
        "error: a batch of iteration 7 did not come within 0.01 minutes, 0.8 of "
        "--timeout-minutes 0.0125"
    )
    assert "in batches" in message


def test_watchdog_passes_on_data_errors():
    def broken():
        yield 1
        raise KeyError("x")

    exit_codes = []
    with Watchdog(WATCHDOG_MINUTES, exit_codes.append) as watchdog:
        with pytest.raises(KeyError):
            for _ in watchdog.reading(broken(), "a batch"):
                pass
        wait_past_limit(watchdog)
    assert not exit_codes


# Exit codes


def test_interrupt_before_training_exits_130(capsys):
    def program():
        raise KeyboardInterrupt

    assert exit_code(program) == 130
    error = capsys.readouterr().err
    assert error == "error: interrupted\n"


def test_immediate_report_does_not_wait(monkeypatch, capsys):
    """What only one rank knows is printed without waiting for rank 0."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron.log.time.sleep", lambda seconds: pytest.fail("it waits"))
    report_error(RuntimeError("what it is"), immediately=True)
    assert capsys.readouterr().err == "[rank 1] error: what it is\n"


def test_timeout_is_reported_before_peers_end(monkeypatch, capsys):
    """The launcher ends this rank as soon as another one has ended because of it."""

    def program():
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron.log.time.sleep", lambda seconds: pytest.fail("it waits"))
    assert exit_code(program) == 3
    error = capsys.readouterr().err
    assert re.match(
        r"\[rank 1\] error: a collective .* took longer than --timeout-minutes 1:", error
    )


@pytest.mark.parametrize(
    "error, message, code",
    [
        (
            RuntimeError("[gloo] Connection closed by peer [::1]"),
            "another rank ended, and its message says why",
            1,
        ),
        (
            RuntimeError("Timed out waiting 90000ms for recv"),
            "took longer than --timeout-minutes 1.5: another rank",
            3,
        ),
        (
            RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. "),
            "process 5, .* by signal Bus",
            2,
        ),
        (
            RuntimeError("DataLoader worker (pid 5) exited unexpectedly with exit code 3. "),
            "ended with exit code 3",
            2,
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"),
            "process 5, 6, which reads .*, ended. If",
            2,
        ),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe", 2),
        (
            OSError(24, "Too many open files", "a.bin"),
            r"as it may, \d+ \(ulimit -n; .*: \[Errno 24\] Too many open files: 'a.bin'. Raise",
            2,
        ),
        (
            RuntimeError("[enforce fail] socket: Too many open files\nmore"),
            r"\(ulimit -n; the hard limit is -?\d+\): \[enf.*open files. Raise the limit, or use",
            2,
        ),
        (OSError("Timed out waiting 1ms"), "Timed out waiting 1ms", 2),
        (OSError(110, "Connection timed out", "a.bin"), "110.* 'a.bin'", 2),
        (RuntimeError("size mismatch"), None, 1),
        (ValueError("not raised by this package"), None, 1),
    ],
)
def test_errors_become_lines_and_codes(error, message, code):
    """No line stands for an error that keeps its traceback."""
    line, actual_code = classify_error(_raised(error))
    assert actual_code == code
    if message is None:
        assert line is None
    else:
        assert re.search(message, str(line))


def _raised(error: Exception) -> Exception:
    """The same error with a traceback."""
    try:
        raise error
    except Exception as raised:
        return raised
