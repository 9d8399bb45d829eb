"""Shared by all benchmarks: interleaved timing, ratios with their spread, one table, --json, --check, --quick."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


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
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    p.add_argument("--check", action="store_true", help="exit 1 when a bar does not hold")
    p.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    return p


def interleave(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
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


def compare(seconds: dict[str, list[float]], baseline: str, bars: dict[str, float] | None = None) -> list[Row]:
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
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(name, baseline, statistics.median(ratios), low, high, bar)


def finish(rows: list[Row], args: argparse.Namespace) -> int:
    """Print the table, write the JSON file if asked; the exit code."""
    print(f"{'what':40s} {'against':30s} {'ratio':>6s}  {'quartiles':>13s}  bar")
    for r in rows:
        bar = "" if r.bar is None else f"<= {r.bar:g} {'holds' if r.holds else 'MISSED'}"
        print(f"{r.name:40s} {r.baseline:30s} {r.ratio:6.2f}  {r.low:5.2f} - {r.high:5.2f}  {bar}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump([{**asdict(r), "holds": r.holds} for r in rows], f, indent=1)
    return 1 if args.check and any(r.holds is False for r in rows) else 0
