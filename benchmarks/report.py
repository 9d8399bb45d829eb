"""Shared by all benchmarks: interleaved timing, ratios with their spread, one table.

Every benchmark has the flags --json FILE (also write the rows), --check (exit 1 when a
bar does not hold) and --quick (fewer rounds, under a minute).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of a table: `name` took `ratio` times as long as `baseline`."""

    name: str
    baseline: str
    ratio: float
    """Median of the per-round ratios."""
    low: float
    """First quartile of the per-round ratios."""
    high: float
    """Third quartile of the per-round ratios."""
    bar: float | None = None
    """Largest ratio allowed; None: reported only."""

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within the bar; None: there is no bar."""
        if self.bar is None:
            return None
        return self.ratio <= self.bar


def parser(description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the flags that every benchmark has."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    p.add_argument("--check", action="store_true", help="exit 1 when a bar does not hold")
    p.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    return p


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Measure the seconds of each function in each round.

    A round calls every function once, so that slow phases of a shared machine affect
    all of them alike.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
    seconds: dict[str, list[float]], baseline: str, bars: dict[str, float] | None = None
) -> list[Row]:
    """Compute the ratios of every function to the baseline, round by round."""
    bars = bars or {}
    rows = []
    for name, values in seconds.items():
        if name == baseline:
            continue
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=True)]
        rows.append(row(name, baseline, ratios, bars.get(name)))
    return rows


def row(name: str, baseline: str, ratios: list[float], bar: float | None = None) -> Row:
    """Summarize per-round ratios by their median and quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(name, baseline, statistics.median(ratios), low, high, bar)


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most memory that torch has allocated at one time inside a function."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = 0
    peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def finish(rows: list[Row], args: argparse.Namespace) -> int:
    """Print the table, write --json, and return the exit code."""
    name_width = max([40, *(len(r.name) for r in rows)])
    baseline_width = max([30, *(len(r.baseline) for r in rows)])
    print(
        f"{'what':{name_width}s} {'against':{baseline_width}s} {'ratio':>6s}  "
        f"{'quartiles':>13s}  bar"
    )
    for r in rows:
        bar = ""
        if r.bar is not None:
            bar = f"<= {r.bar:g} {'holds' if r.holds else 'MISSED'}"
        print(
            f"{r.name:{name_width}s} {r.baseline:{baseline_width}s} {r.ratio:6.2f}  "
            f"{r.low:5.2f} - {r.high:5.2f}  {bar}"
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{**asdict(r), "holds": r.holds} for r in rows], f, indent=1)
    if args.check and any(r.holds is False for r in rows):
        return 1
    return 0


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(number: int, job: Callable[..., Any], *args: Any) -> Any:
    """Run `job(groups, *args)` on gloo ranks and return what it returns on rank 0.

    The ranks are new processes with one thread each.

    Raises:
        RuntimeError: a rank failed.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, number, port, job, args, answers))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    while answers.empty():
        time.sleep(0.2)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            raise RuntimeError("a rank failed; its message is above")
    answer = answers.get()
    for process in processes:
        process.join()
    return answer


def _rank(
    rank: int, number: int, port: int, job: Callable[..., Any], args: tuple, answers: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        KINETO_LOG_LEVEL="99",  # silences torch's profiler, which would write to stderr
    )
    import torch

    torch.set_num_threads(1)
    from megatron.engine import distributed

    answer = job(distributed.init_distributed(number), *args)
    if rank == 0:
        answers.put(answer)
    distributed.destroy()
