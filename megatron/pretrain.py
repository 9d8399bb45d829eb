"""Pretraining: parse flags, initialize, build the task, train."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron.config import cli
from megatron.config.schema import RunConfig
from megatron.config.training import LENGTH_FIELDS
from megatron.data.sampling.blend import Samples
from megatron.exit_codes import classify_error, exit_code
from megatron.initialize import (
    Run,
    build_engine,
    build_run_model,
    initialize_training,
    restore_training_state,
)
from megatron.log import get_logger
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
from megatron.moe.gate import available_gates, gate_config_class
from megatron.moe.gate_registry import import_gate_files
from megatron.training.metric_writers import require_writer_packages
from megatron.training.plan import TrainingPlan
from megatron.training.startup_timer import StartupTimer
from megatron.training.task import PretrainingTask, Task

if TYPE_CHECKING:
    from megatron.checkpoint.metadata import RunMetadata
    from megatron.checkpoint.saver import Checkpointer
    from megatron.engine.engine import Engine
    from megatron.evaluation.task_suite import TaskSuite
    from megatron.model.flops import ModelFlops
    from megatron.model.gpt import GPT
    from megatron.model.parameter_count import ParameterCount
    from megatron.training.profiler import StepProfiler
    from megatron.training.trainer import LoopServices


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Train as the flags say.

    Args:
        argv: flags; None: those of the process.
        started: when the process started, as `time.time`, so that the start-up line of the log
            counts from there; None: now.

    Returns:
        The exit code; see `megatron.exit_codes`. Codes other than 0 follow one line on stderr
        that says what to change.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: train(parse_flags(arguments), started))


def parse_flags(arguments: Sequence[str]) -> RunConfig:
    """Return the configuration that the flags of a training run describe.

    Raises:
        ValueError: see `megatron.config.cli.parse`.
    """
    return cli.parse(
        arguments,
        gate_config_class,
        available_gates,
        import_gate_files,
        expert_types=KNOWN_EXPERT_TYPES,
        read_hf_config=_read_hf_settings,
    )


def _read_hf_settings(folder: str) -> dict[str, dict[str, Any]]:
    """Read the settings of --init-from-hf; only runs that use it import what reads them."""
    from megatron.interop.hf.initial_weights import read_hf_settings

    return read_hf_settings(folder)


def train(
    config: RunConfig,
    started: float | None = None,
    build_task: Callable[[Run, TrainingPlan], Task] | None = None,
) -> None:
    """Run the training that `config` describes, on the ranks that the launcher started.

    Args:
        started: as in `main`.
        build_task: what is trained; None: next-token prediction on the run's data.

    Raises:
        ValueError: flags, data or checkpoint do not fit each other, or the training failed.
        OSError: a file cannot be read or written.
    """
    timer = StartupTimer(started)
    timer.mark("torch")
    require_writer_packages(config.logging)
    run = initialize_training(config, timer)
    if config.train.skip_train:
        evaluate_only(run, build_task)
        return
    from megatron.training.run_row import describe_run
    from megatron.training.trainer import LoopConfig, Trainer, log_run_summary

    config = run.config
    plan = build_plan(run)
    metadata = build_metadata(run, plan)
    suite = load_evaluation_tasks(run, timer)
    task = (build_task or build_pretraining_task)(run, plan)
    timer.mark("data")
    model = build_run_model(run)
    size, flops = log_model_size(model)
    timer.mark("model")
    engine = build_engine(run, model)
    restore_training_state(run, engine)
    num_experts = config.moe.num_experts
    log_run_summary(plan, run.groups, config.optimizer.precision, num_experts, run.progress)
    sections = LoopConfig(config.train, config.checkpoint, config.fault_tolerance)
    with (
        build_checkpointer(run, engine, metadata) as checkpointer,
        build_services(run, plan, checkpointer, timer, started) as services,
    ):
        timer.mark("engine")
        services = with_task_evaluation(replace(services, flops=flops), run, suite, engine)
        services = with_routing_probe(services, run, engine, task)
        trainer = Trainer(engine, task, plan, run.progress, run.groups, sections, services)
        services.metric_writers.write(
            describe_run(config, run.groups, size, run.progress.iteration, started)
        )
        trainer.run()


def build_metadata(run: Run, plan: TrainingPlan) -> RunMetadata:
    """Describe the run for its checkpoints, and compare it with the one that it starts from.

    Raises:
        ValueError: the checkpoint is of a run that this one cannot continue.
    """
    from megatron.checkpoint.metadata import RunMetadata, describe_data

    metadata = RunMetadata.of(
        run.config,
        run.groups,
        run.tokenizer,
        plan.global_batch,
        plan.iterations,
        plan.built_samples,
        describe_data(run.config, run.groups),
    )
    if run.checkpoint is not None:
        run.checkpoint.check(metadata)
    return metadata


def log_model_size(model: GPT) -> tuple[ParameterCount, ModelFlops]:
    """Log the parameters of a model by part; return them and its FLOPs, before ZeRO shards it."""
    from megatron.model.flops import ModelFlops
    from megatron.model.parameter_count import count_parameters, parameter_table

    size = count_parameters(model)
    get_logger().info("%s", parameter_table(size))
    return size, ModelFlops.of(model)


def build_checkpointer(run: Run, engine: Engine, metadata: RunMetadata) -> Checkpointer:
    """Build what saves the run's checkpoints.

    Raises:
        ValueError: --save names a directory that the run may not write to.
        OSError: it cannot be written.
    """
    from megatron.checkpoint.saver import Checkpointer

    write_origin = None
    if run.hf_folder:
        from megatron.interop.hf import initial_weights

        write_origin = partial(initial_weights.write_origin, run.hf_folder)
    options = run.config.checkpoint
    return Checkpointer(options, engine, metadata, run.groups, run.checkpoint, write_origin)


def load_evaluation_tasks(run: Run, timer: StartupTimer) -> TaskSuite | None:
    """Load the tasks of --eval-tasks on rank 0; None on other ranks and without any.

    Raises:
        ValueError: a task or its data set cannot be loaded; nothing has been trained yet.
    """
    if not run.config.evaluation.eval_tasks:
        return None
    from megatron.evaluation.continuous import load_tasks

    suite = load_tasks(run)
    timer.mark("evaluation tasks")
    return suite


def with_task_evaluation(
    services: LoopServices, run: Run, suite: TaskSuite | None, engine: Engine
) -> LoopServices:
    """Return the services with the evaluation on the tasks of --eval-tasks, if there are any."""
    config = run.config.evaluation
    if not config.eval_tasks:
        return services
    from megatron.evaluation.continuous import TaskEvaluation

    evaluation = TaskEvaluation(config, suite, engine, run, services.metric_writers)
    return replace(services, task_evaluation=evaluation)


def with_routing_probe(
    services: LoopServices, run: Run, engine: Engine, task: Task
) -> LoopServices:
    """Return the services with measurements of routing on a probe batch, if there are any."""
    config = run.config
    samples = config.logging.routing_probe_samples
    if not samples or not config.moe.num_experts:
        return services
    from megatron.analysis.routing_probe import RoutingProbe, probe_batches

    samples_per_batch = config.train.micro_batch_size * run.groups.world_size
    batches = probe_batches(task, math.ceil(samples / samples_per_batch))
    if not batches:
        return services
    interval = config.logging.routing_probe_interval or config.train.eval_interval
    probe = RoutingProbe(interval, engine, task, batches, run.groups, services.metric_writers)
    return replace(services, routing_probe=probe)


def build_plan(run: Run) -> TrainingPlan:
    """Plan the run from its progress on.

    Raises:
        ValueError: see `TrainingPlan.of`.
    """
    built_samples = 0
    if run.checkpoint is not None and run.checkpoint.continued_from:
        built_samples = run.checkpoint.metadata.built_samples
    return TrainingPlan.of(
        run.config.train,
        run.config.model.seq_length,
        run.groups.world_size,
        run.progress,
        built_samples,
    )


def evaluate_only(
    run: Run, build_task: Callable[[Run, TrainingPlan], Task] | None = None
) -> None:
    """Evaluate the checkpoint of --load as --skip-train requests; no checkpoint is written.

    Args:
        build_task: as in `train`.

    Raises:
        ValueError: flags, data or checkpoint do not fit each other, or the run has neither
            validation nor test data.
        OSError: a file cannot be read or written.
    """
    from megatron.checkpoint.metadata import RunMetadata
    from megatron.parallel import rng
    from megatron.training.evaluator import Evaluator
    from megatron.training.metric_writers import build_metric_writers
    from megatron.training.watchdog import Watchdog

    config = run.config
    groups = run.groups
    checkpoint = run.checkpoint
    if checkpoint is not None:
        checkpoint.check(RunMetadata.of(config, groups, run.tokenizer))
    plan = build_evaluation_plan(run)
    task = (build_task or build_pretraining_task)(run, plan)
    check_and_log_splits(run, task.eval_splits())
    engine = build_engine(run, build_run_model(run))
    rng.seed_rank(config.train.seed, groups.rank)
    writers = build_metric_writers(
        config.logging,
        config.checkpoint,
        groups.rank,
        plan.iterations,
        plan.end.tokens,
    )
    with (
        contextlib.closing(writers),
        Watchdog(config.fault_tolerance.timeout_minutes) as watchdog,
    ):
        evaluator = Evaluator(engine, task, watchdog, writers)
        for name in ("valid", "test"):
            evaluator.evaluate(name, run.progress, plan.fraction_done(run.progress))


def build_evaluation_plan(run: Run) -> TrainingPlan:
    """Plan a run that does not train, with the length of the run that wrote the checkpoint.

    Gates that change over time then see the same progress as in that run.

    Raises:
        ValueError: see `TrainingPlan.of`.
    """
    train = run.config.train
    if run.checkpoint is not None:
        saved = run.checkpoint.metadata.config.train
        lengths = {name: getattr(saved, name) for name in LENGTH_FIELDS.values()}
        train = replace(train, **lengths)
    elif train.length is None:
        train = replace(train, train_iters=1)
    seq_length = run.config.model.seq_length
    plan = TrainingPlan.of(train, seq_length, run.groups.world_size, run.progress)
    return replace(plan, built_samples=0)


def check_and_log_splits(run: Run, splits: list[str]) -> None:
    """Log what --skip-train evaluates, and on which splits.

    Raises:
        ValueError: there are none.
    """
    if not splits:
        raise ValueError(
            "--skip-train is set, but there is neither a validation nor a test set. Name one "
            "with --valid-data-path, --valid-sets, --test-data-path or --data-path"
        )
    what = "the initial weights"
    if run.checkpoint is not None:
        what = str(run.checkpoint.path)
    elif run.hf_folder:
        what = run.hf_folder
    get_logger().info(
        "--skip-train: evaluating %s on %s; %d rank(s) on %s, %s, no optimizer",
        what,
        ", ".join(splits),
        run.groups.world_size,
        run.groups.device.type,
        run.config.optimizer.precision,
    )


@contextlib.contextmanager
def build_services(
    run: Run,
    plan: TrainingPlan,
    checkpointer: Checkpointer,
    timer: StartupTimer,
    started: float | None,
) -> Iterator[LoopServices]:
    """Build what the training loop calls around its steps; metric writers are closed at the end."""
    from megatron.training.graceful_stop import GracefulStop
    from megatron.training.lr_schedule import LRSchedule
    from megatron.training.metric_writers import build_metric_writers
    from megatron.training.trainer import LoopServices

    config = run.config
    schedule = LRSchedule(config.optimizer, plan)
    profiler = build_profiler(run, plan)
    writers = build_metric_writers(
        config.logging,
        config.checkpoint,
        run.groups.rank,
        plan.iterations,
        plan.end.tokens,
        iteration_of_interruption(run),
    )
    checkpointer.on_commit = writers.log_checkpoint
    with contextlib.closing(writers):
        yield LoopServices(
            schedule=schedule,
            metric_writers=writers,
            checkpointer=checkpointer,
            stop=GracefulStop(config.fault_tolerance, run.groups, started),
            startup_timer=timer,
            profiler=profiler,
        )


def iteration_of_interruption(run: Run) -> int | None:
    """Return the iteration after which a run repeats steps that it logged before; None: it is new.

    A run continues itself if it loads from its own --save directory. With --load-or-init it
    starts again from 0 when it was interrupted before its first checkpoint.
    """
    options = run.config.checkpoint
    if not options.save or not options.load or options.finetune:
        return None
    directory = Path(options.load).resolve()
    if run.checkpoint is not None:
        directory = run.checkpoint.path.resolve().parent
    if directory != Path(options.save).resolve():
        return None
    return run.progress.iteration


def build_profiler(run: Run, plan: TrainingPlan) -> StepProfiler | None:
    """Build the profiler of --profile; None without it.

    Raises:
        ValueError: a rank or an iteration that the run does not have.
    """
    from megatron.training.profiler import StepProfiler, profile_folder

    config = run.config
    if not config.profiling.profile:
        return None
    done = run.progress.iteration
    last = config.fault_tolerance.last_iteration(done, plan.iterations)
    folder = profile_folder(
        config.profiling, config.checkpoint.save, config.logging.tensorboard_dir
    )
    return StepProfiler(config.profiling, folder, run.groups, done, last)


def build_pretraining_task(run: Run, plan: TrainingPlan) -> PretrainingTask:
    """Open the data of a run, and make next-token prediction on it the task."""
    splits = build_run_splits(run, plan)
    return PretrainingTask(
        run.config.data,
        run.config.train,
        plan,
        run.tokenizer,
        run.vocab_size,
        splits,
        run.groups,
    )


def build_run_splits(run: Run, plan: TrainingPlan) -> dict[str, Samples | None]:
    """Open the data of a run.

    One process of each node builds the sample indices, however long it takes; all ranks then
    find them in the cache. If a cache cannot be written, every rank builds its own in memory.
    """
    from megatron.data.index_builder import all_can_store, build_on_each_node, build_on_ranks
    from megatron.data.splits import build_splits, index_cache_folders
    from megatron.data.streaming.stream import StreamingContext

    groups = run.groups
    config = run.config
    # Names the run among others on this node: producers of streamed text belong to one run.
    run_id = str(os.getpid())
    if groups.world_size > 1:
        run_id = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    eval_samples = config.train.eval_iters * plan.global_batch
    is_local_rank0 = groups.local_rank == 0
    streaming = StreamingContext(config.tokenizer, run_id, starts=is_local_rank0)
    build = partial(
        build_splits,
        config.data,
        seq_length=plan.seq_length,
        train_samples=plan.built_samples,
        valid_samples=eval_samples,
        test_samples=eval_samples,
        seed=config.train.seed,
        tokenizer=run.tokenizer,
        vocab_size=run.vocab_size,
    )
    if groups.world_size == 1:
        return build(streaming=streaming)
    build_own = partial(build, streaming=streaming)
    if not all_can_store(index_cache_folders(config.data), groups):
        if not config.data.streaming_data_path:
            return build_on_ranks(build_own, groups)
        # The producers must have been started before other ranks open their tokens.
        splits = build_on_ranks(build_own, groups, takes_part=is_local_rank0)
        others = build_on_ranks(build_own, groups, takes_part=not is_local_rank0)
        return splits or others
    in_advance = {"streaming": replace(streaming, starts=False), "log_missing": False}
    build_on_each_node(partial(build, **in_advance), groups, classify_error)
    splits = None
    if is_local_rank0:
        splits = build_own()
    if config.data.streaming_data_path:
        dist.barrier()  # the producers must have been started
    if splits is None:
        splits = build_own()
    return splits
