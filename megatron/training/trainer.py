"""Training loop: optimizer steps with periodic logging, evaluation and checkpointing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn, Protocol

from megatron.checkpoint.metadata import Position, TrainingProgress
from megatron.checkpoint.saver import Checkpointer
from megatron.config.fields import flag_name
from megatron.config.schema import CheckpointConfig, FaultToleranceConfig, TrainConfig
from megatron.engine.engine import Engine
from megatron.log import get_logger, warn_on_rank0
from megatron.model.flops import ModelFlops
from megatron.parallel.groups import Groups, all_reduce_mean
from megatron.training.evaluator import Evaluator
from megatron.training.graceful_stop import GracefulStop, StepConsensus
from megatron.training.log_window import LogWindow
from megatron.training.loss_spikes import Spike, SpikeDetector
from megatron.training.lr_schedule import LRSchedule
from megatron.training.metric_writers import MetricsWriters
from megatron.training.persistent_loads import PersistentLoads
from megatron.training.plan import TrainingPlan
from megatron.training.profiler import StepProfiler
from megatron.training.progress_bar import ProgressBar
from megatron.training.startup_timer import StartupTimer
from megatron.training.task import AUX_LOSS, LM_LOSS, Task
from megatron.training.watchdog import Watchdog


@dataclass(frozen=True)
class LoopConfig:
    """The sections of the configuration that the training loop reads."""

    train: TrainConfig
    checkpoint: CheckpointConfig
    fault_tolerance: FaultToleranceConfig


class PeriodicEvaluation(Protocol):
    """An evaluation of the model that the training loop starts between steps on all ranks."""

    interval: int
    """optimizer steps between evaluations; 0: only at the start and the end of the run"""

    def evaluate(self, progress: TrainingProgress, fraction_done: float) -> None: ...


class RoutingProbeService(Protocol):
    """Measurements of routing between steps on all ranks; `megatron.analysis.routing_probe`."""

    interval: int
    """optimizer steps between probes; 0: only at the start and the end of the run"""

    def start(self, progress: TrainingProgress, fraction_done: float) -> None: ...

    def evaluate(self, progress: TrainingProgress, fraction_done: float) -> None: ...

    def checkpoint_saved(self, progress: TrainingProgress, fraction_done: float) -> None: ...


@dataclass(frozen=True)
class LoopServices:
    """What the training loop calls around its steps."""

    schedule: LRSchedule
    metric_writers: MetricsWriters
    checkpointer: Checkpointer
    stop: GracefulStop
    startup_timer: StartupTimer
    profiler: StepProfiler | None = None
    task_evaluation: PeriodicEvaluation | None = None
    routing_probe: RoutingProbeService | None = None
    flops: ModelFlops | None = None
    """of the model, for the metrics of training rows; None: they are left out"""


class Trainer:
    """Runs the training loop.

    Args:
        engine: executes the steps.
        task: gives micro-batches and loss terms.
        plan: sizes of the run.
        progress: how far the run is; updated after every step.
        groups: the data-parallel ranks.
        config: the sections of the configuration that the loop reads.
        services: logging, checkpointing and what else happens around the steps.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        plan: TrainingPlan,
        progress: TrainingProgress,
        groups: Groups,
        config: LoopConfig,
        services: LoopServices,
    ):
        self.engine = engine
        self.task = task
        self.plan = plan
        self.progress = progress
        self.groups = groups
        self.config = config
        self.services = services
        self.checkpointer = services.checkpointer
        self.train_batches: Iterator[Any] = iter(task.train_batches(progress.consumed_samples))
        faults = config.fault_tolerance
        self.watchdog = Watchdog(faults.timeout_minutes)
        self.spikes = SpikeDetector(faults.loss_spike_threshold, faults.loss_spike_window)
        self.evaluator = Evaluator(engine, task, self.watchdog, services.metric_writers)
        self.start_time = self.evaluator.start_time
        self._window = LogWindow()
        self._persistent_loads = PersistentLoads()
        self._consecutive_bad_steps = 0
        """consecutive skipped steps, including the last one"""
        self._good_steps = 0
        """steps of this run that were not skipped"""
        self._stop_reason = ""
        """why the run ends before its schedule; all ranks have the same"""
        self._save_due = False
        self._step: Position | None = None
        """size of the last step of this run"""

    def run(self) -> None:
        """Train from `progress` to the end of the schedule, then evaluate on the test set.

        An exit interval ends the run as its schedule does, but without the test. A signal or
        the end of the run's time ends it with a checkpoint and without any evaluation.

        Raises:
            ValueError: see `step`.
            OSError: a checkpoint cannot be written.
        """
        with self.services.stop, self.watchdog:
            self._train()
            if not self._stop_reason:
                self.evaluate("test")
            self.checkpointer.finish()
            if self.services.profiler is not None:
                self.services.profiler.finish_early(self.progress.iteration)

    def _train(self) -> None:
        """Run steps until the schedule ends or all ranks agree to stop."""
        last = self.plan.iterations
        if self.progress.iteration == 0:
            self.evaluate("valid")
            self._evaluate_tasks()
        if self.services.routing_probe is not None:
            self.services.routing_probe.start(self.progress, self._fraction_done())
        self.services.startup_timer.mark("evaluation")
        length = self.plan.length
        done = self.plan.amount_done(self.progress)
        with ProgressBar(length.total, done, length.unit) as bar:
            while self.progress.iteration < last and not self._stop_reason:
                if self.services.profiler is None:
                    self.step()
                else:
                    self.services.profiler.step(self.progress.iteration, self.step, self.engine)
                self.services.startup_timer.end("first step")
                bar.move_to(self.plan.amount_done(self.progress))
                self.checkpointer.poll()
                self._after_step()

    def step(self) -> None:
        """Run one optimizer step and react to its outcome, which all ranks agree on.

        Raises:
            ValueError: --max-bad-steps consecutive steps were skipped, the loss is a spike and
                --loss-spike-action is stop, or the task gave too few micro-batches.
        """
        start = time.monotonic()
        progress = self.progress
        step = self._start_step()
        lr = self.services.schedule.lr(progress.position, step)
        batches = self.watchdog.reading(
            islice(self.train_batches, self.plan.micro_steps_after(progress)),
            f"a batch of iteration {progress.iteration + 1}",
        )
        skipped_before = self.engine.skipped_steps
        progress_share = self.plan.fraction_done(progress)
        logged = self._is_log_due(progress.iteration + 1)
        losses = self.engine.step(batches, self.task, lr, progress_share, logged)
        consensus = self.services.stop.all_reduce_step_status(losses[LM_LOSS], losses[AUX_LOSS])
        self._stop_reason = consensus.stop_reason
        progress.add_step(step)
        skipped = self.engine.skipped_steps > skipped_before
        self._window.add(consensus, step, lr, time.monotonic() - start, skipped)
        if skipped:
            self._on_skipped_step(consensus, step)
            return
        self._consecutive_bad_steps = 0
        self._good_steps += 1
        spike = self.spikes.update(consensus.lm_loss)
        if spike is not None:
            self._on_loss_spike(consensus.lm_loss, spike)

    def _start_step(self) -> Position:
        """Give the engine the global batch of the step that follows. Returns the step's size."""
        step = self.plan.step_after(self.progress)
        self.engine.set_global_batch(step.samples)
        if self._step is not None and self._step != step:
            get_logger().info(
                "the global batch is %d samples in %d micro-batch(es) from iteration %d on",
                step.samples,
                self.plan.micro_steps_after(self.progress),
                self.progress.iteration + 1,
            )
        self._step = step
        return step

    def _after_step(self) -> None:
        """Log, evaluate and save as the intervals say, or because the run ends here."""
        train = self.config.train
        iteration = self.progress.iteration
        completed = iteration == self.plan.iterations
        stop_requested = bool(self._stop_reason)
        exit_interval = self.config.fault_tolerance.exit_interval
        may_exit = not completed and not stop_requested
        if may_exit and _is_multiple(iteration, exit_interval):
            self._stop_reason = f"--exit-interval {exit_interval}"
        ends = completed or bool(self._stop_reason)
        if ends or self._is_log_due(iteration):
            self.log()
        if self._stop_reason:
            get_logger().info(
                "this run ends at iteration %d of %d: %s",
                iteration,
                self.plan.iterations,
                self._stop_reason,
            )
        if not stop_requested and (ends or _is_multiple(iteration, train.eval_interval)):
            self.evaluate("valid")
        if not stop_requested:
            self._probe_routing_if_due(ends)
        self._save_if_due(ends)
        if not stop_requested:  # else there is no time
            self._evaluate_tasks_if_due(completed)

    def _is_log_due(self, iteration: int) -> bool:
        """Whether the schedule and the intervals end an iteration with a log line.

        A signal, the end of the run's time and an error add others, which no step knows of
        when it begins.
        """
        exit_interval = self.config.fault_tolerance.exit_interval
        return (
            iteration == self.plan.iterations
            or _is_multiple(iteration, exit_interval)
            or _is_multiple(iteration, self.config.train.log_interval)
        )

    def _probe_routing_if_due(self, ends: bool) -> None:
        """Measure the routing of the probe batch at its interval and at the end of the run."""
        probe = self.services.routing_probe
        if probe is None:
            return
        if ends or _is_multiple(self.progress.iteration, probe.interval):
            probe.evaluate(self.progress, self._fraction_done())

    def _evaluate_tasks_if_due(self, completed: bool) -> None:
        """Evaluate on tasks at their interval and at the end of the schedule."""
        tasks = self.services.task_evaluation
        if tasks is None:
            return
        if completed or _is_multiple(self.progress.iteration, tasks.interval):
            self._evaluate_tasks()

    def _evaluate_tasks(self) -> None:
        if self.services.task_evaluation is not None:
            self.services.task_evaluation.evaluate(self.progress, self._fraction_done())

    def _save_if_due(self, ends: bool) -> None:
        """Save at the save interval and at the end of the run.

        No checkpoint is saved while steps are being skipped, because the weights may be the
        cause. A checkpoint that was due then is saved after the next good step. At the end of
        the run one is saved if any of its steps was good.
        """
        checkpoint = self.config.checkpoint
        if not checkpoint.save:
            return
        if _is_multiple(self.progress.iteration, checkpoint.save_interval):
            self._save_due = True
        if self._consecutive_bad_steps and not ends:
            return
        if self._consecutive_bad_steps and not self._good_steps:
            warn_on_rank0(
                "no checkpoint is saved, because every step of this run was skipped; "
                f"{self.checkpointer.last_saved_message()}"
            )
            return
        if ends or self._save_due:
            self.checkpointer.save(self.progress, last=ends)
            self._save_due = False
            probe = self.services.routing_probe
            if probe is not None and not ends:
                probe.checkpoint_saved(self.progress, self._fraction_done())

    def _on_skipped_step(self, consensus: StepConsensus, step: Position) -> None:
        """Count and log a skipped step; raise if there were too many in a row.

        Weights, moments and gates are as before the step; iteration and schedule advanced.
        """
        progress = self.progress
        allowed = self.config.fault_tolerance.max_bad_steps
        self._consecutive_bad_steps += 1
        if consensus.bad_ranks:
            what = f"the loss on {consensus.bad_ranks} of {self.groups.world_size} rank(s)"
        else:
            what = "a gradient"
        first_sample = progress.consumed_samples - step.samples
        warn_on_rank0(
            f"iteration {progress.iteration}: {what} was NaN or infinite, so the step is "
            f"skipped ({self._consecutive_bad_steps} consecutive; samples {first_sample} to "
            f"{progress.consumed_samples - 1})"
        )
        if 0 < allowed <= self._consecutive_bad_steps:
            self._abort(
                f"{self._consecutive_bad_steps} consecutive steps up to iteration "
                f"{progress.iteration} had NaN or infinite gradients and were skipped; allowed: "
                f"fewer than --max-bad-steps {allowed}. Lower --lr, or inspect the data"
            )

    def _on_loss_spike(self, loss: float, spike: Spike) -> None:
        """Count a loss spike; log the first and the last of a row, or end the run."""
        self._window.loss_spikes += 1
        faults = self.config.fault_tolerance
        what = (
            f"the loss of iteration {self.progress.iteration} is {loss:.5f}, "
            f"{spike.z:.1f} standard deviations of {spike.deviation:.3g} above "
            f"{spike.mean:.5f}, the mean of the previous steps"
        )
        if faults.loss_spike_action == "stop":
            self._abort(
                f"{what}; allowed: --loss-spike-threshold {faults.loss_spike_threshold:g}. "
                "Its batch may be bad, or --lr too high; --loss-spike-action log continues"
            )
        if spike.level_shift:
            warn_on_rank0(
                f"{what}, like {spike.consecutive - 1} before it: this is a new level of the loss, "
                "and no spike from now on"
            )
        elif spike.consecutive == 1:
            warn_on_rank0(what)

    def _abort(self, reason: str) -> NoReturn:
        """End the run with an error that all ranks raise.

        A checkpoint that is still being written is completed first.
        """
        self.log()
        save_error = ""
        try:
            self.checkpointer.finish()
        except OSError as error:
            save_error = f"; {error}"
        raise ValueError(f"{reason}; {self.checkpointer.last_saved_message()}{save_error}")

    def _elapsed(self) -> float:
        return time.monotonic() - self.start_time

    def log(self) -> None:
        """Reduce and write the metrics of the steps since the last log line."""
        window = self._window
        seconds = all_reduce_mean(window.seconds, self.groups)
        row = {
            "kind": "train",
            "iteration": self.progress.iteration,
            "loss": window.mean_lm_loss(),
            "aux_loss": window.mean_aux_loss(),
            "lr": window.lr,
            "global_batch_size": window.global_batch_size,
            "grad_norm": self.engine.grad_norm(),
            "tokens_per_s": window.tokens / seconds,
            "step_time_ms": 1000 * seconds / window.steps,
            "skipped_steps": self.engine.skipped_steps,
            "bad_steps": window.bad_steps,
            "loss_spikes": window.loss_spikes,
            "consumed_samples": self.progress.consumed_samples,
            "consumed_tokens": self.progress.consumed_tokens,
            "elapsed_s": self._elapsed(),
        }
        if row["grad_norm"] is None:  # zero_optimization.compute_grad_norm is false
            del row["grad_norm"]
        row |= self.engine.part_grad_norms()
        row |= self.engine.metrics.read(training=True)
        for message in self._persistent_loads.update(row):
            get_logger().info("%s", message)
        if self.services.flops is not None:
            tokens_per_s = row["tokens_per_s"] / self.groups.world_size
            row |= self.services.flops.training_metrics(row, tokens_per_s)
        self._window = LogWindow()
        self.services.metric_writers.write(row)

    def evaluate(self, name: str) -> None:
        """Log the mean losses on the validation sets ("valid") or the test set ("test")."""
        self.evaluator.evaluate(name, self.progress, self._fraction_done())

    def _fraction_done(self) -> float:
        return self.plan.fraction_done(self.progress)


