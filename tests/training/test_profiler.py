"""Profiles against a dumb loop over moments, against naps at known places, and what a run writes; start-up's stages."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

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
    PARTS,
    PHASES,
    STEP,
    Span,
    break_down_step,
    profile_table,
)
from megatron.training.profiler import StepProfiler, profile_folder, write_trace
from megatron.training.startup_timer import StartupTimer

PROFILE = ("--profile", "--profile-step-start", "2", "--profile-step-end", "4")


def read_table(path: Path) -> dict[str, dict[str, float]]:
    """Rows of a table by part; times by phase, "all" and "share"."""
    names, rows = (*PHASES, "all", "share"), {}
    first, head, *lines, last = path.read_text().splitlines()
    ends = [head.index(name) + len(name) for name in names]
    for line in lines:
        cells = [line[a:b].strip() for a, b in zip([17, *ends], ends, strict=False)]
        rows[line[:17].strip()] = {
            name: float(cell.rstrip("%") or 0) for name, cell in zip(names, cells, strict=True)
        }
    return rows


def check_sums(rows: dict[str, dict[str, float]], path: Path) -> float:
    """That parts add up to the step; returns its milliseconds."""
    assert list(rows) == [*PARTS, "the step"]
    step = float(re.search(r": ([\d.]+) ms each", path.read_text()).group(1))
    for column, total in (
        *((phase, rows["the step"][phase]) for phase in PHASES),
        ("all", step),
        ("share", 100),
    ):
        assert sum(rows[part][column] for part in PARTS) == pytest.approx(total, abs=0.51), (
            column
        )
    for row in rows.values():
        assert sum(row[phase] for phase in PHASES) == pytest.approx(row["all"], abs=0.21)
        assert row["share"] == pytest.approx(100 * row["all"] / step, abs=0.2)
    return step


# The arithmetic


def dumb_part(span: Span, around: list[Span], spans: list[Span]) -> tuple[str, str]:
    """(part, phase) of a span inside others: the first answer from the inside out."""
    part = phase = ""
    for s in [span, *reversed(around)]:
        name = s.name.removeprefix(PART)
        own = kind = ""
        if s.name in (f"{PART}forward", f"{PART}backward"):
            own, kind = "the rest", name
        elif s.name.startswith(PART):
            own = name
        elif s.name.startswith("c10d::"):
            own = "communication"
        elif s.name.startswith(NODE):
            made_by = [
                o
                for o in spans
                if o.sequence == s.sequence >= 0 == o.forward_thread and o.start < s.start
            ]
            if made_by:
                maker = max(made_by, key=lambda o: o.start)
                own = dumb_part(maker, enclosing(maker, spans), spans)[0]
            kind = "backward"
        part, phase = part or own, phase or kind
    return part or "the rest", phase or "other"


def enclosing(span: Span, spans: list[Span]) -> list[Span]:
    """The others that a span is in, outermost first. No two of a random tree have the same ends."""
    return sorted(
        (s for s in spans if s.start < span.start and s.end > span.end), key=lambda s: s.start
    )


def random_steps(seed: int) -> list[Span]:
    """Two steps of a forward and a backward pass; every range and operation at random."""
    rng, spans, numbers = random.Random(seed), [], [0]

    def fill(start: int, end: int, depth: int, backward: bool) -> None:
        at = start + 1
        while end - at > 6 and rng.random() < 0.8:
            stop = rng.randrange(at + 3, end)
            kind = rng.choice(["part", "op", "op", "comm", "node" if backward else "op"])
            name = {
                "part": PART + rng.choice(["gate", "experts", "data"]),
                "op": "aten::mm",
                "comm": "c10d::allreduce_",
                "node": NODE + "MmBackward0",
            }[kind]
            number, thread = -1, 0
            if kind == "node":
                number, thread = rng.randrange(-1, numbers[0] + 3), 1
            elif kind == "op" and not backward and rng.random() < 0.7:
                number, numbers[0] = (
                    numbers[0],
                    numbers[0] + rng.randrange(2),
                )  # some make no node, and share a number
            spans.append(Span(name, at, stop, 1, number, thread))
            if depth < 4:
                fill(at, stop, depth + 1, backward)
            at = stop + 1

    for first in (100, 1000):
        spans.append(Span(STEP, first, first + 800, 1))
        for name, start in (
            ("forward", first + 10),
            ("backward", first + 310),
            ("optimizer", first + 710),
        ):
            end = start + (80 if name == "optimizer" else 290)
            spans.append(Span(PART + name, start, end, 1))
            fill(start, end, 0, name == "backward")
    spans.append(Span("aten::outside", 950, 960, 1))
    rng.shuffle(spans)
    return spans


@pytest.mark.parametrize("seed", range(20))
def test_every_moment_belongs_to_the_innermost_range_that_names_a_part(seed):
    spans = random_steps(seed)
    expected: dict[tuple[str, str], float] = {}
    for moment in range(2000):
        inside = sorted((s for s in spans if s.start <= moment < s.end), key=lambda s: s.start)
        if inside and inside[0].name == STEP:
            key = dumb_part(inside[-1], inside[:-1], spans)
            expected[key] = expected.get(key, 0) + 1 / 1000 / 2
    got = break_down_step(spans)
    assert got.steps == 2 and got.step_ms == pytest.approx(0.8)
    assert {k: v for k, v in got.host_ms.items() if v} == pytest.approx(expected)
    assert sum(got.host_ms.values()) == pytest.approx(got.step_ms)


def test_a_backward_pass_on_a_thread_of_its_own_and_the_devices_kernels():
    """As on a GPU: the step's thread waits while the device's thread runs the nodes, and what launches a kernel owns
    its time. Threads that run no nodes are not the step's."""
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
    got = break_down_step(spans)
    assert {k: v for k, v in got.host_ms.items() if v} == {
        ("attention", "forward"): 20,
        ("the rest", "forward"): 20,
        ("attention", "backward"): 20,
        ("the rest", "backward"): 20,
        ("the rest", "other"): 20,
    }
    assert {k: v for k, v in got.device_ms.items() if v} == {
        ("attention", "forward"): 5,
        ("attention", "backward"): 50,
    }
    text = profile_table(got, 10, 11, 0, 0.0).splitlines()
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


