"""A table of a training step's time by part of the model, computed from a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

STEP = "training step"
"""Name of the range around a training step."""

PART = "part: "
"""Prefix of the names of ranges around parts of a step."""

STEP_PARTS = (
    "attention",
    "dense FFN",
    "gate",
    "dispatch",
    "experts",
    "output and loss",
    "optimizer",
    "communication",
    "data",
    "the rest",
)
"""Rows of the table. `dispatch` is an MoE layer without its gate and experts; `experts`
includes shared and zero-computation experts; `output and loss` is everything after the
final norm; `communication` is this rank's time in collectives, mostly spent waiting for
other ranks. Gradients are accumulated in the backward phase of `the rest`."""

PHASES = ("forward", "backward", "other")

NODE = "autograd::engine::evaluate_function: "
"""Prefix with which the profiler names the backward pass of one operation."""

_REST = ("the rest", "other")


@dataclass(frozen=True, slots=True)
class Span:
    """One range or operation that the profiler recorded on a host thread."""

    name: str
    start: float
    """Microseconds."""
    end: float
    """Microseconds."""
    thread: int
    sequence: int = -1
    """Sequence number of the autograd node that the operation creates or, in the
    backward pass, runs; -1: none."""
    forward_thread: int = 0
    """For a backward operation, the thread that numbered the node."""
    device_us: float = 0.0
    """Microseconds of the device kernels that it launched itself."""


# What torch records around each operation that runs inside a mode of its dispatcher, as in gates
# under activation recomputation. A range that is opened there begins inside it and ends later.
_DISPATCH_MODE = "PythonDispatchMode"


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """Milliseconds of one step by (part, phase), averaged over the profiled steps."""

    steps: int
    """Number of profiled steps."""
    step_ms: float
    """Mean duration of a step."""
    host_ms: Counter
    """Host time. Its values sum to `step_ms`."""
    device_ms: Counter
    """Time of device kernels, by the operation that launched them. Kernels run
    concurrently with the host and with each other."""


def spans_of(profiler: torch.profiler.profile) -> list[Span]:
    """Collect the ranges and operations that a profiler recorded on the host."""
    events = profiler.events()
    return [_span(event) for event in events if event.device_type == DeviceType.CPU]


def _span(event: Any) -> Span:
    return Span(
        event.name,
        event.time_range.start,
        event.time_range.end,
        event.thread,
        event.sequence_nr,
        event.fwd_thread or 0,
        sum(kernel.duration for kernel in event.kernels),
    )


def break_down_step(spans: Iterable[Span]) -> StepBreakdown:
    """Attribute the time of the profiled steps to parts and phases.

    Each moment belongs to the innermost range or operation whose part is known, so no
    time counts twice.

    The backward pass of an operation belongs to the operation's part: autograd numbers
    the nodes of a thread in the order of their operations, and the profiler records the
    number with both. Recomputation in the backward pass counts as backward of its part.
    """
    spans = list(spans)
    steps = [span for span in spans if span.name == STEP]
    assert steps, "the profile has no training step"
    # On a device the backward pass has its own thread, while the step's thread waits.
    threads = {span.thread for span in spans if span.name.startswith(NODE)}
    threads.add(steps[0].thread)
    relevant = [
        span for span in spans if span.thread in threads and span.name != _DISPATCH_MODE
    ]
    relevant.sort(key=lambda span: (span.start, -span.end))
    open_spans = _OpenSpans(len(steps))
    device_ms: Counter = Counter()
    part_of_node: dict[tuple[int, int], str] = {}
    for span in relevant:
        open_spans.advance(span.start)
        if span.name != STEP and not open_spans.stack:
            continue  # between two steps
        outer = open_spans.stack[-1] if open_spans.stack else (span.end, _REST)
        outer_end, outer_key = outer
        key = _key(span, outer_key, part_of_node)
        device_ms[key] += span.device_us / 1000 / len(steps)
        open_spans.stack.append((min(span.end, outer_end), key))
    open_spans.advance(float("inf"))
    step_ms = sum(step.end - step.start for step in steps) / 1000 / len(steps)
    return StepBreakdown(len(steps), step_ms, open_spans.host_ms, device_ms)


class _OpenSpans:
    """Spans that are open at the current moment, and the time of each key."""

    def __init__(self, steps: int):
        self.stack: list[tuple[float, tuple[str, str]]] = []
        """(end, key) of the open spans, innermost last."""
        self.host_ms: Counter = Counter()
        self._steps = steps
        self._now = 0.0

    def advance(self, to: float) -> None:
        """Attribute the time until `to` and close the spans that end before it."""
        while self.stack:
            end, key = self.stack[-1]
            until = min(end, to)
            self.host_ms[key] += max(0.0, until - self._now) / 1000 / self._steps
            self._now = max(self._now, until)
            if end > to:
                return
            self.stack.pop()
        self._now = to


def _key(
    span: Span, outer: tuple[str, str], part_of_node: dict[tuple[int, int], str]
) -> tuple[str, str]:
    """Determine (part, phase) of a span.

    Args:
        outer: (part, phase) of the span around it.
        part_of_node: part by (thread, sequence number) of an autograd node; extended
            here.
    """
    part, phase = outer
    if span.name.startswith(PART):
        name = span.name.removeprefix(PART)
        if name in PHASES:
            return "the rest", name
        part = name
    elif span.name.startswith("c10d::"):
        part = "communication"
    elif span.name.startswith(NODE) or (span.forward_thread and span.sequence >= 0):
        # The profiler can miss the event of a node and record the operation inside it.
        return part_of_node.get((span.forward_thread, span.sequence), part), "backward"
    if span.sequence >= 0:
        # Operations share a number until one of them creates the node: the last one.
        part_of_node[span.forward_thread or span.thread, span.sequence] = part
    return part, phase


def profile_table(
    breakdown: StepBreakdown, start: int, end: int, rank: int, unprofiled_ms: float
) -> str:
    """Format a breakdown as text.

    Args:
        start, end: iterations start + 1 to end were profiled.
        unprofiled_ms: duration of the step before the profiled ones; 0: there was none.
    """
    title = (
        f"iterations {start + 1} to {end} on rank {rank}: {breakdown.step_ms:.1f} ms each "
        "with the profiler on"
    )
    if unprofiled_ms:
        title += f"; the step before took {unprofiled_ms:.1f} ms without it"
    on_device = any(breakdown.device_ms.values())
    columns = "".join(f"{phase:>10s}" for phase in PHASES)
    header = f"{'ms per step':17s}{columns}{'all':>10s}{'share':>8s}"
    if on_device:
        header += f"{'GPU':>10s}"
    lines = [title, header]
    lines += [_table_row(breakdown, part, (part,), on_device) for part in STEP_PARTS]
    lines.append(_table_row(breakdown, "total", STEP_PARTS, on_device))
    lines.append(
        "dispatch: MoE layers without their gates and experts; communication: includes "
        "waiting for other ranks"
    )
    return "\n".join(lines)


def _table_row(
    breakdown: StepBreakdown, label: str, parts: tuple[str, ...], on_device: bool
) -> str:
    """Format the summed times of `parts` as one row of the table."""
    row = f"{label:17s}"
    total = 0.0
    for phase in PHASES:
        ms = sum(breakdown.host_ms[part, phase] for part in parts)
        row += f"{ms:10.1f}" if ms else " " * 10
        total += ms
    row += f"{total:10.1f}{total / breakdown.step_ms:8.1%}"
    if on_device:
        keys = [(part, phase) for part in parts for phase in PHASES]
        row += f"{sum(breakdown.device_ms[key] for key in keys):10.1f}"
    return row
