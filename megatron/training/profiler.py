"""Where time goes: the stages of a run's start, and the parts of a training step by torch's profiler.

The model's code knows nothing of profiling. While iterations are profiled, hooks and wrappers put named ranges around
its parts; before and after there are none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from megatron.config.schema import ProfilingConfig, require
from megatron.io import atomic_write
from megatron.log import get_logger
from megatron.model.attention import Attention
from megatron.model.gpt import GPT
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups
from megatron.training.profile_report import (
    PART,
    STEP,
    break_down_step,
    profile_table,
    spans_of,
)

if TYPE_CHECKING:
    from megatron.training.trainer import Trainer


class StepProfiler:
    """Profiles iterations start + 1 to end of a run on some ranks; afterwards writes the trace and the table.

    Args:
        folder: where traces and tables are written.
        done: iterations completed when this run starts.
        iterations: number of iterations after which this run ends.
    Raises:
        ValueError: a rank that there is not, or iterations that this run does not reach.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        folder: Path,
        groups: Groups,
        done: int,
        iterations: int,
    ):
        self.start, self.end, self.rank = (
            config.profile_step_start,
            config.profile_step_end,
            groups.rank,
        )
        self.ranks, self.device = config.profile_ranks, groups.device
        require(
            max(self.ranks) < groups.world_size,
            "--profile-ranks",
            list(self.ranks),
            f"0 to {groups.world_size - 1}",
        )
        if done > self.start:  # as of a run that was started again with the same flags
            get_logger().warning(
                "--profile: iteration %d is done already; nothing is profiled", self.start + 1
            )
            self.ranks = ()
        require(
            not self.ranks or self.end <= iterations,
            "--profile-step-end",
            self.end,
            f"at most {iterations}, where this run ends",
            "Set it and --profile-step-start to iterations that it does.",
        )
        self.folder = folder
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
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # or it writes to stderr when it starts and stops
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if self.device.type == "cuda" else []),
        ]
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._attached.callback(self._profiler.stop)
        self._attached.enter_context(named_parts(trainer))

    def _finish(self) -> None:
        """Write what was measured, and say so on the first rank."""
        if self._profiler is not None:
            self._attached.close()
            text = profile_table(
                break_down_step(spans_of(self._profiler)),
                self.start,
                self.end,
                self.rank,
                self._before_ms,
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_trace(self._profiler, self.folder / f"rank{self.rank}.trace.json.gz")
            atomic_write.write_text(self.folder / f"rank{self.rank}.txt", text + "\n")
            get_logger().info("%s", text)
            self._profiler = None
        get_logger().info(
            "profiles of rank(s) %s: %s/rank*.txt, and rank*.trace.json.gz for Perfetto or "
            "chrome://tracing",
            " ".join(map(str, self.ranks)),
            self.folder,
        )


def profile_folder(config: ProfilingConfig, save: str, tensorboard_dir: str) -> Path:
    """Return --profile-dir, or else `profile` in --save, in --tensorboard-dir or in the working directory."""
    if config.profile_dir:
        return Path(config.profile_dir)
    return Path(save or tensorboard_dir) / "profile"


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace under a temporary name, synced and then renamed."""
    temporary = path.with_name(
        f"{path.name}.{os.getpid()}.tmp.gz"
    )  # .gz: the profiler compresses by the name
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
        for owner, name, part in (
            (engine, "backward", "backward"),
            (engine, "step", "optimizer"),
            (dist.Work, "wait", "communication"),
        ):
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
        parts |= {
            m: "experts"
            for m in (*ffn.gate.zero_computation_experts, ffn.shared)
            if m is not None
        }
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
