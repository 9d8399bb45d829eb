"""A table of a step's time by part of the model, from a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

STEP = "training step"

PART = "part: "

PARTS = (
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
"""Rows of the table. dispatch is a mixture layer without its gate and experts, experts what their module does (local
paths and shared experts too), output and loss all that follows the final norm, communication what this rank spends on
collectives, which is mostly waiting for the others. Gradients are accumulated in the rest's backward."""

PHASES = ("forward", "backward", "other")

NODE = "autograd::engine::evaluate_function: "
"""how the profiler names the backward pass of one operation"""


@dataclass(frozen=True, slots=True)
class Span:
    """One range or operation that the profiler saw on a host thread."""

    name: str
    start: float
    end: float
    """microseconds"""
    thread: int
    sequence: int = -1
    """the number that autograd would give, or gave, to the operation's node; -1: none"""
    forward_thread: int = 0
    """of a backward operation, the thread whose numbers these are"""
    device: float = 0.0
    """microseconds of the device's kernels that it launched itself"""


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """Milliseconds of one step, the mean of some, by (part, phase). The host's sum up to the step's time."""

    steps: int
    step_ms: float
    host_ms: Counter
    device_ms: Counter
    """of kernels, by what launched them; they run beside the host and each other"""


def spans_of(profiler: torch.profiler.profile) -> list[Span]:
    """All that a finished profiler saw on the host."""
    return [
        Span(
            e.name,
            e.time_range.start,
            e.time_range.end,
            e.thread,
            e.sequence_nr,
            e.fwd_thread or 0,
            sum(kernel.duration for kernel in e.kernels),
        )
        for e in profiler.events()
        if e.device_type == DeviceType.CPU
    ]


def break_down_step(spans: Iterable[Span]) -> StepBreakdown:
    """Share out the time of the steps: each moment belongs to the innermost range or operation that says of which part
    it is, so no time counts twice.

    The backward pass of an operation belongs to the operation's part: autograd numbers the nodes of a thread in the
    order of their operations, and the profiler notes the number with both. What is computed again in the backward pass
    counts as backward of its part.
    """
    spans = list(spans)
    steps = [s for s in spans if s.name == STEP]
    assert steps, "the profile has no training step"
    # The device's backward pass has its own thread, while the step's waits for it.
    threads = {steps[0].thread, *(s.thread for s in spans if s.name.startswith(NODE))}
    host, device = Counter(), Counter()
    parts: dict[tuple[int, int], str] = {}
    open_spans: list[tuple[float, tuple[str, str]]] = []
    now = 0.0

    def advance(to: float) -> None:
        """Give the time up to `to` to the spans that are open until then."""
        nonlocal now
        while open_spans:
            end, key = open_spans[-1]
            host[key] += max(0.0, min(end, to) - now) / 1000 / len(steps)
            now = max(now, min(end, to))
            if end > to:
                return
            open_spans.pop()
        now = to

    for span in sorted(
        (s for s in spans if s.thread in threads), key=lambda s: (s.start, -s.end)
    ):
        advance(span.start)
        if not open_spans and span.name != STEP:
            continue
        end, key = open_spans[-1] if open_spans else (span.end, ("the rest", "other"))
        key = _key(span, key, parts)
        device[key] += span.device / 1000 / len(steps)
        open_spans.append((min(span.end, end), key))
    advance(float("inf"))
    return StepBreakdown(
        len(steps), sum(s.end - s.start for s in steps) / 1000 / len(steps), host, device
    )


def _key(
    span: Span, outer: tuple[str, str], parts: dict[tuple[int, int], str]
) -> tuple[str, str]:
    """(part, phase) of a span within one of `outer`; `parts` learns whose the numbers of nodes are."""
    part, phase = outer
    name = span.name.removeprefix(PART)
    if name in PHASES and name != span.name:
        return "the rest", name
    if name != span.name:
        part = name
    elif span.name.startswith("c10d::"):
        part = "communication"
    elif span.name.startswith(NODE):
        return parts.get((span.forward_thread, span.sequence), part), "backward"
    if span.sequence >= 0:  # the last operation with a number is the one whose node got it
        parts[span.forward_thread or span.thread, span.sequence] = part
    return part, phase


def profile_table(a: StepBreakdown, start: int, end: int, rank: int, before_ms: float) -> str:
    """The account as text.

    Args:
        start, end: iterations start + 1 to end were profiled.
        before_ms: of the last step that was not; 0: none.
    """
    before = f"; the step before took {before_ms:.1f} without" if before_ms else ""
    lines = [
        f"iterations {start + 1} to {end} on rank {rank}: {a.step_ms:.1f} ms each with the profiler on{before}",
        f"{'ms a step':17s}"
        + "".join(f"{phase:>10s}" for phase in PHASES)
        + f"{'all':>10s}{'share':>8s}",
    ]
    gpu = sum(a.device_ms.values())
    lines[1] += f"{'GPU':>10s}" if gpu else ""
    for part in PARTS:
        times = [a.host_ms[part, phase] for phase in PHASES]
        line = f"{part:17s}" + "".join(f"{ms:10.1f}" if ms else " " * 10 for ms in times)
        line += f"{sum(times):10.1f}{sum(times) / a.step_ms:8.1%}"
        lines.append(
            line + (f"{sum(a.device_ms[part, phase] for phase in PHASES):10.1f}" if gpu else "")
        )
    totals = [sum(a.host_ms[part, phase] for part in PARTS) for phase in PHASES]
    line = f"{'the step':17s}" + "".join(f"{ms:10.1f}" for ms in totals)
    lines.append(
        line
        + f"{sum(totals):10.1f}{sum(totals) / a.step_ms:8.1%}"
        + (f"{gpu:10.1f}" if gpu else "")
    )
    lines.append(
        "dispatch: mixture layers without their gates and experts; communication: with waiting for the others"
    )
    return "\n".join(lines)
