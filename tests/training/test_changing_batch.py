"""Runs whose global batch changes: during --rampup-batch-size, and when they are resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from helpers import engines, runs
from megatron import pretrain
from megatron.log import get_logger
from megatron.training.metrics_file import read_metrics
from megatron.training.task import PretrainingTask

SEQ_LENGTH = 32
LR = 0.01


class RecordingTask(PretrainingTask):
    """Pretraining that records the progress that gates see in training."""

    def __init__(self, run, plan):
        config = run.config
        super().__init__(
            config.data,
            config.train,
            plan,
            run.tokenizer,
            run.vocab_size,
            pretrain.build_run_splits(run, plan),
            run.groups,
        )
        self.progress: list[float] = []

    def loss_sums(self, model, batch, progress):
        if model.training and progress not in self.progress:
            self.progress.append(progress)
        return super().loss_sums(model, batch, progress)


def _train(argv: list[str]) -> tuple[list[str], list[float]]:
    """Train in a rank. Returns the log lines, and the progress of each step."""
    tasks = []
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    get_logger().addHandler(handler)
    get_logger().setLevel(logging.INFO)

    def build_task(run, plan):
        tasks.append(RecordingTask(run, plan))
        return tasks[0]

    try:
        runs.train(argv, build_task)
    finally:
        get_logger().removeHandler(handler)
        get_logger().setLevel(logging.NOTSET)
    return messages, tasks[0].progress


def flags(data: str, out: Path, *more: str) -> list[str]:
    """Return flags of a run in fp32, without its length. Adam's epsilon is large, so that
    rounding is not amplified."""
    return [
        *runs.SHAPE,
        *runs.MOE,
        *("--gate", "topk", "--topk", "2", "--moe-loss-coeff", "0"),
        *("--data-path", data, "--split", "100", "--eval-iters", "0"),
        *("--lr", str(LR), "--adam-eps", "1e-2", "--lr-decay-style", "linear"),
        *("--micro-batch-size", "2", "--log-interval", "1"),
        *("--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")),
        *more,
    ]


RAMPUP = [
    *("--train-samples", "60", "--global-batch-size", "12"),
    *("--rampup-batch-size", "4", "4", "16"),
    *("--lr-warmup-samples", "16", "--lr-decay-samples", "50"),
]
CONSUMED = [4, 8, 16, 28, 40, 52]
"""Samples after each step of RAMPUP; those of another step would exceed its length"""


@pytest.fixture(scope="module")
def ramped(data, ranks2, tmp_path_factory) -> tuple[Path, list[str], list[float]]:
    """Train with RAMPUP on two ranks. Returns the output, and rank 0's log and progress."""
    out = tmp_path_factory.mktemp("ramped")
    (log, progress), _ = ranks2.run(_train, flags(data, out, *RAMPUP, *runs.EP2), timeout=300)
    return out, log, progress


def test_rampup_takes_megatrons_batches(ramped):
    """Sizes, counts and rates of every step; the incomplete last batch is left out."""
    out, _, progress = ramped
    rows = runs.metrics(out)
    before = [0, *CONSUMED[:-1]]
    assert [row["consumed_samples"] for row in rows] == CONSUMED
    assert [row["global_batch_size"] for row in rows] == [4, 4, 8, 12, 12, 12]
    assert [row["consumed_tokens"] for row in rows] == [SEQ_LENGTH * n for n in CONSUMED]
    rates = [LR * n / 16 if n <= 16 else LR * (50 - n) / 34 for n in before]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    assert progress == [n / 60 for n in before]
    for row, size in zip(rows, [4, 4, 8, 12, 12, 12], strict=True):
        speed = size * SEQ_LENGTH / row["step_time_ms"] * 1000
        assert row["tokens_per_s"] == pytest.approx(speed, rel=1e-3)


def test_rampup_is_logged(ramped):
    log = ramped[1]
    assert any("6 iterations of 4 to 12 samples x 32 tokens, 1 to 3 micro-b" in m for m in log)
    assert [m for m in log if "the global batch is" in m] == [
        "the global batch is 8 samples in 2 micro-batch(es) from iteration 3 on",
        "the global batch is 12 samples in 3 micro-batch(es) from iteration 4 on",
    ]