def _train_and_look(argv: list[str]) -> list[bool]:
    """In a rank: a run; whether anything of a profile was attached in each of its steps."""
    from megatron.training.trainer import Trainer

    seen, step, wait = [], Trainer.step, dist.Work.wait

    def looking(self: Trainer) -> None:
        engine = self.engine.deepspeed
        hooks = [
            h
            for m in engine.module.modules()
            for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]
        marks = [
            any("profile" in h.__module__ for h in hooks),
            "backward" in vars(engine),
            "step" in vars(engine),
            dist.Work.wait is not wait,
            type(self.train_batches).__name__ == "generator",
        ]
        assert len(set(marks)) == 1, marks
        seen.append(marks[0])
        step(self)

    Trainer.step = looking
    try:
        runs.train(argv)
    finally:
        Trainer.step = step
    assert dist.Work.wait is wait
    return seen


def test_two_ranks_write_traces_and_tables(data, tmp_path, ranks2):
    """Sharded experts, two micro-batches a step: all parts are there on both ranks, and add up to the step."""
    argv = runs.flags(
        data, tmp_path, 5, *runs.EP2, "--eval-iters", "0", *PROFILE, "--profile-ranks", "0", "1"
    )
    looks = ranks2.run(_train_and_look, argv, timeout=300)
    assert looks == [[False, False, True, True, False]] * 2
    folder = tmp_path / "checkpoints/profile"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"rank{r}{end}" for r in (0, 1) for end in (".trace.json.gz", ".txt")
    ]
    steps = []
    for rank in (0, 1):
        path = folder / f"rank{rank}.txt"
        rows = read_table(path)
        steps.append(check_sums(rows, path))
        assert path.read_text().startswith(f"iterations 3 to 4 on rank {rank}: ")
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
        assert (
            rows["optimizer"]["forward"]
            == rows["data"]["forward"]
            == rows["gate"]["other"]
            == 0
        )
        with gzip.open(folder / f"rank{rank}.trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        named = {e["name"] for e in events if e.get("cat") == "user_annotation"}
        assert {
            STEP,
            *(PART + part for part in PARTS[:-1]),
            f"{PART}forward",
            f"{PART}backward",
        } <= named
        assert sum(e["name"] == STEP for e in events) == 2
    logged = [m["step_time_ms"] for m in runs.metrics(tmp_path)[2:4]]
    assert sum(steps) == pytest.approx(sum(logged), rel=0.05), "of the mean over ranks"


def test_a_run_without_the_flag_has_nothing_attached(data, tmp_path, ranks1):
    assert ranks1.run(_train_and_look, runs.flags(data, tmp_path, 3, "--eval-iters", "0")) == [
        [False] * 3
    ]
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
def test_one_rank_however_it_runs(options, data, tmp_path, ranks1):
    """Recomputation ends in an exception of torch's own, ZeRO 3 has hooks too, and a dense model has no mixture."""
    options = [str(tmp_path / o) if o == "tb" else o for o in options]
    dense = "--tensorboard-dir" in options
    argv = runs.flags(
        data,
        tmp_path,
        4,
        "--eval-iters",
        "0",
        *PROFILE,
        *options,
        *(["--save", ""] if dense else []),
    )
    assert ranks1.run(_train_and_look, argv, timeout=300) == [[False, False, True, True]]
    folder = tmp_path / ("tb/profile" if dense else "checkpoints/profile")
    rows = read_table(folder / "rank0.txt")
    check_sums(rows, folder / "rank0.txt")
    mixture = sum(rows[part]["all"] for part in ("gate", "dispatch", "experts"))
    assert (
        (mixture == 0)
        if dense
        else all(rows[p]["backward"] > 0 for p in ("gate", "dispatch", "experts"))
    )
    assert rows["attention"]["backward"] > rows["attention"]["forward"] * 0.5


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, before, after):
        ctx.after = after
        time.sleep(before)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.after)
        return grad.clone(), None, None


