"""Profiling of training steps with torch's profiler, by part of the model.

The model's code knows nothing of profiling: hooks and wrappers put named ranges around
its parts while iterations are profiled. Before and after, nothing is attached.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from megatron.config.fields import require
from megatron.config.schema import ProfilingConfig
from megatron.io import atomic_write
from megatron.log import get_logger, warn_on_rank0
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
    # Importing it imports DeepSpeed, which must wait for `prepare_deepspeed`.
    from megatron.engine.engine import Engine


class StepProfiler:
    """Profiles iterations start + 1 to end on some ranks; writes trace and table.

    Args:
        folder: where traces and tables are written.
        done: iterations that are done when this run starts.
        last: iteration after which this run ends.

    Raises:
        ValueError: a rank does not exist, or this run does not reach the iterations.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        folder: Path,
        groups: Groups,
        done: int,
        last: int,
    ):
        self.start = config.profile_step_start
        self.end = config.profile_step_end
        self.rank = groups.rank
        self.ranks = config.profile_ranks
        self.device = groups.device
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None
        self._attached = contextlib.ExitStack()
        self._unprofiled_ms = 0.0
        require(
            max(self.ranks) < groups.world_size,
            "--profile-ranks",
            list(self.ranks),
            f"0 to {groups.world_size - 1}",
        )
        if done > self.start:
            # A restarted run has the flags of the first start and must not fail on
            # them.
            warn_on_rank0(
                "--profile: iteration %d is done already; nothing is profiled", self.start + 1
            )
            self.ranks = ()
            return
        require(
            self.end <= last,
            "--profile-step-end",
            self.end,
            f"at most {last}, where this run ends",
            "Set it and --profile-step-start to iterations that it does.",
        )

    def step(self, iteration: int, run_step: Callable[[], object], engine: Engine) -> None:
        """Run one training step, with the profiler on if its turn has come.

        Args:
            iteration: 0-based index of the step.
            run_step: does the step, in which it calls `engine.step` once.
        """
        if self.rank not in self.ranks or not self.start <= iteration < self.end:
            start = time.monotonic()
            run_step()
            self._unprofiled_ms = 1000 * (time.monotonic() - start)
        else:
            if iteration == self.start:
                self._begin(engine)
            try:
                with record_function(STEP):
                    run_step()
            except BaseException:
                self._attached.close()
                raise
        if self.ranks and iteration + 1 == self.end:
            self._finish()

    def finish_early(self, iteration: int) -> None:
        """Write the profile of a run that stops before the last iteration to profile.

        Args:
            iteration: number of iterations that are done.
        """
        if self.ranks and self.start < iteration < self.end:
            self.end = iteration
            self._finish()

    def _begin(self, engine: Engine) -> None:
        # 99 silences Kineto, which would write to stderr when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._attached.callback(self._profiler.stop)
        self._attached.enter_context(named_parts(engine))

    def _finish(self) -> None:
        """Stop profiling, write this rank's files, and log the table and the folder."""
        if self._profiler is not None:
            self._attached.close()
            breakdown = break_down_step(spans_of(self._profiler))
            table = profile_table(
                breakdown, self.start, self.end, self.rank, self._unprofiled_ms
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_trace(self._profiler, self.folder / f"rank{self.rank}.trace.json.gz")
            atomic_write.write_text(self.folder / f"rank{self.rank}.txt", table + "\n")
            get_logger().info("%s", table)
            self._profiler = None
        get_logger().info(
            "profiles of rank(s) %s: %s/rank*.txt, and rank*.trace.json.gz for Perfetto or "
            "chrome://tracing",
            " ".join(map(str, self.ranks)),
            self.folder,
        )


def profile_folder(config: ProfilingConfig, save: str, tensorboard_dir: str) -> Path:
    """Return --profile-dir, or `profile` in --save, --tensorboard-dir or here."""
    if config.profile_dir:
        return Path(config.profile_dir)
    return Path(save or tensorboard_dir) / "profile"


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace under a temporary name, sync it and rename it."""
    # The suffix makes the profiler compress the file.
    with atomic_write.atomic_path(path, suffix=".tmp.gz") as temporary:
        profiler.export_chrome_trace(str(temporary))


# Names for the parts of a step


@contextlib.contextmanager
def named_parts(engine: Engine) -> Iterator[None]:
    """Put a named range around every part of `engine.step` while active."""
    model = engine.model
    with contextlib.ExitStack() as stack:
        for module, part in module_parts(model).items():
            name_forward(module, part, stack)
        name_output(model, model.norm, stack)
        _name_calls(engine.deepspeed, "backward", "backward", stack)
        _name_calls(engine.deepspeed, "step", "optimizer", stack)
        _name_calls(dist.Work, "wait", "communication", stack)
        _name_batches(engine, stack)
        yield


def module_parts(model: GPT) -> dict[nn.Module, str]:
    """Map modules to the part that their forward pass belongs to.

    A module's part does not include the modules inside it that have a part of their
    own.
    """
    parts: dict[nn.Module, str] = {model: "forward"}
    for block in model.layers:
        parts |= {m: "attention" for m in block.modules() if isinstance(m, Attention)}
        ffn = block.mlp
        if not isinstance(ffn, MoELayer):
            parts[ffn] = "dense FFN"
            continue
        parts |= {ffn: "dispatch", ffn.gate: "gate", ffn.experts: "experts"}
        parts |= dict.fromkeys(ffn.latent_projections, "experts")
        parts |= dict.fromkeys(ffn.gate.zero_computation_experts, "experts")
        if ffn.shared is not None:
            parts[ffn.shared] = "experts"
    return parts


class _Range:
    """A range that hooks open and close; it may be open several times, nested."""

    def __init__(self, part: str):
        self._name = PART + part
        self._open: list[record_function] = []

    def open(self, *_: Any) -> None:
        opened = record_function(self._name)
        opened.__enter__()
        self._open.append(opened)

    def close(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def name_forward(module: nn.Module, part: str, stack: contextlib.ExitStack) -> None:
    """Run a module's forward pass in a range, until `stack` is closed."""
    named = _Range(part)
    stack.callback(module.register_forward_pre_hook(named.open).remove)
    # always_call: recomputation in the backward pass ends with an exception as soon as
    # it has the tensors that it needs.
    stack.callback(module.register_forward_hook(named.close, always_call=True).remove)


def name_output(model: nn.Module, final_norm: nn.Module, stack: contextlib.ExitStack) -> None:
    """Run what follows the model's final norm in a range, until `stack` is closed.

    The output layer has no hook of its own, because it may be the embedding, and the
    loss is not a module.
    """
    named = _Range("output and loss")
    stack.callback(final_norm.register_forward_hook(named.open).remove)
    stack.callback(model.register_forward_hook(named.close, prepend=True).remove)


def _name_calls(owner: Any, name: str, part: str, stack: contextlib.ExitStack) -> None:
    """Run every call of a method in a range, until `stack` is closed."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + part):
            return function(*args, **kwargs)

    _replace(owner, name, named, stack)


def _name_batches(engine: Engine, stack: contextlib.ExitStack) -> None:
    """Put a range around the reading of each batch of `engine.step`."""
    step = engine.step

    @functools.wraps(step)
    def named(batches: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return step(_named_items(batches, "data"), *args, **kwargs)

    _replace(engine, "step", named, stack)


def _named_items(items: Iterable[Any], part: str) -> Iterator[Any]:
    iterator = iter(items)
    end = object()
    while True:
        with record_function(PART + part):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def _replace(owner: Any, name: str, function: Any, stack: contextlib.ExitStack) -> None:
    """Set an attribute until `stack` is closed."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, getattr(owner, name))
    else:
        stack.callback(delattr, owner, name)  # uncovers the class's attribute
    setattr(owner, name, function)