def _is_multiple(iteration: int, interval: int) -> bool:
    """Whether an iteration ends an interval; an interval of 0 never ends."""
    return interval > 0 and iteration % interval == 0


def log_run_summary(
    plan: TrainingPlan,
    groups: Groups,
    precision: str,
    num_experts: int,
    progress: TrainingProgress,
) -> None:
    """Log what the run runs on and why, and its sizes."""
    experts = "no experts"
    if num_experts:
        experts = f"{num_experts // groups.ep_size} of {num_experts} experts"
    get_logger().info(
        "%d rank(s) on %s with %s, because %s; %s",
        groups.world_size,
        groups.device.type,
        groups.backend,
        groups.reason,
        precision,
    )
    first = plan.batches.at(0)
    samples = f"{plan.global_batch}"
    micro_steps = f"{plan.micro_steps}"
    if first < plan.global_batch:
        samples = f"{first} to {plan.global_batch}"
        micro_steps = f"{first // plan.micro_step_size} to {plan.micro_steps}"
    get_logger().info(
        "%s on each rank; %d iterations of %s samples x %d tokens, %s micro-batch(es) per step; "
        "starting at iteration %d",
        experts,
        plan.iterations,
        samples,
        plan.seq_length,
        micro_steps,
        progress.iteration,
    )
    if progress.iteration >= plan.iterations:
        warn_on_rank0(
            "%s %d is reached at iteration %d: there is nothing left to train. To train on, "
            "set a larger number",
            flag_name(plan.length.field),
            plan.length.total,
            progress.iteration,
        )
