"""Profiles against a reference, against sleeps at known places, and what a run writes.

Also the stages of start-up.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import runs
from megatron import log
from megatron.config.schema import FaultToleranceConfig, ProfilingConfig
from megatron.parallel.groups import Groups
from megatron.training.profile_report import (
    NODE,
    PART,
    PHASES,
    STEP,
    STEP_PARTS,
    Span,
    break_down_step,
    profile_table,
)
from megatron.training.profiler import StepProfiler, profile_folder, write_trace
from megatron.training.startup_timer import StartupTimer

PROFILE = ("--profile", "--profile-step-start", "2", "--profile-step-end", "4")


def read_table(path: Path) -> dict[str, dict[str, float]]:
    """Rows of a table by label; times by phase, "all" and "share"."""
    names = (*PHASES, "all", "share")
    rows = {}
    _, header, *lines, _ = path.read_text().splitlines()
    ends = [header.index(name) + len(name) for name in names]
    starts = [17, *ends]
    for line in lines:
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=False)]
        numbers = [float(cell.rstrip("%") or 0) for cell in cells]
        rows[line[:17].strip()] = dict(zip(names, numbers, strict=True))
    return rows


def check_sums(rows: dict[str, dict[str, float]], path: Path) -> float:
    """Check that the parts add up to the step, and return its milliseconds."""
    assert list(rows) == [*STEP_PARTS, "total"]
    step_ms = float(re.search(r": ([\d.]+) ms each", path.read_text()).group(1))
    totals = {phase: rows["total"][phase] for phase in PHASES} | {"all": step_ms, "share": 100}
    for column, total in totals.items():
        column_sum = sum(rows[part][column] for part in STEP_PARTS)
        assert column_sum == pytest.approx(total, abs=0.51), column
    for row in rows.values():
        assert sum(row[phase] for phase in PHASES) == pytest.approx(row["all"], abs=0.21)
        # The share, and both times that it is computed from here, are rounded to one decimal.
        rounding = 0.06 + 0.1 * 100 / step_ms
        assert row["share"] == pytest.approx(100 * row["all"] / step_ms, abs=rounding)
    return step_ms


# Attribution of time


def reference_part(span: Span, around: list[Span], spans: list[Span]) -> tuple[str, str]:
    """(part, phase) of a span inside others: the first answer from the inside out."""
    part = ""
    phase = ""
    for s in [span, *reversed(around)]:
        name = s.name.removeprefix(PART)
        own_part = ""
        own_phase = ""
        if s.name in (f"{PART}forward", f"{PART}backward"):
            own_part = "the rest"
            own_phase = name
        elif s.name.startswith(PART):
            own_part = name
        elif s.name.startswith("c10d::"):
            own_part = "communication"
        elif s.name.startswith(NODE):
            own_phase = "backward"
            creators = [
                other
                for other in spans
                if other.sequence == s.sequence >= 0 == other.forward_thread
                and other.start < s.start
            ]
            if creators:
                creator = max(creators, key=lambda other: other.start)
                own_part, _ = reference_part(creator, enclosing(creator, spans), spans)
        part = part or own_part
        phase = phase or own_phase
    return part or "the rest", phase or "other"


def enclosing(span: Span, spans: list[Span]) -> list[Span]:
    """The spans around a span, outermost first; no two have the same ends."""
    return sorted(
        (s for s in spans if s.start < span.start and s.end > span.end), key=lambda s: s.start
    )


class RandomSteps:
    """Two steps of a forward and a backward pass with random ranges and operations."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.next_sequence = 0
        self.spans: list[Span] = []
        for first in (100, 1000):
            self.spans.append(Span(STEP, first, first + 800, 1))
            self._add_part("forward", first + 10, first + 300)
            self._add_part("backward", first + 310, first + 600)
            self._add_part("optimizer", first + 710, first + 790)
        self.spans.append(Span("aten::outside", 950, 960, 1))
        self.rng.shuffle(self.spans)

    def _add_part(self, name: str, start: int, end: int) -> None:
        self.spans.append(Span(PART + name, start, end, 1))
        self._fill(start, end, depth=0, backward=name == "backward")

    def _fill(self, start: int, end: int, depth: int, backward: bool) -> None:
        at = start + 1
        while end - at > 6 and self.rng.random() < 0.8:
            stop = self.rng.randrange(at + 3, end)
            self.spans.append(self._random_span(at, stop, backward))
            if depth < 4:
                self._fill(at, stop, depth + 1, backward)
            at = stop + 1

    def _random_span(self, start: int, end: int, backward: bool) -> Span:
        kind = self.rng.choice(["part", "op", "op", "comm", "node" if backward else "op"])
        if kind == "part":
            name = PART + self.rng.choice(["gate", "experts", "data"])
            return Span(name, start, end, 1)
        if kind == "comm":
            return Span("c10d::allreduce_", start, end, 1)
        if kind == "node":
            sequence = self.rng.randrange(-1, self.next_sequence + 3)
            return Span(f"{NODE}MmBackward0", start, end, 1, sequence, 1)
        if backward or self.rng.random() >= 0.7:
            return Span("aten::mm", start, end, 1)
        sequence = self.next_sequence
        # An operation that creates no node shares its number with the next one.
        self.next_sequence += self.rng.randrange(2)
        return Span("aten::mm", start, end, 1, sequence)


