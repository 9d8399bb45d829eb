"""Time that training waits for a checkpoint, against copying the same bytes.

Two ranks with sharded experts save after a step, in three ways: while training waits; with
--async-save, where the wait is that of `save` and of all later `poll`s up to the commit, and steps
during the write are compared with undisturbed ones; and with `torch.save` of the same tensors, as
DeepSpeed does, which neither syncs its files to the disk nor hashes them. The baseline of bytes per
second is `cp -r` of the checkpoint with each file synced, as checkpoints are; then without sync.
Finding, verifying and restoring the checkpoint is compared with the same baseline.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

RANKS = 2
VOCAB_SIZE = 8192
SEQ_LENGTH = 64
ASYNC_BAR = 0.2
"""Largest wait for a background save, relative to a save that training waits for"""
SAVE = "save, training waits"
ASYNC_SAVE = "save in the background"
TORCH_SAVE = "torch.save, not synced"
COPY_SYNCED = "cp, synced"
COPY = "cp"
LOAD = "find, verify and restore"
STEP = "a step"
STEP_DURING_SAVE = "a step during the write"
COMPARISONS = (  # (baseline, rows compared with it, bar of the first row)
    (SAVE, (ASYNC_SAVE,), ASYNC_BAR),
    (SAVE, (TORCH_SAVE,), None),
    (COPY_SYNCED, (SAVE, COPY, LOAD), None),
    (STEP, (STEP_DURING_SAVE,), None),
)


def configuration(quick: bool, folder: str, async_save: bool = False, load: str = "") -> Any:
    from megatron.config.schema import (
        CheckpointConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
    )

    size = 384 if quick else 512
    return RunConfig(
        ModelConfig(
            num_layers=8,
            hidden_size=size,
            num_attention_heads=4,
            seq_length=SEQ_LENGTH,
            vocab_size=VOCAB_SIZE,
        ),
        MoEConfig(
            num_experts=8,
            gate="topk",
            expert_interval=2,
            moe_ffn_hidden_size=size,
            moe_expert_parallel_size=RANKS,
        ),
        optimizer=OptimizerConfig(bf16=True),
        train=TrainConfig(micro_batch_size=1),
        checkpoint=CheckpointConfig(
            save=folder,
            async_save=async_save,
            load=load,
            load_or_init=bool(load),
        ),
    )


class Run:
    """An engine and its progress."""

    def __init__(self, groups: Any, config: Any):
        from megatron.checkpoint.metadata import TrainingProgress
        from megatron.engine.engine import Engine
        from megatron.model.builder import build_model

        self.groups = groups
        self.config = config
        self.progress = TrainingProgress()
        model = build_model(
            config.model, config.moe, {}, vocab_size=VOCAB_SIZE, seed=1, groups=groups
        )
        self.engine = Engine(model, config.optimizer, config.deepspeed, config.train, groups)

    def checkpointer(self, folder: Path, async_save: bool) -> Any:
        from megatron.checkpoint.metadata import RunMetadata
        from megatron.checkpoint.saver import Checkpointer

        config = configuration(True, str(folder), async_save)
        metadata = RunMetadata(self.config, {}, {"ranks": RANKS})
        return Checkpointer(config.checkpoint, self.engine, metadata, self.groups)

    def step(self) -> None:
        import torch

        from megatron.data.loader import Batch
        from megatron.training.task import NextTokenLoss

        tokens = torch.randint(0, VOCAB_SIZE, (1, SEQ_LENGTH + 1))
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, SEQ_LENGTH), None, None)
        self.engine.step([batch], NextTokenLoss(), 1e-4, 0.0)
        self.progress.iteration += 1


def timed(groups: Any, work: Any) -> float:
    """Return the seconds until all ranks have finished their work."""
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def save_in_background(run: Run, checkpointer: Any) -> tuple[float, list[float]]:
    """Return (seconds that training waited, seconds of each step during the write)."""
    waited = timed(run.groups, lambda: checkpointer.save(run.progress))
    steps = []
    while checkpointer.is_writing:
        steps.append(timed(run.groups, run.step))
        waited += timed(run.groups, checkpointer.poll)
    return waited, steps


def copy(source: Path, target: Path, sync: bool) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        subprocess.run(["sync", *target.rglob("*")], check=True)


def torch_save(run: Run, path: Path) -> None:
    import torch

    zero_shards = run.engine.zero_shards()
    tensors = {}
    for key in zero_shards.state_keys():
        for shard in zero_shards.shards:
            tensors[key, shard.name] = zero_shards.get(shard, key).clone()
    torch.save(tensors, path)


def restore(run: Run, folder: Path) -> None:
    from megatron.checkpoint import loader
    from megatron.config.checkpoint import CheckpointConfig

    loaded = loader.find_checkpoint(CheckpointConfig(load=str(folder)), run.groups)
    loaded.restore(run.engine, run.groups)


def measure(
    groups: Any, folder: str, rounds: int, quick: bool
) -> tuple[dict[str, list[float]], int]:
    """Measure on every rank; the first round is a warm-up.

    Returns:
        (seconds of each round by name, bytes of a checkpoint).
    """
    run = Run(groups, configuration(quick, folder))
    here = Path(folder)
    seconds: dict[str, list[float]] = {}
    size = 0
    with (
        run.checkpointer(here / "sync", False) as waiting,
        run.checkpointer(here / "async", True) as background,
    ):
        for _ in range(1 + rounds):
            row, size = measure_round(run, here, waiting, background)
            for name, value in row.items():
                seconds.setdefault(name, []).append(value)
    return {name: values[1:] for name, values in seconds.items()}, size


def measure_round(
    run: Run, here: Path, waiting: Any, background: Any
) -> tuple[dict[str, float], int]:
    """Return (seconds by name, bytes of a checkpoint) of one round."""
    groups = run.groups
    row = {STEP: statistics.median(timed(groups, run.step) for _ in range(3))}
    row[SAVE] = timed(groups, lambda: waiting.save(run.progress))
    row[ASYNC_SAVE], steps = save_in_background(run, background)
    row[STEP_DURING_SAVE] = statistics.median(steps)
    row[TORCH_SAVE] = timed(groups, lambda: torch_save(run, here / f"torch{groups.rank}.pt"))
    source = here / "sync" / (here / "sync/latest").read_text()
    for name in (COPY_SYNCED, COPY):
        work = partial(copy, source, here / name, name == COPY_SYNCED)
        row[name] = timed(groups, work if groups.is_rank0 else int)
    row[LOAD] = timed(groups, lambda: restore(run, here / "sync"))
    size = sum(path.stat().st_size for path in source.iterdir())
    timed(groups, partial(clear, here) if groups.is_rank0 else int)
    return row, size


def clear(folder: Path) -> None:
    for path in (*folder.glob("*/iter_*"), folder / COPY_SYNCED, folder / COPY):
        shutil.rmtree(path)
    for path in folder.glob("torch*.pt"):
        path.unlink()


def main() -> int:
    args = report.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, size = report.on_ranks(
            RANKS, measure, folder, 3 if args.quick else 9, args.quick
        )
    rows = []
    for baseline, names, bar in COMPARISONS:
        values = {name: seconds[name] for name in (baseline, *names)}
        rows += report.compare(values, baseline, {names[0]: bar})
    code = report.finish(rows, args)
    print(f"\na checkpoint has {size / 1e6:,.1f} MB; median seconds, and MB/s")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = f"{size / 1e6 / median:9,.0f} MB/s"
        if name in (STEP, STEP_DURING_SAVE):
            rate = ""
        print(f"{name:42s}{median:8.3f}{rate}   ({min(values):.3f} - {max(values):.3f})")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
