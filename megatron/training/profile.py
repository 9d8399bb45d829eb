"""Where time goes: the stages of a run's start, and the parts of a training step by torch's profiler.

The model's code knows nothing of profiling. While iterations are profiled, hooks and wrappers put named ranges around
its parts; before and after there are none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from megatron.config.schema import TrainConfig, require
from megatron.io import atomic_write
from megatron.log import get_logger
from megatron.model.attention import Attention
from megatron.model.gpt import GPT
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron.training.loop import Trainer

STEP = "training step"
PART = "part: "
PARTS = ("attention", "dense FFN", "gate", "dispatch", "experts", "output and loss", "optimizer", "communication",
         "data", "the rest")
"""Rows of the table. dispatch is a mixture layer without its gate and experts, experts what their module does (local
paths and shared experts too), output and loss all that follows the final norm, communication what this rank spends on
collectives, which is mostly waiting for the others. Gradients are accumulated in the rest's backward."""
PHASES = ("forward", "backward", "other")
NODE = "autograd::engine::evaluate_function: "
"""how the profiler names the backward pass of one operation"""


class StartUp:
    """The stages from the start of the process to the end of the first step, in seconds.

    Args:
        since: when the first stage began, as `time.time`; None: now.
    """

    def __init__(self, since: float | None = None):
        self._last = time.time() if since is None else since
        self._seconds: dict[str, float] = {}
        self._said = False

    def mark(self, stage: str) -> None:
        """A stage ends here, and the next one begins."""
        now = time.time()
        self._seconds[stage], self._last = now - self._last, now

    def end(self, stage: str) -> None:
        """The last stage ends, and all are logged; later calls do nothing."""
        if self._said:
            return
        self.mark(stage)
        self._said = True
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._seconds.items())
        get_logger().info("start-up: %.2f s: %s", sum(self._seconds.values()), stages)