@pytest.mark.parametrize("seed", range(20))
def test_time_belongs_to_the_innermost_part(seed):
    """Against a reference that looks at every microsecond by itself."""
    spans = RandomSteps(seed).spans
    expected: dict[tuple[str, str], float] = {}
    for moment in range(2000):
        inside = sorted((s for s in spans if s.start <= moment < s.end), key=lambda s: s.start)
        if inside and inside[0].name == STEP:
            key = reference_part(inside[-1], inside[:-1], spans)
            expected[key] = expected.get(key, 0) + 1 / 1000 / 2
    breakdown = break_down_step(spans)
    assert breakdown.steps == 2 and breakdown.step_ms == pytest.approx(0.8)
    assert {k: v for k, v in breakdown.host_ms.items() if v} == pytest.approx(expected)
    assert sum(breakdown.host_ms.values()) == pytest.approx(breakdown.step_ms)


def test_backward_thread_and_kernels_are_attributed():
    """As on a GPU: the step's thread waits while the device's thread runs nodes.

    The time of a kernel belongs to the operation that launched it. Threads that run no
    nodes are not part of the step.
    """
    spans = [
        Span(STEP, 0, 100_000, 1),
        Span(f"{PART}forward", 0, 40_000, 1),
        Span(f"{PART}attention", 10_000, 30_000, 1),
        Span("aten::linear", 12_000, 20_000, 1, 7, 0, 5_000),
        Span(f"{PART}backward", 50_000, 90_000, 1),
        Span(f"{NODE}MmBackward0", 55_000, 75_000, 2, 7, 1),
        Span("aten::mm", 56_000, 60_000, 2, -1, 0, 50_000),
        Span(f"{NODE}torch::autograd::AccumulateGrad", 80_000, 95_000, 2),
        Span("gloo:all_reduce", 0, 100_000, 3),
    ]
    breakdown = break_down_step(spans)
    assert {k: v for k, v in breakdown.host_ms.items() if v} == {
        ("attention", "forward"): 20,
        ("the rest", "forward"): 20,
        ("attention", "backward"): 20,
        ("the rest", "backward"): 20,
        ("the rest", "other"): 20,
    }
    assert {k: v for k, v in breakdown.device_ms.items() if v} == {
        ("attention", "forward"): 5,
        ("attention", "backward"): 50,
    }
    text = profile_table(breakdown, 10, 11, 0, 0.0).splitlines()
    assert text[1].endswith("GPU") and text[2].split() == [
        "attention",
        "20.0",
        "20.0",
        "40.0",
        "40.0%",
        "55.0",
    ]
    assert "GPU" not in profile_table(break_down_step([Span(STEP, 0, 1000, 1)]), 10, 11, 0, 0.0)
    with pytest.raises(AssertionError, match="no training step"):
        break_down_step(spans[1:])


# Runs


def _train_and_inspect(argv: list[str]) -> list[bool]:
    """On a rank: run, and return for each step whether a profiler was attached."""
    from megatron.training.trainer import Trainer

    attached = []
    step = Trainer.step
    wait = dist.Work.wait

    def inspecting_step(self: Trainer) -> None:
        hooks = []
        for module in self.engine.deepspeed.module.modules():
            hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        marks = [
            any("profile" in hook.__module__ for hook in hooks),
            "backward" in vars(self.engine.deepspeed),
            "step" in vars(self.engine.deepspeed),
            "step" in vars(self.engine),
            dist.Work.wait is not wait,
        ]
        assert len(set(marks)) == 1, marks
        attached.append(marks[0])
        step(self)

    Trainer.step = inspecting_step
    try:
        runs.train(argv)
    finally:
        Trainer.step = step
    assert dist.Work.wait is wait
    return attached


