"""The training loop: step, and by name what hangs off it: log, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from megatron.checkpoint.metadata import TrainingProgress
from megatron.checkpoint.saver import Checkpointer
from megatron.config.schema import CheckpointConfig, FaultToleranceConfig, TrainConfig
from megatron.data.loader import Batch
from megatron.engine.engine import Engine
from megatron.log import get_logger
from megatron.parallel.groups import Groups, all_reduce_mean
from megatron.training.graceful_stop import GracefulStop, StepConsensus
from megatron.training.loss_spikes import Spike, SpikeDetector
from megatron.training.lr_schedule import LRSchedule
from megatron.training.metric_writers import MetricsWriters, ProgressBar
from megatron.training.profiler import StepProfiler
from megatron.training.startup_timer import StartupTimer
from megatron.training.watchdog import Watchdog


@dataclass
class TrainingPlan:
    """Sizes of the run that the loop needs."""

    iterations: int
    global_batch: int
    micro_steps: int
    """micro-batches of one optimizer step on one rank"""
    seq_length: int

    @staticmethod
    def of(
        train: TrainConfig, seq_length: int, world_size: int, done: TrainingProgress
    ) -> TrainingPlan:
        """The plan of a run that has done so much already, perhaps with another global batch.

        Raises:
            ValueError: the global batch is not a multiple of micro-batch x ranks, or nothing says how long to train.
        """
        batch = train.global_batch(world_size)
        left = train.train_tokens - done.consumed_tokens
        iterations = (
            done.iteration + max(0, -(-left // (batch * seq_length)))
            if train.train_tokens
            else train.iterations(seq_length, world_size)
        )
        return TrainingPlan(
            iterations, batch, batch // (train.micro_batch_size * world_size), seq_length
        )

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.global_batch * self.seq_length


class Trainer:
    """Runs the loop.

    Args:
        train_batches: endless micro-batches of this rank, already positioned at `progress`.
        eval_batches: by split name ("valid", "test"), a function that starts that split's micro-batches anew.
        checkpoints: where `progress` and the engine's state are saved.
        start_up: told when the first step is done.
        stop: says after each step whether the run ends there.
        profiler: does the steps; None: nothing is profiled.
    """

    def __init__(
        self,
        engine: Engine,
        train: TrainConfig,
        checkpoint: CheckpointConfig,
        fault_tolerance: FaultToleranceConfig,
        plan: TrainingPlan,
        schedule: LRSchedule,
        groups: Groups,
        train_batches: Iterable[Batch],
        eval_batches: dict[str, Callable[[], Iterable[Batch]]],
        sinks: MetricsWriters,
        checkpoints: Checkpointer,
        progress: TrainingProgress,
        start_up: StartupTimer,
        stop: GracefulStop,
        profiler: StepProfiler | None = None,
    ):
        self.engine, self.config, self.plan, self.schedule, self.groups = (
            engine,
            train,
            plan,
            schedule,
            groups,
        )
        self.train_batches, self.eval_batches = iter(train_batches), eval_batches
        self.sinks, self.checkpoints, self.progress = sinks, checkpoints, progress
        self.start_up, self.stop, self.profiler = start_up, stop, profiler
        self.checkpoint_config = checkpoint
        self.fault_tolerance = fault_tolerance
        self.watchdog = Watchdog(fault_tolerance.timeout_minutes)
        self.spikes = SpikeDetector(
            fault_tolerance.loss_spike_threshold, fault_tolerance.loss_spike_window
        )
        self.started = time.monotonic()
        self._interval = LogWindow()
        self.bad_steps = 0
        """in a row, up to now"""
        self._good_steps = 0
        self._reason = ""
        """why the run ends before its schedule: what was agreed on after the last step"""

    def run(self) -> None:
        """Train from `progress` to the end of the schedule, then test; or up to what ends the run before.

        An exit interval ends it as its schedule does, but without a test. A signal or the end of the run's time do so
        in a hurry: a checkpoint, no evaluation.
        """
        with self.stop, self.watchdog:
            self._run()

    def _run(self) -> None:
        every, last = self.config, self.plan.iterations
        save_interval = self.checkpoint_config.save_interval
        exit_interval = self.fault_tolerance.exit_interval
        if self.progress.iteration == 0:
            self.evaluate("valid")
        self.start_up.mark("evaluation")
        due = False
        with ProgressBar(total=last, initial=self.progress.iteration) as bar:
            while self.progress.iteration < last:
                if self.profiler is None:
                    self.step()
                else:
                    self.profiler.step(self)
                self.start_up.end("first step")
                i = self.progress.iteration
                bar.update()
                self.checkpoints.poll()
                hurry, due = (
                    bool(self._reason),
                    due or bool(save_interval and i % save_interval == 0),
                )
                if not hurry and i < last and exit_interval and i % exit_interval == 0:
                    self._reason = f"--exit-interval {exit_interval}"
                ends = i == last or bool(self._reason)
                if i % every.log_interval == 0 or ends:
                    self.log()
                if self._reason:
                    get_logger().info(
                        "this run ends at iteration %d of %d: %s", i, last, self._reason
                    )
                if not hurry and (
                    ends or (every.eval_interval and i % every.eval_interval == 0)
                ):
                    self.evaluate("valid")
                if (
                    self.checkpoint_config.save
                    and (ends or due)
                    and self._is_worth_saving(ends)
                ):
                    self.checkpoints.save(self.progress, last=ends)
                    due = False
                if ends:
                    break
        if self.progress.iteration >= last and not self._reason:
            self.evaluate("test")
        self.checkpoints.finish()

    def step(self) -> None:
        """One optimizer step, and what all ranks make of it.

        Raises:
            ValueError: too many steps in a row were skipped, or the loss is a spike and is to end the run.
        """
        p, start = self.progress, time.monotonic()
        lr = self.schedule.lr(p.iteration)
        batches = self.watchdog.reading(
            islice(self.train_batches, self.plan.micro_steps),
            f"a batch of iteration {p.iteration + 1}",
        )
        skipped = self.engine.skipped_steps
        losses = self.engine.step(batches, lr, p.consumed_samples / self._total_samples)
        agreed = self.stop.agree(*losses)
        self._reason = agreed.reason
        p.iteration += 1
        p.consumed_samples += self.plan.global_batch
        p.consumed_tokens += self.plan.tokens
        bad = self.engine.skipped_steps > skipped
        self._interval.add(agreed, lr, time.monotonic() - start, bad)
        if bad:
            self._on_skipped_step(agreed)
        else:
            self.bad_steps, self._good_steps = 0, self._good_steps + 1
            if spike := self.spikes.see(agreed.lm_loss):
                self._on_loss_spike(agreed.lm_loss, spike)

    def _on_skipped_step(self, agreed: StepConsensus) -> None:
        """A step was skipped: weights, moments and gates are as before it; iteration and schedule went on."""
        p, most, bad_ranks = self.progress, self.fault_tolerance.max_bad_steps, agreed.bad_ranks
        self.bad_steps += 1
        what = (
            f"the loss on {bad_ranks} of {self.groups.world_size} rank(s)"
            if bad_ranks
            else "a gradient"
        )
        self._warn(
            f"iteration {p.iteration}: {what} was NaN or infinite, so the step is skipped: {self.bad_steps} "
            f"in a row (samples {p.consumed_samples - self.plan.global_batch} to {p.consumed_samples - 1})"
        )
        if 0 < most <= self.bad_steps:
            self._abort(
                f"the gradients of {self.bad_steps} steps in a row, up to iteration {p.iteration}, were NaN "
                f"or infinite and the steps were skipped; allowed: fewer than --max-bad-steps {most}. Lower "
                "--lr, or look at the data"
            )

    def _on_loss_spike(self, loss: float, spike: Spike) -> None:
        """Count and log a spike; raise if it ends the run. Of several in a row the first and the last are logged."""
        self._interval.loss_spikes += 1
        what = (
            f"the loss of iteration {self.progress.iteration} is {loss:.5f}, {spike.z:.1f} deviations of "
            f"{spike.deviation:.3g} above {spike.mean:.5f}, the mean of the steps before"
        )
        if self.fault_tolerance.loss_spike_action == "stop":
            self._abort(
                f"{what}; allowed: --loss-spike-threshold {self.fault_tolerance.loss_spike_threshold:g}. Its batch "
                "may be bad, or --lr too high; --loss-spike-action log goes on"
            )
        if spike.level_shift:
            self._warn(
                f"{what}, like {spike.row - 1} before it: that is a new level, and no spike from now on"
            )
        elif spike.row == 1:
            self._warn(what)

    def _abort(self, why: str) -> NoReturn:
        """End the run, as all ranks have decided alike. A checkpoint that is still being written is completed first."""
        self.log()
        failed = ""
        try:
            self.checkpoints.finish()
        except OSError as error:
            failed = f"; {error}"
        raise ValueError(f"{why}; {self.checkpoints.last_saved_message()}{failed}")

    def _is_worth_saving(self, ends: bool) -> bool:
        """Not while steps are being skipped, for the weights may be why; but at the end, if any step was good."""
        if not self.bad_steps:
            return True
        if ends and not self._good_steps:
            self._warn(
                "no checkpoint is saved, because every step of this run was skipped; "
                f"{self.checkpoints.last_saved_message()}"
            )
        return ends and self._good_steps > 0

    def _warn(self, message: str) -> None:
        """Of what all ranks know: said once."""
        if self.groups.is_rank0:
            get_logger().warning("%s", message)

    @property
    def _total_samples(self) -> int:
        return self.plan.iterations * self.plan.global_batch

    def log(self) -> None:
        """Reduce and write what happened since the last log line."""
        p, interval = self.progress, self._interval
        tokens = interval.steps * self.plan.tokens
        seconds = all_reduce_mean(interval.seconds, self.groups)
        record = {
            "kind": "train",
            "iteration": p.iteration,
            "loss": interval.mean(0),
            "aux_loss": interval.mean(1),
            "lr": interval.lr,
            "grad_norm": self.engine.grad_norm(),
            "tokens_per_s": tokens / seconds,
            "step_time_ms": 1000 * seconds / interval.steps,
            "skipped_steps": self.engine.skipped_steps,
            "bad_steps": interval.bad_steps,
            "loss_spikes": interval.loss_spikes,
            "consumed_samples": p.consumed_samples,
            "consumed_tokens": p.consumed_tokens,
            "elapsed_s": time.monotonic() - self.started,
            **self.engine.metrics.read(training=True),
        }
        self._interval = LogWindow()
        self.sinks.write(record)

    def evaluate(self, split: str) -> None:
        """Mean loss on a split, always on the same samples; nothing if the run has no such split."""
        if split not in self.eval_batches:
            return
        p = self.progress
        batches = self.watchdog.reading(
            self.eval_batches[split](), f"a batch of split {split!r}"
        )
        loss = self.engine.evaluate(batches, p.consumed_samples / self._total_samples)
        loss = all_reduce_mean(float(loss), self.groups)
        self.sinks.write(
            {
                "kind": {"valid": "eval"}.get(split, split),
                "iteration": p.iteration,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "consumed_samples": p.consumed_samples,
                "consumed_tokens": p.consumed_tokens,
                "elapsed_s": time.monotonic() - self.started,
                **self.engine.metrics.read(training=False),
            }
        )


class LogWindow:
    """What happened since the last log line. Losses are means over the steps that were not skipped; if all were, over
    those, so that a NaN is seen."""

    def __init__(self):
        self.steps, self.bad_steps, self.loss_spikes = 0, 0, 0
        self.seconds, self.lr = 0.0, 0.0
        self._sums = {bad: [0.0, 0.0] for bad in (False, True)}

    def add(self, agreed: StepConsensus, lr: float, seconds: float, bad: bool) -> None:
        self.steps, self.bad_steps = self.steps + 1, self.bad_steps + bad
        self.seconds, self.lr = self.seconds + seconds, lr
        for i, loss in enumerate((agreed.lm_loss, agreed.aux_loss)):
            self._sums[bad][i] += loss

    def mean(self, i: int) -> float:
        """Mean language-model (0) or auxiliary (1) loss."""
        good = self.steps - self.bad_steps
        return self._sums[not good][i] / (good or self.bad_steps)


def log_run_summary(
    plan: TrainingPlan,
    groups: Groups,
    precision: str,
    num_experts: int,
    progress: TrainingProgress,
) -> None:
    """Say on what this run runs, and why."""
    experts = (
        f"{num_experts // groups.ep_size} of {num_experts} experts"
        if num_experts
        else "no experts"
    )
    get_logger().info(
        "%d rank(s) on %s with %s, because %s; %s",
        groups.world_size,
        groups.device.type,
        groups.backend,
        groups.reason,
        precision,
    )
    get_logger().info(
        "%s on each rank; %d iterations of %d samples x %d tokens, %d micro-batch(es) per step; "
        "starting at iteration %d",
        experts,
        plan.iterations,
        plan.global_batch,
        plan.seq_length,
        plan.micro_steps,
        progress.iteration,
    )