class StepProfiler:
    """Profiles iterations start + 1 to end of a run on some ranks; afterwards writes the trace and the table.

    Args:
        done: iterations that are done when this run starts.
        iterations: of the whole schedule.
    Raises:
        ValueError: a rank that there is not, or iterations that this run does not reach.
    """

    def __init__(self, config: TrainConfig, groups: Groups, done: int, iterations: int):
        self.start, self.end, self.rank = config.profile_step_start, config.profile_step_end, groups.rank
        self.ranks, self.device = config.profile_ranks, groups.device
        require(max(self.ranks) < groups.world_size, "--profile-ranks", list(self.ranks),
                f"0 to {groups.world_size - 1}")
        if done > self.start:  # as of a run that was started again with the same flags
            get_logger().warning("--profile: iteration %d is done already; nothing is profiled", self.start + 1)
            self.ranks = ()
        exit_at = (done // config.exit_interval + 1) * config.exit_interval if config.exit_interval else iterations
        require(not self.ranks or self.end <= min(iterations, exit_at), "--profile-step-end", self.end,
                f"at most {min(iterations, exit_at)}, where this run ends",
                "Set it and --profile-step-start to iterations that it does.")
        self.folder = profile_folder(config)
        self._profiler: torch.profiler.profile | None = None
        self._attached = contextlib.ExitStack()
        self._before_ms = 0.0

    def step(self, trainer: Trainer) -> None:
        """One training step, profiled if it is to be."""
        done = trainer.progress.iteration
        if self.rank not in self.ranks or not self.start <= done < self.end:
            start = time.monotonic()
            trainer.step()
            self._before_ms = 1000 * (time.monotonic() - start)
        else:
            if done == self.start:
                self._begin(trainer)
            try:
                with record_function(STEP):
                    trainer.step()
            except BaseException:
                self._attached.close()
                raise
        if self.ranks and done + 1 == self.end:
            self._finish()

    def _begin(self, trainer: Trainer) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to stderr when it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._attached.callback(self._profiler.stop)
        self._attached.enter_context(named_parts(trainer))

    def _finish(self) -> None:
        """Write what was measured, and say so on the first rank."""
        if self._profiler is not None:
            self._attached.close()
            text = table(account(spans_of(self._profiler)), self.start, self.end, self.rank, self._before_ms)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_trace(self._profiler, self.folder / f"rank{self.rank}.trace.json.gz")
            atomic_write.write_text(self.folder / f"rank{self.rank}.txt", text + "\n")
            get_logger().info("%s", text)
            self._profiler = None
        get_logger().info("profiles of rank(s) %s: %s/rank*.txt, and rank*.trace.json.gz for Perfetto or "
                          "chrome://tracing", " ".join(map(str, self.ranks)), self.folder)


def profile_folder(config: TrainConfig) -> Path:
    """--profile-dir, or `profile` beside the run's other outputs: in --save, in --tensorboard-dir, or here."""
    return Path(config.profile_dir or Path(config.save or config.tensorboard_dir) / "profile")


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace under a temporary name, synced and then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp.gz")  # .gz: the profiler compresses by the name
    try:
        profiler.export_chrome_trace(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Names for the parts of a step


@contextlib.contextmanager
def named_parts(trainer: Trainer) -> Iterator[None]:
    """Within, every part of `trainer.step` runs in a range of its name."""
    engine = trainer.engine.deepspeed
    with contextlib.ExitStack() as stack:
        for module, part in module_parts(engine.module).items():
            _name_module(module, part, stack)
        _name_output(engine.module, stack)
        for owner, name, part in ((engine, "backward", "backward"), (engine, "step", "optimizer"),
                                  (dist.Work, "wait", "communication")):
            _name_calls(owner, name, part, stack)
        batches = trainer.train_batches
        trainer.train_batches = _named_items(batches, "data")
        stack.callback(setattr, trainer, "train_batches", batches)
        yield


def module_parts(model: GPT) -> dict[nn.Module, str]:
    """The part that each module's forward pass is, unless a module within it is another."""
    parts: dict[nn.Module, str] = {model: "forward"}
    for block in model.layers:
        parts |= {m: "attention" for m in block.modules() if isinstance(m, Attention)}
        ffn = block.mlp
        if not isinstance(ffn, MoELayer):
            parts[ffn] = "dense FFN"
            continue
        parts |= {ffn: "dispatch", ffn.gate: "gate", ffn.experts: "experts"}
        parts |= {m: "experts" for m in (*ffn.gate.local_paths, ffn.shared) if m is not None}
    return parts


def _name_module(module: nn.Module, part: str, stack: contextlib.ExitStack) -> None:
    ranges = []

    def before(*_: Any) -> None:
        ranges.append(_opened(part))

    def after(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(before).remove)
    # Always: recomputation in the backward pass ends with an exception, once it has all that it needs.
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _name_output(model: GPT, stack: contextlib.ExitStack) -> None:
    """What the model does after its last norm: the output layer may be the embedding's, and the loss is no module."""
    ranges = []

    def begin(*_: Any) -> None:
        ranges.append(_opened("output and loss"))

    def end(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    stack.callback(model.norm.register_forward_hook(begin).remove)
    stack.callback(model.register_forward_hook(end, prepend=True).remove)


def _opened(part: str) -> record_function:
    opened = record_function(PART + part)
    opened.__enter__()
    return opened


def _name_calls(owner: Any, name: str, part: str, stack: contextlib.ExitStack) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + part):
            return function(*args, **kwargs)

    own = name in vars(owner)
    setattr(owner, name, named)
    stack.callback(*((setattr, owner, name, function) if own else (delattr, owner, name)))


def _named_items(items: Iterator[Any], part: str) -> Iterator[Any]:
    while True:
        with record_function(PART + part):
            item = next(items)
        yield item


# From ranges and operations to the table


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
class Account:
    """Milliseconds of one step, the mean of some, by (part, phase). The host's sum up to the step's time."""

    steps: int
    step_ms: float
    host_ms: Counter
    device_ms: Counter
    """of kernels, by what launched them; they run beside the host and each other"""


def spans_of(profiler: torch.profiler.profile) -> list[Span]:
    """All that a finished profiler saw on the host."""
    return [Span(e.name, e.time_range.start, e.time_range.end, e.thread, e.sequence_nr, e.fwd_thread or 0,
                 sum(kernel.duration for kernel in e.kernels))
            for e in profiler.events() if e.device_type == DeviceType.CPU]


def account(spans: Iterable[Span]) -> Account:
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

    for span in sorted((s for s in spans if s.thread in threads), key=lambda s: (s.start, -s.end)):
        advance(span.start)
        if not open_spans and span.name != STEP:
            continue
        end, key = open_spans[-1] if open_spans else (span.end, ("the rest", "other"))
        key = _key(span, key, parts)
        device[key] += span.device / 1000 / len(steps)
        open_spans.append((min(span.end, end), key))
    advance(float("inf"))
    return Account(len(steps), sum(s.end - s.start for s in steps) / 1000 / len(steps), host, device)


def _key(span: Span, outer: tuple[str, str], parts: dict[tuple[int, int], str]) -> tuple[str, str]:
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


def table(a: Account, start: int, end: int, rank: int, before_ms: float) -> str:
    """The account as text.

    Args:
        start, end: iterations start + 1 to end were profiled.
        before_ms: of the last step that was not; 0: none.
    """
    before = f"; the step before took {before_ms:.1f} without" if before_ms else ""
    lines = [f"iterations {start + 1} to {end} on rank {rank}: {a.step_ms:.1f} ms each with the profiler on{before}",
             f"{'ms a step':17s}" + "".join(f"{phase:>10s}" for phase in PHASES) + f"{'all':>10s}{'share':>8s}"]
    gpu = sum(a.device_ms.values())
    lines[1] += f"{'GPU':>10s}" if gpu else ""
    for part in PARTS:
        times = [a.host_ms[part, phase] for phase in PHASES]
        line = f"{part:17s}" + "".join(f"{ms:10.1f}" if ms else " " * 10 for ms in times)
        line += f"{sum(times):10.1f}{sum(times) / a.step_ms:8.1%}"
        lines.append(line + (f"{sum(a.device_ms[part, phase] for phase in PHASES):10.1f}" if gpu else ""))
    totals = [sum(a.host_ms[part, phase] for part in PARTS) for phase in PHASES]
    line = f"{'the step':17s}" + "".join(f"{ms:10.1f}" for ms in totals)
    lines.append(line + f"{sum(totals):10.1f}{sum(totals) / a.step_ms:8.1%}" + (f"{gpu:10.1f}" if gpu else ""))
    lines.append("dispatch: mixture layers without their gates and experts; communication: with waiting for the others")
    return "\n".join(lines)
