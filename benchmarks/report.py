"""Shared by all benchmarks: interleaved timing, ratios with their spread, one table, --json, --check, --quick."""

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
    """median of the per-round ratios"""
    low: float
    high: float
    """quartiles of the per-round ratios"""
    bar: float | None = None
    """largest ratio allowed; None: reported only"""

    @property
    def holds(self) -> bool | None:
        return None if self.bar is None else self.ratio <= self.bar


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags every benchmark has."""
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
    """Seconds of each function in each round; one call of each per round, so that slow phases of a shared machine
    hit all of them alike."""
    for _ in range(warmup):
        for f in functions.values():
            f()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
    seconds: dict[str, list[float]], baseline: str, bars: dict[str, float] | None = None
) -> list[Row]:
    """Ratios of every function to the baseline, round by round."""
    rows = []
    for name, values in seconds.items():
        if name == baseline:
            continue
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=True)]
        rows.append(row(name, baseline, ratios, (bars or {}).get(name)))
    return rows


def row(name: str, baseline: str, ratios: list[float], bar: float | None = None) -> Row:
    """Median and quartiles of ratios that were taken round by round."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(name, baseline, statistics.median(ratios), low, high, bar)


def finish(rows: list[Row], args: argparse.Namespace) -> int:
    """Print the table, write the JSON file if asked; the exit code."""
    what, against = (
        max([40, *(len(r.name) for r in rows)]),
        max([30, *(len(r.baseline) for r in rows)]),
    )
    print(f"{'what':{what}s} {'against':{against}s} {'ratio':>6s}  {'quartiles':>13s}  bar")
    for r in rows:
        bar = "" if r.bar is None else f"<= {r.bar:g} {'holds' if r.holds else 'MISSED'}"
        print(
            f"{r.name:{what}s} {r.baseline:{against}s} {r.ratio:6.2f}  {r.low:5.2f} - {r.high:5.2f}  {bar}"
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{**asdict(r), "holds": r.holds} for r in rows], f, indent=1)
    return 1 if args.check and any(r.holds is False for r in rows) else 0


def on_ranks(number: int, job: Callable[..., Any], *args: Any) -> Any:
    """What `job(groups, *args)` returns on rank 0 of that many gloo ranks, fresh processes of one thread each.

    Raises:
        RuntimeError: a rank failed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, number, port, job, args, answers))
        for rank in range(number)
    ]
    for p in processes:
        p.start()
    while answers.empty():
        time.sleep(0.2)
        if any(p.exitcode for p in processes):
            for p in processes:
                p.terminate()
            raise RuntimeError("a rank failed; its message is above")
    answer = answers.get()
    for p in processes:
        p.join()
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
        KINETO_LOG_LEVEL="99",
    )  # or torch's profiler writes to stderr when it starts and stops
    import torch

    torch.set_num_threads(1)
    from megatron.engine import distributed as parallel

    answer = job(parallel.init_distributed(number), *args)
    if rank == 0:
        answers.put(answer)
    parallel.destroy()