def test_rampup_on_one_rank_is_the_same(ramped, data, tmp_path, ranks1):
    ranks1.run(_train, flags(data, tmp_path, *RAMPUP), timeout=300)
    for row, expected in zip(runs.metrics(tmp_path), runs.metrics(ramped[0]), strict=True):
        assert row["lr"] == expected["lr"]
        assert row["consumed_samples"] == expected["consumed_samples"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_rampup_resumes_bit_for_bit(ramped, data, tmp_path, ranks2):
    """A run that stops after the second step, in the middle of the ramp-up."""
    argv = flags(data, tmp_path, *RAMPUP, *runs.EP2)
    ranks2.run(_train, [*argv, "--exit-interval", "2"], timeout=300)
    ranks2.run(_train, [*argv, "--load", str(tmp_path / "checkpoints")], timeout=300)
    for row, expected in zip(runs.metrics(tmp_path), runs.metrics(ramped[0]), strict=True):
        for name in ("loss", "lr", "grad_norm", "consumed_samples", "global_batch_size"):
            assert row[name] == expected[name]
    ours = engines.full_tensors(tmp_path / "checkpoints")
    for name, tensor in engines.full_tensors(ramped[0] / "checkpoints").items():
        assert ours[name].equal(tensor), name


LENGTHS = {"--train-iters": 10, "--train-samples": 80, "--train-tokens": 80 * SEQ_LENGTH}
"""Ten steps of 8 samples in each unit"""


@pytest.fixture(scope="module")
def half_done(data, ranks2, tmp_path_factory):
    """Return a function of a length's flag to the output of a run that stopped half-way."""
    made = {}

    def make(flag: str) -> Path:
        if flag not in made:
            out = tmp_path_factory.mktemp("half")
            argv = [
                flag,
                str(LENGTHS[flag]),
                "--global-batch-size",
                "8",
                "--exit-interval",
                "5",
            ]
            ranks2.run(_train, flags(data, out, *argv), timeout=300)
            made[flag] = out
        return made[flag]

    return make


@pytest.mark.parametrize(
    ("flag", "batch", "ranks"),
    [
        ("--train-iters", 4, 1),
        ("--train-samples", 4, 2),
        ("--train-tokens", 2, 1),
        ("--train-tokens", 20, 2),
    ],
)
def test_other_batch_continues_the_run(flag, batch, ranks, half_done, data, tmp_path, request):
    """Rate and progress continue at one half, the data suffice, and their order stays.

    Before, a smaller batch ended with "the data ends: 0 of 40 samples are left", the rate
    returned to 0.75, and progress jumped to 0.667.
    """
    saved = half_done(flag) / "checkpoints"
    argv = [flag, str(LENGTHS[flag]), "--global-batch-size", str(batch), "--load", str(saved)]
    pool = request.getfixturevalue(f"ranks{ranks}")
    log, progress = pool.run(_train, flags(data, tmp_path, *argv), timeout=300)[0]
    steps = 5 if flag == "--train-iters" else 40 // batch
    rows = runs.metrics(tmp_path)
    assert len(rows) == steps
    assert rows[-1]["consumed_samples"] == 40 + steps * batch
    expected = [0.5 + 0.5 * i / steps for i in range(steps)]
    assert progress == pytest.approx(expected)
    assert [row["lr"] for row in rows] == pytest.approx([LR * (1 - p) for p in expected])
    states = [
        json.loads((folder / name / "state.json").read_text())
        for folder, name in (
            (saved, "iter_0000005"),
            (tmp_path / "checkpoints", f"iter_{5 + steps:07d}"),
        )
    ]
    assert [state["samples"] for state in states] == [80, 80]
    assert not [message for message in log if "differ(s) from the checkpoint's" in message]


def test_finished_run_says_so(ramped, data, tmp_path, ranks2):
    argv = ["--load", str(ramped[0] / "checkpoints")]
    log, _ = ranks2.run(_train, flags(data, tmp_path, *RAMPUP, *runs.EP2, *argv), timeout=300)[
        0
    ]
    assert (
        "--train-samples 60 is reached at iteration 6: there is nothing left to train. To train "
        "on, set a larger number"
    ) in log
    assert [row["kind"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ["run"]
