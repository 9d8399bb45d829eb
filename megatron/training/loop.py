"""The training loop: step, and by name what hangs off it: log, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron.config.schema import TrainConfig
from megatron.data.loader import Batch
from megatron.log import get_logger
from megatron.parallel.groups import Groups, all_reduce_mean
from megatron.training import checkpoint
from megatron.training.checkpoint import Progress
from megatron.training.engine import Engine
from megatron.training.profile import StartUp, StepProfiler
from megatron.training.schedule import Schedule
from megatron.training.sinks import ProgressBar, Sinks


@dataclass
class Plan:
    """Sizes of the run that the loop needs."""

    iterations: int
    global_batch: int
    micro_steps: int
    """micro-batches of one optimizer step on one rank"""
    seq_length: int


class Trainer:
    """Runs the loop.

    Args:
        train_batches: endless micro-batches of this rank, already positioned at `progress`.
        eval_batches: by split name ("valid", "test"), a function that starts that split's micro-batches anew.
        record: what every checkpoint says of the run.
        start_up: told when the first step is done.
        profiler: does the steps; None: nothing is profiled.
    """

    def __init__(self, engine: Engine, train: TrainConfig, plan: Plan, schedule: Schedule, groups: Groups,
                 train_batches: Iterable[Batch], eval_batches: dict[str, Callable[[], Iterable[Batch]]],
                 sinks: Sinks, record: checkpoint.Record, progress: Progress, start_up: StartUp,
                 profiler: StepProfiler | None = None):
        self.engine, self.config, self.plan, self.schedule, self.groups = engine, train, plan, schedule, groups
        self.train_batches, self.eval_batches = iter(train_batches), eval_batches
        self.sinks, self.record, self.progress = sinks, record, progress
        self.start_up, self.profiler = start_up, profiler
        self.started = time.monotonic()
        self._interval = Interval()
        self.bad_steps = 0

    def run(self) -> None:
        """Train from `progress` to the end of the schedule (or the exit interval), then test."""
        every, last = self.config, self.plan.iterations
        if self.progress.iteration == 0:
            self.evaluate("valid")
        self.start_up.mark("evaluation")
        with ProgressBar(total=last, initial=self.progress.iteration) as bar:
            while self.progress.iteration < last:
                if self.profiler is None:
                    self.step()
                else:
                    self.profiler.step(self)
                self.start_up.end("first step")
                i = self.progress.iteration
                bar.update()
                ends = i == last or bool(every.exit_interval and i % every.exit_interval == 0)
                if i % every.log_interval == 0 or ends:
                    self.log()
                if ends or (every.eval_interval and i % every.eval_interval == 0):
                    self.evaluate("valid")
                if every.save and (ends or (every.save_interval and i % every.save_interval == 0)):
                    self.save()
                if ends:
                    break
        if self.progress.iteration >= last:
            self.evaluate("test")

    def step(self) -> None:
        """One optimizer step."""
        p, start = self.progress, time.monotonic()
        lr = self.schedule.lr(p.iteration)
        batches = (next(self.train_batches) for _ in range(self.plan.micro_steps))
        skipped = self.engine.skipped_steps
        lm_loss, aux_loss = self.engine.step(batches, lr, p.consumed_samples / self._total_samples)
        self.bad_steps = self.bad_steps + 1 if self.engine.skipped_steps > skipped else 0
        p.iteration += 1
        p.consumed_samples += self.plan.global_batch
        p.consumed_tokens += self.plan.global_batch * self.plan.seq_length
        self._interval.add(lm_loss, aux_loss, lr, time.monotonic() - start)
        if 0 < self.config.max_bad_steps <= self.bad_steps:
            self.log()
            raise ValueError(f"the gradients of {self.bad_steps} steps in a row, up to iteration {p.iteration}, were "
                             "NaN or infinite and the steps were skipped; allowed: fewer than --max-bad-steps. Lower "
                             "--lr, or resume from an earlier checkpoint")

    @property
    def _total_samples(self) -> int:
        return self.plan.iterations * self.plan.global_batch

    def log(self) -> None:
        """Reduce and write what happened since the last log line."""
        p, interval = self.progress, self._interval
        tokens = interval.steps * self.plan.global_batch * self.plan.seq_length
        seconds = all_reduce_mean(interval.seconds, self.groups)
        record = {
            "kind": "train", "iteration": p.iteration,
            "loss": all_reduce_mean(float(interval.lm_loss) / interval.steps, self.groups),
            "aux_loss": all_reduce_mean(float(interval.aux_loss) / interval.steps, self.groups),
            "lr": interval.lr, "grad_norm": self.engine.grad_norm(), "tokens_per_s": tokens / seconds,
            "step_time_ms": 1000 * seconds / interval.steps, "skipped_steps": self.engine.skipped_steps,
            "consumed_samples": p.consumed_samples, "consumed_tokens": p.consumed_tokens,
            "elapsed_s": time.monotonic() - self.started, **self.engine.metrics.read(training=True),
        }
        self._interval = Interval()
        self.sinks.write(record)

    def evaluate(self, split: str) -> None:
        """Mean loss on a split, always on the same samples; nothing if the run has no such split."""
        if split not in self.eval_batches:
            return
        p = self.progress
        loss = self.engine.evaluate(self.eval_batches[split](), p.consumed_samples / self._total_samples)
        loss = all_reduce_mean(float(loss), self.groups)
        self.sinks.write({
            "kind": {"valid": "eval"}.get(split, split), "iteration": p.iteration, "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)), "consumed_samples": p.consumed_samples,
            "consumed_tokens": p.consumed_tokens, "elapsed_s": time.monotonic() - self.started,
            **self.engine.metrics.read(training=False),
        })

    def save(self) -> None:
        """Write a checkpoint at the current iteration."""
        checkpoint.save(self.config.save, self.engine, self.progress, self.record, self.groups)


class Interval:
    """Sums over the steps since the last log line; losses stay on the device until they are read."""

    def __init__(self):
        self.steps, self.seconds, self.lr = 0, 0.0, 0.0
        self.lm_loss: torch.Tensor | float = 0.0
        self.aux_loss: torch.Tensor | float = 0.0

    def add(self, lm_loss: torch.Tensor, aux_loss: torch.Tensor, lr: float, seconds: float) -> None:
        self.steps, self.seconds, self.lr = self.steps + 1, self.seconds + seconds, lr
        self.lm_loss, self.aux_loss = self.lm_loss + lm_loss, self.aux_loss + aux_loss


def announce(plan: Plan, groups: Groups, precision: str, num_experts: int, progress: Progress) -> None:
    """Say on what this run runs, and why."""
    experts = f"{num_experts // groups.ep_size} of {num_experts} experts" if num_experts else "no experts"
    get_logger().info("%d rank(s) on %s with %s, because %s; %s", groups.world_size, groups.device.type,
                      groups.backend, groups.reason, precision)
    get_logger().info("%s on each rank; %d iterations of %d samples x %d tokens, %d micro-batch(es) per step; "
                      "starting at iteration %d", experts, plan.iterations, plan.global_batch, plan.seq_length,
                      plan.micro_steps, progress.iteration)