def test_ranks_write_traces_and_tables(data, tmp_path, ranks2):
    """Sharded experts and two micro-batches per step, profiled on both ranks.

    All parts appear on both ranks and add up to the step.
    """
    argv = runs.flags(
        data, tmp_path, 5, *runs.EP2, "--eval-iters", "0", *PROFILE, "--profile-ranks", "0", "1"
    )
    attached = ranks2.run(_train_and_inspect, argv, timeout=300)
    assert attached == [[False, False, True, True, False]] * 2
    folder = tmp_path / "checkpoints/profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank0.trace.json.gz",
        "rank0.txt",
        "rank1.trace.json.gz",
        "rank1.txt",
    ]
    step_ms = []
    for rank in (0, 1):
        path = folder / f"rank{rank}.txt"
        assert path.read_text().startswith(f"iterations 3 to 4 on rank {rank}: ")
        rows = read_table(path)
        step_ms.append(check_sums(rows, path))
        check_phases(rows)
        check_trace(folder / f"rank{rank}.trace.json.gz")
    logged_ms = [row["step_time_ms"] for row in runs.metrics(tmp_path)[2:4]]
    # The log has the mean over ranks of each step, a table the mean of two steps.
    # The profiled range contains the logged one; a busy machine may stop a rank between them.
    assert 0.99 * sum(logged_ms) < sum(step_ms) < 1.5 * sum(logged_ms)


def check_phases(rows: dict[str, dict[str, float]]) -> None:
    """Check that every part has time in its phases only."""
    for part in (
        "attention",
        "dense FFN",
        "gate",
        "dispatch",
        "experts",
        "output and loss",
        "communication",
    ):
        assert rows[part]["forward"] > 0 and rows[part]["backward"] > 0, part
    for part in ("optimizer", "data", "communication"):
        assert rows[part]["other"] > 0, part
    assert rows["optimizer"]["forward"] == 0
    assert rows["data"]["forward"] == 0
    assert rows["gate"]["other"] == 0


