"""How long a checkpoint keeps the training waiting, against what copying the same bytes takes.

Two ranks that share the experts save after a step, in turn: while the training waits; with --async-save, for which the
waiting counts that of `save` and of all later `poll`s up to the one that publishes, and the steps that are done
meanwhile are compared with undisturbed ones; and with `torch.save` of the same tensors, as DeepSpeed does it, which
neither syncs its files to the disk nor hashes them. The baseline of bytes per second is `cp -r` of the checkpoint, each
file synced as ours are; then without. What finding, verifying and reading it again takes stands against the same.
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

RANKS, BAR = 2, 0.2
SYNC, ASYNC, THEIRS = (
    "save, training waits",
    "save beside the training",
    "torch.save, not synced",
)
COPY, BARE, LOAD, STEP, BESIDE = (
    "cp, synced",
    "cp",
    "find, verify and restore",
    "a step",
    "a step beside the writing",
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
            seq_length=64,
            vocab_size=8192,
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
    """An engine and its checkpoints in a folder."""

    def __init__(self, groups: Any, config: Any):
        from megatron.checkpoint.metadata import TrainingProgress
        from megatron.engine.engine import Engine
        from megatron.model.builder import build_model

        self.groups, self.config, self.progress = groups, config, TrainingProgress()
        model = build_model(
            config.model, config.moe, {}, vocab_size=8192, seed=1, groups=groups
        )
        self.engine = Engine(model, config.optimizer, config.deepspeed, config.train, groups)

    def checkpoints(self, folder: Path, async_save: bool) -> Any:
        from megatron.checkpoint.metadata import RunMetadata
        from megatron.checkpoint.saver import Checkpointer

        config = configuration(True, str(folder), async_save)
        return Checkpointer(
            config.checkpoint,
            self.engine,
            RunMetadata(self.config, {}, {"ranks": RANKS}),
            self.groups,
        )

    def step(self) -> None:
        import torch

        from megatron.data.loader import Batch
        from megatron.training.task import NextTokenLoss

        tokens = torch.randint(0, 8192, (1, 65))
        self.engine.step(
            [Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, 64), None, None)],
            NextTokenLoss(),
            1e-4,
            0.0,
        )
        self.progress.iteration += 1


def timed(groups: Any, job: Any) -> float:
    """Seconds until all ranks are through."""
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    job()
    dist.barrier()
    return time.perf_counter() - start


def beside(run: Run, checkpoints: Any) -> tuple[float, list[float]]:
    """(seconds that the training waited for a checkpoint, those of the steps while it was written)."""
    waited, steps = timed(run.groups, lambda: checkpoints.save(run.progress)), []
    while checkpoints.writing:
        steps.append(timed(run.groups, run.step))
        waited += timed(run.groups, checkpoints.poll)
    return waited, steps


def copy(source: Path, target: Path, sync: bool) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        subprocess.run(["sync", *target.rglob("*")], check=True)


def torch_save(run: Run, path: Path) -> None:
    import torch

    parts = run.engine.partitions()
    torch.save(
        {
            (kind, p.name): parts.get(p, kind).clone()
            for kind in parts.kinds()
            for p in parts.pieces
        },
        path,
    )


def restore(run: Run, folder: Path) -> None:
    from megatron.checkpoint import loader
    from megatron.config.checkpoint import CheckpointConfig

    source = loader.find_checkpoint(CheckpointConfig(load=str(folder)), run.groups)
    source.restore(run.engine, run.groups)


def measure(
    groups: Any, folder: str, rounds: int, quick: bool
) -> tuple[dict[str, list[float]], int]:
    """On every rank: seconds by name and round, and the bytes of a checkpoint. The first round only warms up."""
    run, seconds, size = Run(groups, configuration(quick, folder)), {}, 0
    here = Path(folder)
    with (
        run.checkpoints(here / "sync", False) as sync,
        run.checkpoints(here / "async", True) as later,
    ):
        for _ in range(1 + rounds):
            now = {STEP: statistics.median(timed(groups, run.step) for _ in range(3))}
            now[SYNC] = timed(groups, lambda: sync.save(run.progress))
            now[ASYNC], steps = beside(run, later)
            now[BESIDE] = statistics.median(steps)
            now[THEIRS] = timed(
                groups, lambda: torch_save(run, here / f"theirs{groups.rank}.pt")
            )
            source = here / "sync" / (here / "sync/latest").read_text()
            for name in (COPY, BARE):
                job = partial(copy, source, here / name, name == COPY)
                now[name] = timed(groups, job if groups.is_rank0 else int)
            now[LOAD] = timed(groups, lambda: restore(run, here / "sync"))
            size = sum(path.stat().st_size for path in source.iterdir())
            timed(groups, lambda: groups.is_rank0 and clear(here))
            for name, value in now.items():
                seconds.setdefault(name, []).append(value)
    return {name: values[1:] for name, values in seconds.items()}, size


def clear(folder: Path) -> None:
    for path in (*folder.glob("*/iter_*"), folder / COPY, folder / BARE):
        shutil.rmtree(path)
    for path in folder.glob("theirs*"):
        path.unlink()


def main() -> int:
    args = report.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, size = report.on_ranks(
            RANKS, measure, folder, 3 if args.quick else 9, args.quick
        )
    rows = [
        r
        for base, names, bar in (
            (SYNC, (ASYNC,), BAR),
            (SYNC, (THEIRS,), None),
            (COPY, (SYNC, BARE, LOAD), None),
            (STEP, (BESIDE,), None),
        )
        for r in report.compare({n: seconds[n] for n in (base, *names)}, base, {names[0]: bar})
    ]
    code = report.finish(rows, args)
    print(f"\na checkpoint has {size / 1e6:,.1f} MB; median seconds, and MB/s")
    for name, values in seconds.items():
        rate = (
            ""
            if name in (STEP, BESIDE)
            else f"{size / 1e6 / statistics.median(values):9,.0f} MB/s"
        )
        print(
            f"{name:42s}{statistics.median(values):8.3f}{rate}   ({min(values):.3f} - {max(values):.3f})"
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
