"""The data side alone: indexing 10 million documents of 10 billion tokens, and feeding the demo's training.

The big dataset has a real .idx and a sparse .bin (20 GB that take no disk; all tokens are 0), in a temporary folder
that is removed. Its index is built, opened and read in fresh processes. The loader reads this Python's standard library
as bytes and is compared, in one process, with the demo model's training step on one rank and one core, with all experts
and hence no communication: the demo's two ranks do at most two micro-batches in that time.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

DOCUMENTS, TOKENS, SEQ_LENGTH, QUICK = (
    10_000_000,
    10_000_000_000,
    1024,
    50,
)  # --quick: 50 times smaller
VISITED, VISITS = 3000, ("first visit", "again")
DEMO_RANKS, TIMES = 2, 50  # the loader must be this many times faster than the demo's training
STEP, OPEN, ACCESS = "1 training step of 1 rank", "1 second", "50 microseconds"


def write_dataset(prefix: str, documents: int, tokens: int) -> None:
    """A pair of uint16 tokens whose documents have log-normal lengths that add up to `tokens`."""
    from megatron.data.indexed.reader import CODES, HEADER, MAGIC, VERSION, byte_pointers

    dtype = np.dtype(np.uint16)
    shape = np.random.RandomState(0).lognormal(0, 1, documents)
    lengths = 1 + (shape * ((tokens - documents) / shape.sum())).astype(np.int64)
    lengths[: tokens - int(lengths.sum())] += 1  # what rounding down left, less than one each
    with open(prefix + ".idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1))
        for part, kind in (
            (lengths, "<i4"),
            (byte_pointers(lengths, dtype), "<i8"),
            (np.arange(documents + 1), "<i8"),
        ):
            file.write(part.astype(kind).data)
    with open(prefix + ".bin", "wb") as file:
        file.truncate(tokens * dtype.itemsize)


def fresh(job: Callable[..., Any], *args: Any) -> Any:
    """What `job` returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def open_index(prefix: str, cache: str):
    """(the sample index, seconds of opening the dataset, seconds of the index)."""
    from megatron.data.indexed.reader import IndexedDataset
    from megatron.data.sampling.sample_index import SampleIndex

    start = time.perf_counter()
    dataset = IndexedDataset(prefix)
    opened = time.perf_counter()
    index = SampleIndex(dataset, None, SEQ_LENGTH, None, seed=1, cache_dir=cache)
    return index, opened - start, time.perf_counter() - opened


def build(prefix: str, cache: str) -> tuple[int, float, float]:
    """(samples, seconds of the index, peak memory of the process in MB). Not ru_maxrss: that survives exec, so that it
    would show the parent's."""
    index, _, seconds = open_index(prefix, cache)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return len(index), seconds, int(peak[1]) * 1024 / 1e6


def open_built(prefix: str, cache: str) -> tuple[float, float]:
    return open_index(prefix, cache)[1:]


def access(prefix: str, cache: str) -> list[list[float]]:
    """Seconds of VISITED random samples, at the first visit and, with their tokens in memory, at the second."""
    index, *_ = open_index(prefix, cache)
    numbers = np.random.RandomState(2).randint(0, len(index), VISITED).tolist()
    seconds: list[list[float]] = [[], []]
    for visit in seconds:
        for i in numbers:
            start = time.perf_counter()
            index[i]
            visit.append(time.perf_counter() - start)
    return seconds