def check_trace(path: Path) -> None:
    """Check that a trace has two steps and every named range."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    parts = (*STEP_PARTS[:-1], "forward", "backward")
    assert {STEP, *(PART + part for part in parts)} <= names
    assert sum(e["name"] == STEP for e in events) == 2


def test_unprofiled_run_has_nothing_attached(data, tmp_path, ranks1):
    argv = runs.flags(data, tmp_path, 3, "--eval-iters", "0")
    assert ranks1.run(_train_and_inspect, argv) == [[False] * 3]
    assert not (tmp_path / "checkpoints/profile").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--recompute-activations",),
        ("--zero-stage", "3", "--num-experts", "4"),
        ("--num-experts", "0", "--tensorboard-dir", "tb"),
    ],
    ids=" ".join,
)
def test_profile_works_in_other_modes(options, data, tmp_path, ranks1):
    """Recomputation ends in an exception of torch's own, ZeRO 3 has hooks, too, and a
    dense model has no MoE layer."""
    options = [str(tmp_path / o) if o == "tb" else o for o in options]
    is_dense = "--tensorboard-dir" in options
    if is_dense:
        options += ["--save", ""]
    argv = runs.flags(data, tmp_path, 4, "--eval-iters", "0", *PROFILE, *options)
    attached = ranks1.run(_train_and_inspect, argv, timeout=300)
    assert attached == [[False, False, True, True]]
    folder = tmp_path / ("tb/profile" if is_dense else "checkpoints/profile")
    rows = read_table(folder / "rank0.txt")
    check_sums(rows, folder / "rank0.txt")
    for part in ("gate", "dispatch", "experts"):
        if is_dense:
            assert rows[part]["all"] == 0
        else:
            assert rows[part]["backward"] > 0, part
    assert rows["attention"]["backward"] > 0


class _Sleep(torch.autograd.Function):
    """The identity, which sleeps in its forward and backward pass."""

    @staticmethod
    def forward(ctx, x, forward_seconds, backward_seconds):
        ctx.backward_seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.backward_seconds)
        return grad.clone(), None, None


def _train_with_sleeps(argv: list[str]) -> None:
    """On a rank: a run in which known parts sleep for known times.

    A step has 2 micro-batches, and the model 2 layers with attention, 1 with experts.
    """
    from megatron.data.loader import BatchLoader
    from megatron.engine.engine import Engine
    from megatron.engine.optimizer import AdamW
    from megatron.model import gpt
    from megatron.model.attention import Attention
    from megatron.moe.experts.types.mlp import MLPExperts

    def sleep_before(cls, name: str, seconds: float, on_rank0: bool = True) -> None:
        function = getattr(cls, name)

        def sleeping(self, *args, **kwargs):
            if on_rank0 or dist.get_rank():
                time.sleep(seconds)
            return function(self, *args, **kwargs)

        patch.setattr(cls, name, sleeping)

    def sleep_inside(cls, forward_seconds: float, backward_seconds: float) -> None:
        function = cls.forward

        def sleeping(self, x, *args, **kwargs):
            y = function(self, x, *args, **kwargs)
            return _Sleep.apply(y, forward_seconds, backward_seconds)

        patch.setattr(cls, "forward", sleeping)

    loss = gpt.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        sleep_before(BatchLoader, "__next__", 0.02)
        sleep_before(AdamW, "step", 0.05)
        sleep_inside(Attention, 0.03, 0.04)
        sleep_inside(MLPExperts, 0.05, 0.06)
        patch.setattr(
            gpt, "linear_cross_entropy", lambda *args: _Sleep.apply(loss(*args), 0.07, 0.08)
        )
        sleep_before(Engine, "step", 1.0, on_rank0=False)
        runs.train(argv)


def test_sleeps_appear_in_their_parts(data, tmp_path, ranks2):
    """In the row of their part; a late rank is communication on the other."""
    argv = runs.flags(data, tmp_path, 4, *runs.EP2, "--eval-iters", "0", *PROFILE)
    ranks2.run(_train_with_sleeps, argv, timeout=300)
    folder = tmp_path / "checkpoints/profile"
    assert sorted(p.name for p in folder.iterdir()) == ["rank0.trace.json.gz", "rank0.txt"]
    rows = read_table(folder / "rank0.txt")
    step_ms = check_sums(rows, folder / "rank0.txt")
    slept_ms = {
        ("data", "other"): 40,
        ("optimizer", "other"): 50,
        ("attention", "forward"): 120,
        ("attention", "backward"): 160,
        ("experts", "forward"): 100,
        ("experts", "backward"): 120,
        ("output and loss", "forward"): 140,
        ("output and loss", "backward"): 160,
    }
    waited_ms = rows["communication"]["all"]
    assert waited_ms >= 500, "of the second by which rank 1 is late; rank 0 may be late, too"
    # What the model itself takes: 200 ms, or more on a busy machine.
    slack_ms = max(200, step_ms - sum(slept_ms.values()) - waited_ms)
    for (part, phase), ms in slept_ms.items():
        assert ms <= rows[part][phase] <= ms + slack_ms, (part, phase, rows[part])
    assert rows["the rest"]["all"] < slack_ms and rows["gate"]["all"] < slack_ms


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"profile_step_end": 10},
            "--profile-step-end is 10; allowed: more than --profile-step-start, which is 10",
        ),
        ({"profile_step_start": -1}, "--profile-step-start is -1; allowed: 0 or more"),
        (
            {"profile_ranks": ()},
            r"--profile-ranks is \[\]; allowed: one rank or more, each 0 or more",
        ),
        (
            {"profile_ranks": (0, -1)},
            r"--profile-ranks is \[0, -1\]; allowed: one rank or more",
        ),
    ],
)
def test_invalid_flags_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProfilingConfig(profile=True, **options)


@pytest.mark.parametrize(
    "options, done, iterations, message",
    [
        ({"profile_ranks": (0, 2)}, 0, 100, r"--profile-ranks is \[0, 2\]; allowed: 0 to 1"),
        (
            {},
            0,
            11,
            "--profile-step-end is 12; allowed: at most 11, where this run ends. "
            "Set it and --profile-step-start",
        ),
        (
            {"exit_interval": 8},
            0,
            100,
            "--profile-step-end is 12; allowed: at most 8, where this run ends",
        ),
        (
            {"exit_interval": 4, "profile_step_end": 13},
            8,
            100,
            "--profile-step-end is 13; allowed: at most 12",
        ),
    ],
)
def test_flags_beyond_the_run_are_refused(options, done, iterations, message):
    options = dict(options)
    exit_interval = options.pop("exit_interval", 0)
    last = FaultToleranceConfig(exit_interval).last_iteration(done, iterations)
    with pytest.raises(ValueError, match=message) as caught:
        StepProfiler(ProfilingConfig(**options), Path(), Groups(world_size=2), done, last)
    assert "\n" not in str(caught.value)


def test_restarted_run_continues_without_profile(caplog, tmp_path):
    """It has the flags of the first start: iterations done already are no error."""
    with caplog.at_level("WARNING", logger="megatron"):
        profiler = StepProfiler(ProfilingConfig(), tmp_path / "profile", Groups(), 11, 11)
    steps = []
    profiler.step(11, lambda: steps.append(1), engine=None)
    assert steps == [1] and not (tmp_path / "profile").exists()
    assert "iteration 11 is done already; nothing is profiled" in caplog.text


@pytest.mark.parametrize(
    "options, done, iterations, end",
    [
        ({"profile_step_start": 10}, 10, 12, 12),
        ({"profile_step_start": 10, "exit_interval": 4}, 8, 100, 12),
        ({"profile_step_start": 3, "profile_step_end": 6, "exit_interval": 6}, 0, 13, 6),
    ],
)
def test_last_iterations_can_be_profiled(options, done, iterations, end):
    options = dict(options)
    exit_interval = options.pop("exit_interval", 0)
    last = FaultToleranceConfig(exit_interval).last_iteration(done, iterations)
    config = ProfilingConfig(**options)
    profiler = StepProfiler(config, Path(), Groups(), done, last)
    assert profiler.ranks and profiler.end == end


def test_short_run_stops_before_training(data, tmp_path, ranks1):
    argv = runs.flags(data, tmp_path, 3, "--eval-iters", "0", *PROFILE)
    with pytest.raises(RuntimeError, match="--profile-step-end is 4; allowed: at most 3"):
        ranks1.run(runs.train, argv)
    assert not (tmp_path / "metrics.jsonl").exists()


# Files


def test_folder_is_with_the_other_outputs():
    both = {"save": "s", "tensorboard_dir": "t"}
    for options, folder in (
        ({"profile_dir": "p", **both}, "p"),
        (both, "s/profile"),
        ({"tensorboard_dir": "t"}, "t/profile"),
        ({}, "profile"),
    ):
        options = {"save": "", "tensorboard_dir": "", **options}
        config = ProfilingConfig(profile_dir=options.pop("profile_dir", ""))
        assert profile_folder(config, **options) == Path(folder)


class _BrokenProfiler:
    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")


def test_failed_trace_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_trace(_BrokenProfiler(), tmp_path / "rank0.trace.json.gz")
    assert not list(tmp_path.iterdir())


# Start-up


def test_startup_stages_are_logged_once(monkeypatch, capsys):
    log.setup()
    moments = iter([101.5, 103.75, 104.0, 999.0])
    monkeypatch.setattr(time, "time", lambda: next(moments, 1000.0))
    start_up = StartupTimer(100.0)
    start_up.mark("torch")
    start_up.mark("data, and model")
    start_up.end("first step")
    start_up.end("first step")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "start-up" in x]
    assert line.endswith("start-up: 4.00 s: torch 1.50, data, and model 2.25, first step 0.25")


def test_run_logs_its_startup_stages(data, tmp_path, ranks1):
    out = ranks1.run(
        _train_with_log,
        runs.flags(data, tmp_path, 2, "--eval-iters", "0"),
        str(tmp_path / "out"),
    )
    lines = [x for x in Path(out[0]).read_text().splitlines() if "start-up: " in x]
    assert len(lines) == 1
    stages = re.findall(r"([a-zA-Z ]+) \d+\.\d\d", lines[0].split(" s: ")[1])
    assert [stage.strip() for stage in stages] == [
        "torch",
        "tokenizer",
        "DeepSpeed and process groups",
        "data",
        "model",
        "engine",
        "evaluation",
        "first step",
    ]


def _train_with_log(argv: list[str], path: str) -> str:
    """On a rank: a run with its log in a file."""
    import contextlib

    with open(path, "w") as file, contextlib.redirect_stdout(file):
        log.setup()
        runs.train(argv)
    return path
