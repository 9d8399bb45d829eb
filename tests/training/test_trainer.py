"""The training loop's reaction to skipped steps and loss spikes, in runs on two ranks."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import runs
from megatron import pretrain
from megatron.data.loader import Batch
from megatron.training.task import LM_LOSS, NextTokenLoss, PretrainingTask, Task

MICRO_STEPS = 2
SHORT = ["--eval-iters", "0"]


class FaultyTask(PretrainingTask):
    """Pretraining in which the losses of some iterations are NaN or high.

    Args:
        bad: iterations whose loss and gradients are NaN.
        rank: the rank with the NaN; None: all.
        high: iterations whose loss is 9 higher on all ranks, without effect on the gradients.
    """

    def __init__(self, run, plan, bad: set[int], rank: int | None, high: set[int]):
        splits = pretrain.build_run_splits(run, plan)
        config = run.config
        super().__init__(
            config.data, config.train, plan, run.tokenizer, run.vocab_size, splits, run.groups
        )
        self.bad = bad
        self.rank = rank
        self.high = high
        self.micro_batches = itertools.count()

    def loss_sums(self, model, batch, progress):
        sums = super().loss_sums(model, batch, progress)
        if not torch.is_grad_enabled():  # not a training step
            return sums
        iteration = next(self.micro_batches) // MICRO_STEPS + 1
        if iteration in self.bad and self.rank in (None, self.groups.rank):
            sums[LM_LOSS] = sums[LM_LOSS] * float("nan")
        if iteration in self.high:
            sums[LM_LOSS] = sums[LM_LOSS] + 9.0 * batch.loss_mask_BS.sum()
        return sums


def _train(
    argv: list[str], bad: set[int], rank: int | None = None, high: set[int] = frozenset()
) -> list[str]:
    """Run a training with faults in a rank; arguments as of FaultyTask. Returns its log lines."""
    return runs.logged_train(argv, lambda run, plan: FaultyTask(run, plan, bad, rank, high))


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").glob("iter_*"))


def test_one_bad_batch_is_skipped(finished, data, tmp_path, ranks2):
    """A NaN on one rank in step 3 is logged once and left out of the mean loss.

    The checkpoint that is due at step 3 is written after step 4.
    """
    argv = runs.flags(
        data,
        tmp_path,
        20,
        *runs.EP2,
        *SHORT,
        "--exit-interval",
        "6",
        "--log-interval",
        "3",
        "--save-interval",
        "3",
    )
    first, second = ranks2.run(_train, argv, {3}, 1, timeout=300)
    warned = [message for message in first if "NaN or infinite" in message]
    assert warned == [
        "iteration 3: the loss on 1 of 2 rank(s) was NaN or infinite, so the step is skipped "
        "(1 consecutive; samples 16 to 23)"
    ]
    assert not [message for message in second if "NaN" in message]
    three, six = runs.metrics(tmp_path)
    reference = runs.metrics(finished)
    for key in ("loss", "aux_loss"):
        assert three[key] == pytest.approx(
            (reference[0][key] + reference[1][key]) / 2, rel=1e-7
        )
    assert (
        three["bad_steps"],
        three["skipped_steps"],
        six["bad_steps"],
        six["skipped_steps"],
    ) == (1, 1, 0, 1)
    assert (
        three["consumed_samples"] == 24
        and three["lr"] == reference[2]["lr"]
        and np.isfinite(six["loss"])
    )
    assert saved(tmp_path) == ["iter_0000004", "iter_0000006"]


def test_too_many_bad_steps_end_run(data, tmp_path, ranks2):
    """Only consecutive steps count: that of step 2 does not add to those from step 5 on."""
    argv = runs.flags(
        data, tmp_path, 20, *runs.EP2, *SHORT, "--max-bad-steps", "3", "--save-interval", "1"
    )
    with pytest.raises(
        RuntimeError,
        match=r"3 consecutive steps up to iteration 7 had NaN .* allowed: fewer than "
        r"--max-bad-steps 3.* last good checkpoint is .*/iter_0000004",
    ):
        ranks2.run(_train, argv, {2, *range(5, 20)}, 0, timeout=300)
    assert saved(tmp_path) == [f"iter_000000{i}" for i in (1, 3, 4)]
    assert [m["bad_steps"] for m in runs.metrics(tmp_path)] == [0, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("bad, expected", [({1, 2}, []), ({2}, ["iter_0000002"])])
def test_run_ending_in_bad_step_saved(bad, expected, data, tmp_path, ranks2):
    """Skipped steps leave the weights as they were; a run without a good step saves nothing."""
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT, "--exit-interval", "2")
    first, _ = ranks2.run(_train, argv, bad, timeout=300)
    assert saved(tmp_path) == expected
    assert (
        "no checkpoint is saved, because every step of this run was skipped; no checkpoint was "
        "saved" in first
    ) == (not expected)
    assert np.isnan(runs.metrics(tmp_path)[-1]["loss"]), (
        "shown when there is nothing else to show"
    )


class RandomTokensTask(NextTokenLoss, Task):
    """A task without any data files: every rank predicts its own random tokens."""

    def __init__(self, run, plan):
        self.generator = torch.Generator().manual_seed(run.groups.rank)
        self.vocab_size = run.vocab_size
        self.shape = (run.config.train.micro_batch_size, plan.seq_length + 1)

    def _batch(self) -> Batch:
        ids = torch.randint(self.vocab_size, self.shape, generator=self.generator)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(ids[:, 1:].shape))

    def train_batches(self, consumed_samples):
        while True:
            yield self._batch()

    def eval_splits(self):
        return ["valid"]

    def eval_batches(self, split):
        return [self._batch(), self._batch()]


def _train_on_random_tokens(argv: list[str]) -> None:
    runs.train(argv, RandomTokensTask)


def test_trainer_runs_any_task(tmp_path, ranks2):
    """A task that gives its own batches needs no data: only its splits are evaluated."""
    argv = runs.flags("/nowhere", tmp_path, 3, *runs.EP2)
    ranks2.run(_train_on_random_tokens, argv, timeout=300)
    losses = [row["loss"] for row in runs.metrics(tmp_path)]
    assert len(losses) == 3
    assert np.log(257) - 0.5 < losses[0] < np.log(257) + 1.0
    assert [row["iteration"] for row in runs.metrics(tmp_path, "eval")] == [0, 3]
    assert not runs.metrics(tmp_path, "test")


class ShortTask(RandomTokensTask):
    """A task whose batches end in the middle of the second step."""

    def train_batches(self, consumed_samples):
        return [self._batch() for _ in range(MICRO_STEPS + 1)]


def _train_on_too_few_batches(argv: list[str]) -> None:
    runs.train(argv, ShortTask)


def test_step_without_all_micro_batches_is_an_error(tmp_path, ranks1):
    argv = runs.flags("/nowhere", tmp_path, 3, *SHORT, "--global-batch-size", "4")
    with pytest.raises(
        RuntimeError, match=r"the task gave 1 of the 2 micro-batches of a step; allowed: 2,"
    ):
        ranks1.run(_train_on_too_few_batches, argv, timeout=300)
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [1]


class StoppedTask(RandomTokensTask):
    """A task whose process gets SIGTERM while it reads the third step's batches."""

    def train_batches(self, consumed_samples):
        for number, batch in enumerate(super().train_batches(consumed_samples)):
            if number == 2 * MICRO_STEPS:
                signal.raise_signal(signal.SIGTERM)
            yield batch