def feed(folder: str, rounds: int) -> tuple[dict[str, list[float]], int]:
    """(seconds of a training step, and of as many micro-batches from each loader as TIMES the demo takes in that time;
    tokens of a micro-batch). Workers have 4 of those 100 read ahead."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    from benchmarks.train_step import THRESHOLD, VOCAB, configs
    from megatron.config.schema import DataConfig, DeepSpeedConfig
    from megatron.engine import distributed as parallel
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model

    groups = parallel.init_distributed(1)
    model, moe, optimizer, train = configs()
    train, size = (
        replace(train, global_batch_size=train.micro_batch_size),
        train.micro_batch_size,
    )
    engine = Engine(
        build_model(
            model,
            replace(moe, moe_expert_parallel_size=1),
            {"threshold": THRESHOLD},
            vocab_size=VOCAB,
            seed=0,
            groups=groups,
        ),
        optimizer,
        DeepSpeedConfig(),
        train,
        groups,
    )
    resets = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    kinds = {
        "0 workers": DataConfig(),
        "2 workers": DataConfig(num_workers=2),
        "0 workers, resets": resets,
    }
    loaders = {
        name: make_loader(folder, size, model.seq_length, VOCAB, data)
        for name, data in kinds.items()
    }
    batch, functions = next(loaders["0 workers"]), {}
    functions[STEP] = lambda: engine.step([batch], NextTokenLoss(), 0.0, 0.0)
    for name, loader in loaders.items():
        functions[f"{TIMES * DEMO_RANKS} micro-batches, {name}"] = lambda loader=loader: [
            next(loader) for _ in range(TIMES * DEMO_RANKS)
        ]
    seconds = report.interleave(functions, rounds, warmup=1)
    parallel.destroy()
    return seconds, size * model.seq_length


def make_loader(folder: str, micro_batch: int, seq_length: int, vocab_size: int, data):
    """An endless loader over the standard library's text."""
    from megatron.data.indexed.reader import IndexedDataset
    from megatron.data.indexed.writer import IndexedWriter
    from megatron.data.loader import BatchLoader
    from megatron.data.sampling.sample_index import RepeatedEpochs, SampleIndex
    from megatron.tokenizer.byte import ByteTokenizer

    prefix = str(Path(folder) / "text")
    if not Path(prefix + ".idx").exists():
        with IndexedWriter(prefix, np.uint16) as writer:
            for path in sorted(Path(os.__file__).parent.glob("*.py")):
                writer.add_document(
                    np.append(np.frombuffer(path.read_bytes(), np.uint8), [ByteTokenizer.eod])
                )
    samples = SampleIndex(IndexedDataset(prefix), None, seq_length, None, 1, cache_dir=folder)
    return BatchLoader(
        RepeatedEpochs(samples, 10**9, 1),
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch,
        rank=0,
        world_size=1,
        consumed_samples=0,
        data=data,
        eod=ByteTokenizer.eod,
        vocab_size=vocab_size,
    )


def index_rows(folder: str, documents: int, tokens: int, rounds: int) -> list[report.Row]:
    """Measure the index; print what has no baseline."""
    prefix, cache = str(Path(folder) / "big"), str(Path(folder) / "cache")
    write_dataset(prefix, documents, tokens)
    samples, seconds, peak = fresh(build, prefix, cache)
    print(
        f"{documents:,} documents, {tokens:,} tokens: {samples:,} samples of {SEQ_LENGTH} + 1"
    )
    print(f"build the index: {seconds:.2f} s, peak memory of the process {peak:.0f} MB")
    opened = [fresh(open_built, prefix, cache) for _ in range(rounds)]
    dataset, index = (statistics.median(column) for column in zip(*opened))
    print(f"open what is built: {dataset:.3f} s the dataset and {index:.3f} s its index")
    visits = fresh(access, prefix, cache)
    for name, visit in zip(VISITS, visits):
        median, p99 = np.percentile(visit, [50, 99]) * 1e6
        print(f"a random sample, {name}: median {median:.1f} us, p99 {p99:.1f} us")
    times = {f"a random sample, {name}": visit for name, visit in zip(VISITS, visits)}
    return [
        *report.compare(
            {OPEN: [1.0] * rounds, "open what is built": [sum(s) for s in opened]},
            OPEN,
            {"open what is built": 1.0},
        ),
        *report.compare(
            {ACCESS: [50e-6] * VISITED, **times}, ACCESS, dict.fromkeys(times, 1.0)
        ),
    ]


def loader_rows(folder: str, rounds: int) -> list[report.Row]:
    """Measure the loader against training; print both in tokens per second."""
    seconds, tokens = fresh(feed, folder, rounds)
    step = statistics.median(seconds[STEP])
    demo = DEMO_RANKS * tokens / step
    print(
        f"training: {tokens / step:,.0f} tokens/s on one rank, so at most {demo:,.0f} in the demo"
    )
    for name, values in seconds.items():
        if name != STEP:
            rate = TIMES * DEMO_RANKS * tokens / statistics.median(values)
            print(f"{name}: {rate:,.0f} tokens/s, {rate / demo:,.0f} times that")
    return report.compare(seconds, STEP, {name: 1.0 for name in seconds if name != STEP})


def main() -> int:
    args = report.parser(__doc__).parse_args()
    small, rounds = (QUICK, 3) if args.quick else (1, 10)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *index_rows(folder, DOCUMENTS // small, TOKENS // small, rounds),
            *loader_rows(folder, rounds),
        ]
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
