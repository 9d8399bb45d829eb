"""Wiring of a training run: parse -> groups -> tokenizer -> data -> model -> engine -> loop. No logic of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron import log
from megatron.config import cli
from megatron.config.schema import RunConfig
from megatron.moe import gates


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Train as the flags say. Returns the exit code: 0; 2 after one clear line for a mistake in what was set; 1 when
    another rank ended first.

    Args:
        started: when the process did, as `time.time`, for the log's line on what start-up took; None: now.
    """
    return exit_code(lambda: train(cli.parse(sys.argv[1:] if argv is None else argv, gates.config_of, gates.available),
                                   started))


def exit_code(program: Callable[[], None]) -> int:
    """Run a program to its exit code, as `main` describes it; errors that are not the user's keep their traceback."""
    log.setup()
    try:
        program()
    except OSError as error:
        log.report_error(error)
        return 2
    except (ValueError, RuntimeError) as error:
        if lost := lost_rank(error):
            log.report_error(lost)
            return 1
        if not isinstance(error, ValueError) or not _is_ours(error):
            raise
        log.report_error(error)
        return 2
    from megatron.parallel.groups import shutdown

    shutdown()
    return 0


def leave(code: int) -> NoReturn:
    """End the process with this exit code: exit handlers run, the interpreter's own teardown does not.

    Gloo's threads take the GIL to let go of the last collective's tensors. One that comes late, while the interpreter
    is being torn down, is ended inside C++ code that does not allow it, and the abort (seen once in a hundred runs of
    two ranks on busy cores) would make a finished run a failed one. They live as long as DeepSpeed refers to its
    groups, so they cannot be joined first.
    """
    threading._shutdown()  # waits for threads that are no daemons, as the interpreter does before its exit handlers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(config: RunConfig, started: float | None = None) -> None:
    """Run the whole training that `config` describes, on the ranks the launcher started; `started` as in `main`."""
    from megatron.config.schema import require
    from megatron.data.tokenizer import build_tokenizer
    from megatron.model.build import build_model, size_table
    from megatron.parallel import groups as parallel
    from megatron.parallel import rng
    from megatron.training.profile import StartUp, StepProfiler

    start_up = StartUp(started)
    start_up.mark("torch")
    tokenizer = build_tokenizer(config.tokenizer)
    start_up.mark("tokenizer")
    groups = parallel.init(config.moe.moe_expert_parallel_size, config.train.timeout_minutes)
    from megatron.training import resume  # imports DeepSpeed: only after `groups` prepared its environment
    from megatron.training.checkpoint import Checkpoints
    from megatron.training.engine import Engine
    from megatron.training.loop import Plan, Trainer, announce
    from megatron.training.record import Progress, Record
    from megatron.training.schedule import Schedule
    from megatron.training.sinks import build_sinks
    from megatron.training.stop import Stop

    start_up.mark("DeepSpeed and process groups")
    _say_backend(config, groups)
    source = resume.find(config.train, groups)
    config = source.adopt(config, groups) if source else config
    t, seq_length = config.train, config.model.seq_length
    global_batch = t.global_batch(groups.world_size)
    plan = Plan(t.iterations(seq_length, groups.world_size), global_batch,
                global_batch // (t.micro_batch_size * groups.world_size), seq_length)
    schedule = Schedule(config.optimizer, iterations=plan.iterations, tokens_per_iteration=global_batch * seq_length)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    require(vocab_size >= tokenizer.vocab_size, "--vocab-size", vocab_size,
            f"at least the tokenizer's {tokenizer.vocab_size}", "Or leave it out.")
    record = Record.of(config, groups, tokenizer, global_batch, plan.iterations)
    if source:
        source.check(record)
    splits = _build_splits(config, plan, tokenizer, vocab_size, groups)
    start_up.mark("data")

    model = build_model(config.model, config.moe, config.gate_options, vocab_size=vocab_size, seed=t.seed,
                        groups=groups, recompute=t.recompute_activations)
    log.get_logger().info("%s", size_table(model, config.moe, config.gate_options))
    start_up.mark("model")
    if source:
        source.load_weights(model, groups)
    engine = Engine(model, config.optimizer, t, groups)
    rng.seed_rank(t.seed, groups.rank)
    progress = source.restore(engine, groups) if source else Progress()
    profiler = StepProfiler(t, groups, progress.iteration, plan.iterations) if t.profile else None
    announce(plan, groups, config.optimizer.precision, config.moe.num_experts, progress)

    loader = partial(_loader, config, plan, groups, tokenizer, vocab_size)
    sinks = build_sinks(t, groups.rank, plan.iterations)
    start_up.mark("engine")
    with contextlib.closing(sinks), Checkpoints(t, engine, record, groups, source and source.path) as checkpoints:
        Trainer(
            engine, t, plan, schedule, groups,
            loader(splits["train"], consumed_samples=progress.consumed_samples),
            {name: partial(loader, splits[name], evaluation=True)
             for name in ("valid", "test") if splits[name] is not None},
            sinks, checkpoints, progress, start_up, Stop(t, groups, started), profiler,
        ).run()


def _say_backend(config: RunConfig, groups) -> None:
    """What multiplies the experts' rows, and why, before anything is built for a choice that is not possible here."""
    from megatron.model.build import choose_backend
    from megatron.moe.grouped import DTYPES

    if config.moe.num_experts:
        backend, why = choose_backend(config.model, config.moe, groups.device, DTYPES[config.optimizer.precision])
        log.get_logger().info("experts run on the %s backend: %s", backend, why)


def _build_splits(config: RunConfig, plan, tokenizer, vocab_size: int, groups):
    """Open the data; the first rank of each node builds the sample indices, the others find them cached."""
    from megatron.data.blend import build_splits
    from megatron.data.streaming import Production

    run = "-".join([os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]] if groups.world_size > 1 else
                   [str(os.getpid())])
    eval_samples = config.train.eval_iters * plan.global_batch
    build = partial(
        build_splits, config.data, seq_length=plan.seq_length, train_samples=plan.iterations * plan.global_batch,
        valid_samples=eval_samples, test_samples=eval_samples, seed=config.train.seed, tokenizer=tokenizer,
        vocab_size=vocab_size, production=Production(config.tokenizer, run, starts=groups.local_rank == 0))
    if groups.world_size == 1:
        return build()
    splits = build() if groups.local_rank == 0 else None
    dist.barrier()
    return splits or build()


def _loader(config: RunConfig, plan, groups, tokenizer, vocab_size: int, dataset, *, consumed_samples: int = 0,
            evaluation: bool = False):
    """Micro-batches of this rank from one split: from `consumed_samples` on, or those of one evaluation."""
    from megatron.data.loader import BatchLoader

    batches = BatchLoader(
        dataset, micro_batch_size=config.train.micro_batch_size, global_batch_size=plan.global_batch,
        rank=groups.rank, world_size=groups.world_size, consumed_samples=consumed_samples, data=config.data,
        eod=tokenizer.eod, vocab_size=vocab_size)
    return islice(batches, config.train.eval_iters * plan.micro_steps) if evaluation else batches


def lost_rank(error: BaseException) -> RuntimeError | None:
    """One line for the long error of a collective whose other side is gone; None for any other error."""
    ended = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    if any(word in str(error) for word in ended):
        return RuntimeError("another rank ended, and its message says why; this one stops with it")
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself: then the message is written for the user, without a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(__file__).parent in Path(frames[-1].filename).parents