def _train_until_stopped(argv: list[str]) -> None:
    runs.train(argv, StoppedTask)


def test_stopped_run_writes_its_profile(tmp_path, ranks1):
    """A signal stops the run inside the profiled range; the profile ends where the run does."""
    profile = ["--profile", "--profile-step-start", "1", "--profile-step-end", "1900"]
    argv = runs.flags("/nowhere", tmp_path, 2000, *SHORT, "--global-batch-size", "4", *profile)
    ranks1.run(_train_until_stopped, argv, timeout=300)
    done = len(runs.metrics(tmp_path))
    assert 3 <= done < 1900, "a thread reads the signal, not always within the step"
    folder = tmp_path / "checkpoints/profile"
    table = (folder / "rank0.txt").read_text(encoding="utf-8")
    assert table.startswith(f"iterations 2 to {done} on rank 0: ")
    assert (folder / "rank0.trace.json.gz").is_file()


SPIKES = [
    "--loss-spike-threshold",
    "3",
    "--loss-spike-window",
    "8",
    "--exit-interval",
    "9",
    "--save-interval",
    "3",
]


def test_spikes_are_logged_and_counted(data, tmp_path, ranks2):
    """Two consecutive spikes are a quarter of the window, and so a new level of the loss."""
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, *SHORT, *SPIKES)
    first, second = ranks2.run(_train, argv, set(), None, {5, 7, 8}, timeout=300)
    warned = [message for message in first if "standard deviations of" in message]
    assert [message.split()[4] for message in warned] == ["5", "7", "8"]
    assert (
        "this is a new level" in warned[2]
        and "like 1 before it" in warned[2]
        and "level" not in warned[1]
    )
    assert not [message for message in second if "deviations" in message]
    assert [m["iteration"] for m in runs.metrics(tmp_path) if m["loss_spikes"]] == [5, 7, 8]
    assert saved(tmp_path)[-1] == "iter_0000009"