def _train_with_naps(argv: list[str]) -> None:
    """In a rank: a run in which known parts take known times, 2 micro-batches x 2 layers a step."""
    from megatron.data.loader import BatchLoader
    from megatron.engine.engine import Engine
    from megatron.engine.optimizer import AdamW
    from megatron.model import gpt
    from megatron.model.attention import Attention
    from megatron.moe.experts.grouped_experts import GroupedExperts

    def nap_before(cls, name: str, seconds: float, of_first_rank: bool = True) -> None:
        function = getattr(cls, name)

        def napping(self, *args, **kwargs):
            if of_first_rank or dist.get_rank():
                time.sleep(seconds)
            return function(self, *args, **kwargs)

        setattr(cls, name, napping)
        undo.append((cls, name, function))

    def nap_inside(cls, before: float, after: float) -> None:
        function = cls.forward

        def napping(self, x, *args, **kwargs):
            return _Nap.apply(function(self, x, *args, **kwargs), before, after)

        cls.forward = napping
        undo.append((cls, "forward", function))

    undo: list = []
    nap_before(BatchLoader, "__next__", 0.02)
    nap_before(AdamW, "step", 0.05)
    nap_inside(Attention, 0.03, 0.04)
    nap_inside(GroupedExperts, 0.05, 0.06)
    loss = gpt.linear_cross_entropy
    gpt.linear_cross_entropy = lambda *args: _Nap.apply(loss(*args), 0.07, 0.08)
    undo.append((gpt, "linear_cross_entropy", loss))
    nap_before(Engine, "step", 0.3, of_first_rank=False)
    try:
        runs.train(argv)
    finally:
        for cls, name, function in reversed(undo):
            setattr(cls, name, function)


