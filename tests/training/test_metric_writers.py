"""What each metric writer writes."""

import errno
import json
import math
import os
import re
import struct
import sys
import types
from pathlib import Path

import pytest

from helpers import runs
from megatron import log, pretrain
from megatron.checkpoint.metadata import TrainingProgress
from megatron.config.schema import CheckpointConfig, LoggingConfig, RunConfig
from megatron.training.metric_writers import (
    ConsoleWriter,
    JsonlWriter,
    MetricsWriters,
    ProgressBar,
    TensorboardWriter,
    WandbWriter,
    build_metric_writers,
)
from megatron.training.metrics_file import read_metrics

TRAIN = {
    "kind": "train",
    "iteration": 10,
    "loss": 5.125,
    "aux_loss": 0.01,
    "lr": 3e-4,
    "grad_norm": 1.5,
    "tokens_per_s": 16384.0,
    "consumed_samples": 80,
    "consumed_tokens": 81920,
    "experts_per_token_before_capacity": 3.25,
    "experts_per_token": 3.0,
    "load_imbalance_max_over_mean": 1.75,
    "dropped_assignment_fraction": 0.0125,
    "skipped_steps": 1,
    "elapsed_s": 65.4,
    "step_time_ms": 500.0,
    "experts_per_token_by_layer": [2.0, 4.0],
}
EVAL = {
    "kind": "eval",
    "iteration": 10,
    "loss": 4.0,
    "perplexity": math.exp(4),
    "elapsed_s": 3700.0,
}


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that returns what was logged since, without the time of day."""
    monkeypatch.setenv("RANK", "0")
    logger = log.get_logger()
    before = (logger.level, logger.propagate, list(logger.handlers))
    log.setup()
    yield lambda: re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", capsys.readouterr().out)
    level, propagate, handlers = before
    logger.setLevel(level)
    logger.propagate = propagate
    logger.handlers = handlers


def test_console_formats_rows_in_columns(printed):
    writer = ConsoleWriter(1000, 1000 * 8192)
    writer.write(TRAIN)
    writer.write(EVAL)
    writer.write({"kind": "test", "iteration": 1000, "loss": 4.0})
    writer.close()
    assert printed().splitlines() == [
        "iteration   10/1000 | loss  5.12500 | aux 1.000e-02 | lr 3.000e-04 | "
        "grad norm   1.500 |    16,384 tokens/s | "
        "experts/token  3.00 (before capacity  3.25) | load max/mean   1.75 | dropped  1.25% | "
        "skipped   1 | elapsed 0:01:05 | left 0:08:15",
        "eval at   10/1000 | loss  4.00000 | perplexity     54.598 | elapsed 1:01:40",
        "test at 1000/1000 | loss  4.00000",
    ]


def test_named_set_has_own_names(printed, tmp_path, monkeypatch):
    """A named validation set on the console, in metrics.jsonl, TensorBoard and W&B. What a layer
    does not have is null in the file and left out by the others."""
    row = {**EVAL, "kind": "eval/wiki", "experts_per_token_by_layer": [2.0, None]}
    ConsoleWriter(1000, 1000 * 8192).write(row)
    assert printed().startswith(
        "eval/wiki at   10/1000 | loss  4.00000 | perplexity     54.598"
    )
    jsonl = JsonlWriter(tmp_path / "m.jsonl")
    jsonl.write(row)
    jsonl.close()
    written = json.loads((tmp_path / "m.jsonl").read_text())
    assert written["kind"] == "eval/wiki"
    assert written["experts_per_token_by_layer"] == [2.0, None]
    tags = {
        "eval/wiki/loss": 4.0,
        "eval/wiki/perplexity": math.exp(4),
        "eval/wiki/elapsed_s": 3700.0,
        "eval/wiki/experts_per_token_by_layer/0": 2.0,
    }
    logged = []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((row, step)))
    wandb = types.SimpleNamespace(init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    WandbWriter("project").write(row)
    assert logged == [(tags, 10)]
    board = TensorboardWriter(tmp_path / "board")
    scalars = []
    board.writer.add_scalar = lambda tag, value, step: scalars.append((tag, value, step))
    board.write(row)
    board.close()
    assert scalars == [(tag, value, 10) for tag, value in tags.items()]


def test_console_names_nan_and_infinity(printed):
    """They are padded to the width of a number, so that columns stay aligned."""
    writer = ConsoleWriter(1000, 1000 * 8192)
    broken = {
        **TRAIN,
        "loss": math.nan,
        "grad_norm": math.inf,
        "aux_loss": -math.inf,
        "dropped_assignment_fraction": math.nan,
    }
    writer.write(TRAIN)
    writer.write(broken)
    good, bad = printed().splitlines()
    assert "| loss      NaN |" in bad
    assert "| grad norm Infinity |" in bad
    assert "| aux -Infinity |" in bad
    assert "| dropped    NaN |" in bad
    good_bars = [match.start() for match in re.finditer(r"\|", good)]
    bad_bars = [match.start() for match in re.finditer(r"\|", bad)]
    assert good_bars[:2] == bad_bars[:2]


def test_jsonl_appends_and_flushes_each_row(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(TRAIN)
    assert json.loads(path.read_text()) == TRAIN, "readable before the file is closed"
    writer.close()
    writer = JsonlWriter(path)
    writer.write(EVAL)
    writer.close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "train",
        "eval",
    ]


def test_jsonl_keeps_nine_significant_digits(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    loss = struct.unpack("f", struct.pack("f", 5.1234567))[0]  # an fp32 value
    writer.write(
        {
            "kind": "train",
            "iteration": 1,
            "loss": loss,
            "lr": 3e-4,
            "grad_norm": math.nan,
            "aux_loss": math.inf,
            "x_by_layer": [0.1 + 0.2, -math.inf],
            "consumed_tokens": 12345678901234,
        }
    )
    writer.close()
    line = (tmp_path / "m.jsonl").read_text()
    assert line == (
        '{"kind": "train", "iteration": 1, "loss": 5.12345648, "lr": 0.0003, "grad_norm": NaN, '
        '"aux_loss": Infinity, "x_by_layer": [0.3, -Infinity], "consumed_tokens": 12345678901234}\n'
    )
    assert struct.unpack("f", struct.pack("f", json.loads(line)["loss"]))[0] == loss


def test_jsonl_ends_a_truncated_line_first(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "tra')
    writer = JsonlWriter(path)
    writer.write(EVAL)
    writer.close()
    assert [line[:8] for line in path.read_text().splitlines()] == ['{"kind":', '{"kind":']
    assert json.loads(path.read_text().splitlines()[1])["kind"] == "eval"


def test_full_disk_names_the_metrics_file():
    writer = JsonlWriter("/dev/full")
    with pytest.raises(
        OSError, match="^/dev/full cannot be written: No space left on device. Free"
    ):
        writer.write(TRAIN)
    writer.close()


@pytest.fixture
def limited_file(tmp_path, monkeypatch):
    """Return a writer, and the number of bytes that its disk still has room for, in a list."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    free = [0]
    file = writer.file

    def write(data: bytes) -> int:
        if not free[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = file.write(data[: free[0]])
        free[0] -= written
        return written

    writer.file = types.SimpleNamespace(write=write, close=file.close)
    yield writer, free
    writer.close()


@pytest.mark.parametrize("room", [0, 1, 20, 100])
def test_run_may_continue_without_metrics(room, limited_file, printed):
    """A row that was cut short is ended before the next one, and the losses are logged twice."""
    writer, free = limited_file
    writers = MetricsWriters([writer], "continue")
    free[0] = room
    for iteration in (1, 2):
        writers.write({**TRAIN, "iteration": iteration})
    (line,) = printed().splitlines()
    assert re.fullmatch(
        r"ERROR \S+m.jsonl cannot be written: No space left on device. Free some space.* The "
        r"training continues without metrics there, as --on-save-error sets",
        line,
    )
    free[0] = 10_000
    for iteration in (3, 4):
        writers.write({**TRAIN, "iteration": iteration})
    assert printed() == "WARNING metrics are written again; 2 row(s) were lost\n"
    assert [row["iteration"] for row in read_metrics(writer.path)] == [3, 4]


def test_metrics_error_stops_by_default(limited_file):
    writer, _ = limited_file
    with pytest.raises(OSError, match="m.jsonl cannot be written: No space left"):
        MetricsWriters([writer]).write(TRAIN)


def test_metrics_follow_on_save_error(tmp_path):
    for on_error in ("stop", "continue"):
        checkpoint = CheckpointConfig(save=str(tmp_path), on_save_error=on_error)
        writers = build_metric_writers(LoggingConfig(), checkpoint, 0, 10, 80)
        writers.close()
        assert writers.on_error == on_error


def test_tensorboard_gets_scalars_by_kind(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorboardWriter(tmp_path)
    writer.write(TRAIN)
    writer.write(EVAL)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/perplexity", "train/experts_per_token_by_layer/1"} <= tags
    assert not {t for t in tags if "kind" in t or t.endswith("/iteration")}
    (event,) = events.Scalars("train/experts_per_token_by_layer/1")
    assert (event.step, event.value) == (10, 4.0)


def test_wandb_gets_the_same_scalars(monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((scalars, step))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = WandbWriter("project", "name")
    writer.write({"kind": "train", "iteration": 3, "loss": 1.0, "x_by_layer": [1.0, 2.0]})
    writer.close()
    assert calls == [
        {"project": "project", "name": "name"},
        ({"train/loss": 1.0, "train/x_by_layer/0": 1.0, "train/x_by_layer/1": 2.0}, 3),
        "finish",
    ]


@pytest.mark.parametrize(
    ("flag", "package"), [("--wandb-project", "wandb"), ("--tensorboard-dir", "tensorboard")]
)
def test_missing_writer_package_is_an_error(tmp_path, monkeypatch, capsys, flag, package):
    """Every rank reports it before it joins the others, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        f"{flag} x needs the package {package}, which is not installed. Install it: pip install "
        f"'moe-megatron[{package}]'"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(log, "_PEER_DELAY_SECONDS", 0)
        assert pretrain.main([*runs.flags("d", tmp_path), flag, "x"]) == 2
        assert capsys.readouterr().err.splitlines()[0].endswith(f"error: {message}")
    assert not list(tmp_path.iterdir())
    options = {flag[2:].replace("-", "_"): "x"}
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError) as info:
        build_metric_writers(LoggingConfig(**options), CheckpointConfig(), 0, 10, 80)
    assert str(info.value) == message


@pytest.mark.parametrize("saved", [0, 2])
def test_tensorboard_forgets_repeated_steps(saved, tmp_path):
    """A run that was killed after iteration 4 resumes from its last checkpoint, or from 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LoggingConfig(tensorboard_dir=str(tmp_path))
    for life, iterations in ((1, range(5)), (2, range(saved + 1 if saved else 0, 4))):
        completed = saved if life == 2 else 0
        writers = build_metric_writers(options, CheckpointConfig(), 0, 10, 80, completed)
        for i in iterations:
            writers.write({"kind": "train", "iteration": i, "loss": float(life)})
        writers.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(i, 1.0) for i in range(saved + 1)]
    if not saved:
        expected = [(0, 2.0)]
    assert shown == expected + [(i, 2.0) for i in range(saved + 1, 4)]


@pytest.mark.parametrize("kind", ["eval", "train"])
def test_tensorboard_forgets_nothing_of_others(kind, tmp_path):
    """An evaluation and a new run leave what another run logged in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LoggingConfig(tensorboard_dir=str(tmp_path))
    for row_kind, iterations in (("train", range(5)), (kind, [2])):
        writers = build_metric_writers(options, CheckpointConfig(), 0, 10, 80)
        for i in iterations:
            writers.write({"kind": row_kind, "iteration": i, "loss": 1.0})
        writers.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    if kind == "eval":
        assert steps == [0, 1, 2, 3, 4]
        assert [event.step for event in events.Scalars("eval/loss")] == [2]
    else:
        assert steps == [0, 1, 2, 3, 4, 2]


@pytest.mark.parametrize(
    "options, loaded, expected",
    [
        ({}, "", None),
        ({"save": "a"}, "", None),
        ({"load": "a"}, "a/iter_0000003", None),
        ({"save": "a", "load": "b"}, "b/iter_0000003", None),
        ({"save": "a", "load": "a", "finetune": True}, "a/iter_0000003", None),
        ({"save": "a", "load": "b", "load_or_init": True}, "", None),
        ({"save": "a", "load": "a"}, "a/iter_0000003", 3),
        ({"save": "a", "load": "./a/iter_0000003"}, "a/iter_0000003", 3),
        ({"save": "a", "load": "a", "load_or_init": True}, "", 0),
    ],
)
def test_run_continues_from_own_directory(options, loaded, expected):
    """Only then does it repeat steps that were logged before."""
    checkpoint = None
    progress = TrainingProgress()
    if loaded:
        checkpoint = types.SimpleNamespace(path=Path(loaded))
        progress.iteration = 3
    run = types.SimpleNamespace(
        config=RunConfig(checkpoint=CheckpointConfig(**options)),
        checkpoint=checkpoint,
        progress=progress,
    )
    assert pretrain.iteration_of_interruption(run) == expected


def test_new_run_purges_no_events(finished, data, tmp_path, ranks1):
    """A run from 0 and one with --finetune share the folder of an earlier run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(tmp_path / "tb")
    more = ("--tensorboard-dir", folder, "--save=", "--eval-iters", "0", "--split", "100,0,0")
    finetune = ("--load", str(finished / "checkpoints"), "--finetune")
    for options in ((), (), finetune):
        ranks1.run(runs.train, runs.flags(data, tmp_path, 2, *more, *options), timeout=300)
    events = EventAccumulator(folder)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2] * 3


def test_flags_choose_the_writers(tmp_path, monkeypatch):
    def kinds(rank=0, save="", **options):
        checkpoint = CheckpointConfig(save=save)
        writers = build_metric_writers(LoggingConfig(**options), checkpoint, rank, 10, 80)
        writers.close()
        return [type(writer) for writer in writers.writers]

    everything = {
        "save": str(tmp_path / "run"),
        "tensorboard_dir": str(tmp_path / "tb"),
        "wandb_project": "p",
    }
    run = types.SimpleNamespace(finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    assert kinds() == [ConsoleWriter]
    assert kinds(rank=1, **everything) == []
    assert not (tmp_path / "run").exists()
    assert kinds(**everything) == [ConsoleWriter, JsonlWriter, TensorboardWriter, WandbWriter]
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert kinds(metrics_file=str(tmp_path / "m.jsonl"), save=str(tmp_path / "other")) == [
        ConsoleWriter,
        JsonlWriter,
    ]
    assert (tmp_path / "m.jsonl").exists() and not (tmp_path / "other").exists()


def test_writers_forward_every_row():
    class Fake:
        def __init__(self):
            self.calls = []

        def write(self, row):
            self.calls.append(row)

        def close(self):
            self.calls.append("closed")

    fakes = [Fake(), Fake()]
    writers = MetricsWriters(fakes)
    writers.write(TRAIN)
    writers.close()
    assert [fake.calls for fake in fakes] == [[TRAIN, "closed"]] * 2


def test_all_writers_are_closed_despite_errors(tmp_path):
    class Failing:
        def close(self):
            raise OSError("full")

    first = JsonlWriter(tmp_path / "1.jsonl")
    last = JsonlWriter(tmp_path / "2.jsonl")
    with pytest.raises(OSError, match="full"):
        MetricsWriters([first, Failing(), last]).close()
    assert first.file.closed
    assert last.file.closed


def test_progress_bar_needs_a_terminal(printed, capsys):
    handlers = list(log.get_logger().handlers)
    with ProgressBar(total=5) as bar:
        bar.move_to(1)
        log.get_logger().info("line")
        assert log.get_logger().handlers == handlers
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_log_lines_appear_above_the_bar(printed, monkeypatch, capsys, rank):
    handlers = list(log.get_logger().handlers)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar(total=5, initial=2, unit="samples") as bar:
        bar.move_to(3)
        log.get_logger().info("line")
        out, err = capsys.readouterr()
        assert out.endswith(" line\n")
        if rank == 0:
            # tqdm clears its line before the log line is written and redraws it
            # afterwards.
            assert "2/5" in err and "samples" in err and err.count("\r") > 2
        else:
            assert err == ""
        bar.move_to(5)
    assert "5/5" in capsys.readouterr().err or rank
    assert log.get_logger().handlers == handlers


def test_console_shows_experts_of_evaluated_layers(printed):
    """By layer in evaluations only."""
    row = {
        "kind": "eval",
        "iteration": 5,
        "loss": 1.0,
        "experts_per_token": 2.5,
        "experts_per_token_by_layer": [1.25, float("nan"), None],
    }
    ConsoleWriter(10, 80).write(row)
    ConsoleWriter(10, 80).write({**row, "kind": "train"})
    evaluation, training = printed().splitlines()
    assert evaluation.endswith("experts/token  2.50 | by layer 1.25  NaN    -")
    assert "by layer" not in training
