"""Wiring of a training run: parse -> groups -> tokenizer -> data -> model -> engine -> loop. No logic of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from itertools import islice

import torch.distributed as dist

from megatron import log
from megatron.config import cli
from megatron.config.schema import RunConfig, require
from megatron.exit_codes import exit_code
from megatron.moe.gate import available_gates, gate_config_class


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Train as the flags say.

    Returns:
        the exit code: 0, also when a signal asked the run to stop; after one clear line 2 for a mistake in what was set
        or a fault of the machine, 1 when another rank ended first, 3 when a rank waited for longer than
        --timeout-minutes, 130 when interrupted before the training began.

    Args:
        started: when the process did, as `time.time`, for the log's line on what start-up took; None: now.
    """
    return exit_code(
        lambda: train(
            cli.parse(
                sys.argv[1:] if argv is None else argv, gate_config_class, available_gates
            ),
            started,
        )
    )


def train(config: RunConfig, started: float | None = None) -> None:
    """Run the whole training that `config` describes, on the ranks the launcher started; `started` as in `main`."""
    from megatron.engine import distributed as parallel
    from megatron.model.builder import build_model, size_table
    from megatron.parallel import rng
    from megatron.tokenizer.build import build_tokenizer
    from megatron.training.startup_timer import StartupTimer

    start_up = StartupTimer(started)
    start_up.mark("torch")
    tokenizer = build_tokenizer(config.tokenizer)
    start_up.mark("tokenizer")
    groups = parallel.init_distributed(
        config.moe.moe_expert_parallel_size, config.fault_tolerance.timeout_minutes
    )
    from megatron.checkpoint import (
        loader,
    )  # imports DeepSpeed: only after `groups` prepared its environment
    from megatron.checkpoint.metadata import RunMetadata
    from megatron.checkpoint.saver import Checkpointer
    from megatron.engine.engine import Engine
    from megatron.training.graceful_stop import GracefulStop
    from megatron.training.lr_schedule import LRSchedule
    from megatron.training.metric_writers import build_metric_writers
    from megatron.training.trainer import Trainer, TrainingPlan, log_run_summary

    start_up.mark("DeepSpeed and process groups")
    _log_expert_backend(config, groups)
    source, config, progress = loader.load_for_run(config, groups)
    t = config.train
    plan = TrainingPlan.of(t, config.model.seq_length, groups.world_size, progress)
    schedule = LRSchedule(
        config.optimizer, iterations=plan.iterations, tokens_per_iteration=plan.tokens
    )
    vocab_size = _vocab_size(config, tokenizer)
    record = RunMetadata.of(config, groups, tokenizer, plan.global_batch, plan.iterations)
    if source:
        source.check(record)
    splits = _build_splits(config, plan, tokenizer, vocab_size, groups)
    start_up.mark("data")

    model = build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=vocab_size,
        seed=t.seed,
        groups=groups,
        recompute=t.recompute_activations,
    )
    log.get_logger().info("%s", size_table(model, config.moe, config.gate_options))
    start_up.mark("model")
    if source:
        source.load_weights(model, groups)
    engine = Engine(model, config.optimizer, config.deepspeed, t, groups)
    rng.seed_rank(t.seed, groups.rank)
    if source:
        source.restore(engine, groups)
    profiler = _build_profiler(config, groups, progress.iteration, plan.iterations)
    log_run_summary(plan, groups, config.optimizer.precision, config.moe.num_experts, progress)

    batches = partial(_loader, config, plan, groups, tokenizer, vocab_size)
    sinks = build_metric_writers(
        config.logging, config.checkpoint.save, groups.rank, plan.iterations
    )
    start_up.mark("engine")
    with (
        contextlib.closing(sinks),
        Checkpointer(config.checkpoint, engine, record, groups, source) as checkpoints,
    ):
        Trainer(
            engine,
            t,
            config.checkpoint,
            config.fault_tolerance,
            plan,
            schedule,
            groups,
            batches(splits["train"], consumed_samples=progress.consumed_samples),
            {
                name: partial(batches, splits[name], evaluation=True)
                for name in ("valid", "test")
                if splits[name] is not None
            },
            sinks,
            checkpoints,
            progress,
            start_up,
            GracefulStop(config.fault_tolerance, groups, started),
            profiler,
        ).run()


def _build_profiler(config: RunConfig, groups, done: int, iterations: int):
    """Build the profiler of --profile, or return None without it."""
    from megatron.training.profiler import StepProfiler, profile_folder

    if not config.profiling.profile:
        return None
    last = config.fault_tolerance.last_iteration(done, iterations)
    folder = profile_folder(
        config.profiling, config.checkpoint.save, config.logging.tensorboard_dir
    )
    return StepProfiler(config.profiling, folder, groups, done, last)


def _vocab_size(config: RunConfig, tokenizer) -> int:
    size = config.model.vocab_size or tokenizer.vocab_size
    require(
        size >= tokenizer.vocab_size,
        "--vocab-size",
        size,
        f"at least the tokenizer's {tokenizer.vocab_size}",
        "Or leave it out.",
    )
    return size


def _log_expert_backend(config: RunConfig, groups) -> None:
    """What multiplies the experts' rows, and why, before anything is built for a choice that is not possible here."""
    from megatron.model.builder import choose_moe_backend
    from megatron.moe.experts.backends import DTYPES

    if config.moe.num_experts:
        backend, why = choose_moe_backend(
            config.model, config.moe, groups.device, DTYPES[config.optimizer.precision]
        )
        log.get_logger().info("experts run on the %s backend: %s", backend, why)


def _build_splits(config: RunConfig, plan, tokenizer, vocab_size: int, groups):
    """Open the data; the first rank of each node builds the sample indices, the others find them cached."""
    from megatron.data.splits import build_splits
    from megatron.data.streaming.producer import StreamingContext

    run = "-".join(
        [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]]
        if groups.world_size > 1
        else [str(os.getpid())]
    )
    eval_samples = config.train.eval_iters * plan.global_batch
    build = partial(
        build_splits,
        config.data,
        seq_length=plan.seq_length,
        train_samples=plan.iterations * plan.global_batch,
        valid_samples=eval_samples,
        test_samples=eval_samples,
        seed=config.train.seed,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        production=StreamingContext(config.tokenizer, run, starts=groups.local_rank == 0),
    )
    if groups.world_size == 1:
        return build()
    splits = build() if groups.local_rank == 0 else None
    dist.barrier()
    return splits or build()


def _loader(
    config: RunConfig,
    plan,
    groups,
    tokenizer,
    vocab_size: int,
    dataset,
    *,
    consumed_samples: int = 0,
    evaluation: bool = False,
):
    """Micro-batches of this rank from one split: from `consumed_samples` on, or those of one evaluation."""
    from megatron.data.loader import BatchLoader

    batches = BatchLoader(
        dataset,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=plan.global_batch,
        rank=groups.rank,
        world_size=groups.world_size,
        consumed_samples=consumed_samples,
        data=config.data,
        eod=tokenizer.eod,
        vocab_size=vocab_size,
    )
    return (
        islice(batches, config.train.eval_iters * plan.micro_steps) if evaluation else batches
    )
