"""Stop and Watchdog without a training: what they agree on, listen to, restore, and when they do nothing."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron.config.faults import FaultConfig
from megatron.exit_codes import classify_error, exit_code
from megatron.log import report_error
from megatron.parallel.groups import Groups
from megatron.training.graceful_stop import STOP_SIGNALS, GracefulStop
from megatron.training.watchdog import Watchdog

NO_LOSS = torch.tensor(0.0)


def test_one_rank_listens_and_restores(capfd):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with GracefulStop(FaultConfig(), Groups()) as stop:
        assert stop.all_reduce_step_status(torch.tensor(2.0), torch.tensor(0.5)).stop_reason == ""
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGCHLD)
        signal.raise_signal(signal.SIGINT)  # at once: the same, on another way
        while stop.stop_signal is None:
            time.sleep(0.001)  # the thread has it in a moment
        agreed = stop.all_reduce_step_status(torch.tensor(2.0), torch.tensor(float("inf")))
    assert (agreed.stop_reason, agreed.lm_loss, agreed.bad_ranks) == ("SIGINT", 2.0, 1)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and "error" not in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored():
    """As a shell's background job has it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with GracefulStop(FaultConfig(), Groups()) as stop:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            while stop.stop_signal is None:
                time.sleep(0.001)
            assert stop.stop_signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _agree(minutes: list[float], losses: list[float]) -> tuple:
    rank = dist.get_rank()
    groups = Groups(rank=rank, world_size=dist.get_world_size())
    stop = GracefulStop(
        FaultConfig(exit_duration_in_mins=minutes[rank]), groups, time.time() - 600
    )
    agreed = stop.all_reduce_step_status(torch.tensor(losses[rank]), torch.tensor(2.0 * rank))
    return agreed.lm_loss, agreed.aux_loss, agreed.bad_ranks, bool(agreed.stop_reason)


def test_ranks_agree(ranks2):
    """Means over ranks; one rank that wants to stop is enough; one that has no loss does not hide the others' wish."""
    assert ranks2.run(_agree, [11.0, 11.0], [1.0, 2.0]) == [(1.5, 1.0, 0, False)] * 2
    assert ranks2.run(_agree, [11.0, 9.0], [1.0, 2.0]) == [(1.5, 1.0, 0, True)] * 2
    for answer in ranks2.run(_agree, [0.0, 9.0], [float("nan"), 2.0]):
        assert answer[0] != answer[0] and answer[1:] == (1.0, 1, True)


def test_without_a_duration_a_run_has_all_the_time():
    assert (
        GracefulStop(FaultConfig(), Groups(), time.time() - 1e9).all_reduce_step_status(NO_LOSS, NO_LOSS).stop_reason
        == ""
    )


def test_the_watchdog_barks_at_a_batch_that_does_not_come_and_at_nothing_else(capfd):
    """A limit of 0.24 s: using a batch for longer is no fault, waiting for one is."""
    ended, woken = [], threading.Event()

    def batches():
        yield 1
        yield 2
        woken.wait(10)

    def end(code: int) -> None:
        ended.append(code)
        woken.set()

    with Watchdog(0.005, end) as watchdog:
        threading.Event().wait(0.4)
        got = []
        for batch in watchdog.reading(batches(), "a batch of iteration 7"):
            got.append(batch)
            assert not woken.wait(0.4)
    assert got == [1, 2] and ended == [3]
    said = capfd.readouterr().err
    assert (
        said.startswith(
            "error: a batch of iteration 7 did not come within 0.004 minutes, 0.8 of --timeout-minutes "
            "0.005"
        )
        and "in batches" in said
    )


def test_the_watchdog_lets_errors_of_the_data_pass():
    def broken():
        yield 1
        raise KeyError("x")

    ended = []
    with Watchdog(0.001, ended.append) as watchdog, pytest.raises(KeyError):
        for _ in watchdog.reading(broken(), "a batch"):
            pass
        threading.Event().wait(0.2)
    assert not ended


def test_interrupted_before_the_training_begins(capsys):
    def program():
        raise KeyboardInterrupt

    assert exit_code(program) == 130
    assert (
        capsys.readouterr().err
        == "error: interrupted before training began; nothing was saved\n"
    )


def test_what_a_thread_of_any_rank_has_to_say_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("megatron.log.time.sleep", lambda seconds: pytest.fail("it waits"))
    report_error(RuntimeError("what it is"), immediately=True)
    assert capsys.readouterr().err == "[rank 1] error: what it is\n"


@pytest.mark.parametrize(
    "error, said, code",
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
        (OSError("Timed out waiting 1ms"), "Timed out waiting 1ms", 2),
        (RuntimeError("size mismatch"), None, 1),
        (ValueError("not raised here"), None, 1),
    ],
)
def test_what_an_error_is_to_the_user(error, said, code):
    line, got = classify_error(_raised(error))
    assert got == code and (line is None if said is None else re.search(said, str(line)))


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:
        return raised