def test_a_spike_can_end_the_run(data, tmp_path, ranks2):
    argv = runs.flags(
        data, tmp_path, 20, *runs.EP2, *SHORT, *SPIKES, "--loss-spike-action", "stop"
    )
    with pytest.raises(
        RuntimeError,
        match=r"the loss of iteration 5 is \d+\.\d+, \d+\.\d standard deviations of .* allowed: "
        r"--loss-spike-threshold 3\. .*last good checkpoint is .*/iter_0000003",
    ):
        ranks2.run(_train, argv, set(), None, {5}, timeout=300)
    last = runs.metrics(tmp_path)[-1]
    assert (last["iteration"], last["loss_spikes"]) == (5, 1) and saved(tmp_path) == [
        "iter_0000003"
    ]


def _save_slowly(argv: list[str], bad: set[int]) -> None:
    """In a rank: a run whose checkpoints take longer to write than the steps that follow them."""
    from megatron.checkpoint import saver

    write = saver.write_tensors

    def slow(*args):
        time.sleep(1.5)
        return write(*args)

    saver.write_tensors = slow
    try:
        _train(argv, bad)
    finally:
        saver.write_tensors = write


def test_aborted_run_completes_its_checkpoint(data, tmp_path, ranks2):
    argv = runs.flags(
        data,
        tmp_path,
        9,
        *SHORT,
        "--save-interval",
        "2",
        "--async-save",
        "--max-bad-steps",
        "2",
    )
    with pytest.raises(
        RuntimeError,
        match="2 consecutive steps .*the last good checkpoint is .*0000002",
    ):
        ranks2.run(_save_slowly, argv, {3, 4}, timeout=300)
    assert saved(tmp_path) == ["iter_0000002"]


def test_unknown_gradient_norm_is_left_out(data, tmp_path, ranks1):
    """DeepSpeed can be told not to compute it."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"compute_grad_norm": false}}')
    more = ["--zero-stage", "2", "--clip-grad", "0", "--deepspeed_config", str(path)]
    ranks1.run(runs.train, runs.flags(data, tmp_path, 2, *more), timeout=300)
    rows = runs.metrics(tmp_path)
    assert rows
    assert all("grad_norm" not in row and row["loss"] > 0 for row in rows)