def test_naps_are_found_where_they_are(data, tmp_path, ranks2):
    """Sleeping in a part, forward or backward, shows in its row; a rank that comes late, as the other's waiting."""
    argv = runs.flags(data, tmp_path, 4, *runs.EP2, "--eval-iters", "0", *PROFILE)
    ranks2.run(_train_with_naps, argv, timeout=300)
    folder = tmp_path / "checkpoints/profile"
    assert sorted(p.name for p in folder.iterdir()) == ["rank0.trace.json.gz", "rank0.txt"]
    rows = read_table(folder / "rank0.txt")
    check_sums(rows, folder / "rank0.txt")
    # 2 micro-batches, 2 layers with attention, 1 with experts
    for part, phase, naps in (
        ("data", "other", 40),
        ("optimizer", "other", 50),
        ("attention", "forward", 120),
        ("attention", "backward", 160),
        ("experts", "forward", 100),
        ("experts", "backward", 120),
        ("output and loss", "forward", 140),
        ("output and loss", "backward", 160),
    ):
        assert naps <= rows[part][phase] <= naps + 200, (part, phase, rows[part])
    assert rows["communication"]["all"] >= 250
    assert rows["the rest"]["all"] < 200 and rows["gate"]["all"] < 200


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
def test_what_no_run_can_do(options, message):
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
            "--profile-step-end is 12; allowed: at most 11, where this run ends. Set it and --profile-step-start",
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
def test_what_this_run_cannot_do(options, done, iterations, message):
    options = dict(options)
    exit_interval = options.pop("exit_interval", 0)
    last = FaultToleranceConfig(exit_interval).last_iteration(done, iterations)
    with pytest.raises(ValueError, match=message) as caught:
        StepProfiler(ProfilingConfig(**options), Path(), Groups(world_size=2), done, last)
    assert "\n" not in str(caught.value)


def test_a_run_that_starts_again_behind_the_profiled_iterations_goes_on_without(
    caplog, tmp_path
):
    """The same flags as the first time: a restart by machine must not fail."""

    class Trainer:
        progress, steps = SimpleNamespace(iteration=11), 0

        def step(self):
            self.steps += 1

    trainer = Trainer()
    with caplog.at_level("WARNING", logger="megatron"):
        profiler = StepProfiler(ProfilingConfig(), tmp_path / "profile", Groups(), 11, 11)
    profiler.step(trainer)
    assert trainer.steps == 1 and not (tmp_path / "profile").exists()
    assert "iteration 11 is done already; nothing is profiled" in caplog.text


def test_the_last_iterations_of_a_run_can_be_profiled():
    for options, done, iterations in (
        ({}, 10, 12),
        ({"exit_interval": 4}, 8, 100),
        ({"exit_interval": 6}, 0, 13),
    ):
        last = FaultToleranceConfig(**options).last_iteration(done, iterations)
        config = ProfilingConfig(profile_step_start=10)
        if not done:
            config = ProfilingConfig(profile_step_start=3, profile_step_end=6)
        assert StepProfiler(config, Path(), Groups(), done, last).end in (12, 6)


def test_a_run_too_short_stops_before_it_trains(data, tmp_path, ranks1):
    argv = runs.flags(data, tmp_path, 3, "--eval-iters", "0", *PROFILE)
    with pytest.raises(RuntimeError, match="--profile-step-end is 4; allowed: at most 3"):
        ranks1.run(runs.train, argv)
    assert not (tmp_path / "metrics.jsonl").exists()


# Files


def test_where_profiles_go():
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


class _Broken:
    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_trace(_Broken(), tmp_path / "rank0.trace.json.gz")
    assert not list(tmp_path.iterdir())


# Start-up


def test_start_up_says_its_stages_once(monkeypatch, capsys):
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


def test_a_run_says_what_its_start_took(data, tmp_path, ranks1):
    out = ranks1.run(
        _captured, runs.flags(data, tmp_path, 2, "--eval-iters", "0"), str(tmp_path / "out")
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


def _captured(argv: list[str], path: str) -> str:
    """In a rank: a run, its log in a file."""
    import contextlib

    with open(path, "w") as file, contextlib.redirect_stdout(file):
        log.setup()
        runs.train(argv)
    return path
