"""Data loading: index 10 million documents of 10 billion tokens, and feed the demo's training.

The large dataset has a real .idx and a sparse .bin (20 GB that take no disk space; all tokens are
0) in a temporary folder. Its index is built, opened and read in fresh processes.

The loader reads this Python's standard library as bytes. It is compared, in one process, with the
training step of the demo's model on one rank and one core, with all experts and hence without
communication: the demo's two ranks do at most two micro-batches in that time.
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
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

if TYPE_CHECKING:
    from megatron.config.schema import DataConfig
    from megatron.data.loader import BatchLoader
    from megatron.data.sampling.sample_index import SampleIndex

DOCUMENTS = 10_000_000
TOKENS = 10_000_000_000
SEQ_LENGTH = 1024
QUICK_DIVISOR = 50  # --quick makes the dataset this many times smaller
VISITED = 3000  # random samples that are read
VISITS = ("first visit", "again")
DEMO_RANKS = 2
TIMES = 50  # the loader must be this many times faster than the demo's training
STEP = "1 training step of 1 rank"
OPEN = "1 second"
ACCESS = "50 microseconds"


def write_dataset(prefix: str, documents: int, tokens: int) -> None:
    """Write a uint16 dataset whose document lengths are log-normal and add up to `tokens`."""
    from megatron.data.indexed.reader import (
        DTYPE_CODES,
        INDEX_HEADER,
        INDEX_MAGIC,
        INDEX_VERSION,
        byte_pointers,
    )

    dtype = np.dtype(np.uint16)
    shape = np.random.RandomState(0).lognormal(0, 1, documents)
    lengths = 1 + (shape * ((tokens - documents) / shape.sum())).astype(np.int64)
    lengths[: tokens - int(lengths.sum())] += 1  # the rest after rounding down
    header = (INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype], documents, documents + 1)
    with open(prefix + ".idx", "wb") as file:
        file.write(INDEX_HEADER.pack(*header))
        file.write(lengths.astype("<i4").data)
        file.write(byte_pointers(lengths, dtype).astype("<i8").data)
        file.write(np.arange(documents + 1).astype("<i8").data)
    with open(prefix + ".bin", "wb") as file:
        file.truncate(tokens * dtype.itemsize)


def run_in_fresh_process(job: Callable[..., Any], *args: Any) -> Any:
    """Return the result of `job` in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def open_index(prefix: str, cache: str) -> tuple[SampleIndex, float, float]:
    """Return (sample index, seconds to open the dataset, seconds to build or open the index)."""
    from megatron.data.indexed.reader import IndexedDataset
    from megatron.data.sampling.sample_index import SampleIndex

    start = time.perf_counter()
    dataset = IndexedDataset(prefix)
    opened = time.perf_counter()
    index = SampleIndex(dataset, None, SEQ_LENGTH, None, seed=1, cache_dir=cache)
    return index, opened - start, time.perf_counter() - opened


def build(prefix: str, cache: str) -> tuple[int, float, float]:
    """Return (samples, seconds to build the index, peak memory of the process in MB).

    The peak is VmHWM and not ru_maxrss, which survives exec and would be the parent's.
    """
    index, _, seconds = open_index(prefix, cache)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return len(index), seconds, int(peak[1]) * 1024 / 1e6


def open_built(prefix: str, cache: str) -> tuple[float, float]:
    """Return the seconds to open the dataset and its cached index."""
    _, dataset_seconds, index_seconds = open_index(prefix, cache)
    return dataset_seconds, index_seconds


def access(prefix: str, cache: str) -> list[list[float]]:
    """Return the seconds of VISITED random samples, cold and with their tokens in memory."""
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
    """Time a training step against the micro-batches that TIMES the demo takes in that time.

    Workers have read 4 of these 100 micro-batches ahead.

    Returns:
        Seconds of the step and of each loader, and the tokens of a micro-batch.
    """
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    from benchmarks.train_step import THRESHOLD, VOCAB, configs
    from megatron.config.schema import DataConfig, DeepSpeedConfig
    from megatron.engine import distributed as parallel
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model
    from megatron.training.task import NextTokenLoss

    groups = parallel.init_distributed(1)
    model, moe, optimizer, train = configs()
    micro_batch = train.micro_batch_size
    train = replace(train, global_batch_size=micro_batch)
    gpt = build_model(
        model,
        replace(moe, moe_expert_parallel_size=1),
        {"threshold": {"threshold": THRESHOLD}},
        vocab_size=VOCAB,
        seed=0,
        groups=groups,
    )
    engine = Engine(gpt, optimizer, DeepSpeedConfig(), train, groups)
    kinds = {
        "0 workers": DataConfig(),
        "2 workers": DataConfig(num_workers=2),
        "0 workers, resets": DataConfig(
            reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True
        ),
    }
    loaders = {
        name: make_loader(folder, micro_batch, model.seq_length, VOCAB, data)
        for name, data in kinds.items()
    }
    batch = next(loaders["0 workers"])
    count = TIMES * DEMO_RANKS
    functions = {STEP: lambda: engine.step([batch], NextTokenLoss(), 0.0, 0.0)}
    for name, loader in loaders.items():
        functions[f"{count} micro-batches, {name}"] = lambda loader=loader: [
            next(loader) for _ in range(count)
        ]
    seconds = report.interleave(functions, rounds, warmup=1)
    parallel.destroy()
    return seconds, micro_batch * model.seq_length


def make_loader(
    folder: str, micro_batch: int, seq_length: int, vocab_size: int, data: DataConfig
) -> BatchLoader:
    """Return a loader of 10^9 samples over the text of the standard library."""
    from megatron.data.indexed.reader import IndexedDataset
    from megatron.data.loader import BatchLoader, DataParallelShard
    from megatron.data.sampling.sample_index import RepeatedEpochs, SampleIndex
    from megatron.tokenizer.byte import ByteTokenizer

    prefix = str(Path(folder) / "text")
    if not Path(prefix + ".idx").exists():
        write_library_text(prefix)
    samples = SampleIndex(IndexedDataset(prefix), None, seq_length, None, 1, cache_dir=folder)
    return BatchLoader(
        RepeatedEpochs(samples, 10**9, 1),
        DataParallelShard(micro_batch, micro_batch),
        data=data,
        eod=ByteTokenizer.eod,
        vocab_size=vocab_size,
    )


def write_library_text(prefix: str) -> None:
    """Write the source files of the standard library as a dataset of bytes."""
    from megatron.data.indexed.writer import IndexedWriter
    from megatron.tokenizer.byte import ByteTokenizer

    with IndexedWriter(prefix, np.uint16) as writer:
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            ids = np.frombuffer(path.read_bytes(), np.uint8)
            writer.add_document(np.append(ids, [ByteTokenizer.eod]))


def index_rows(folder: str, documents: int, tokens: int, rounds: int) -> list[report.Row]:
    """Measure the index, and print the figures that have no baseline."""
    prefix = str(Path(folder) / "big")
    cache = str(Path(folder) / "cache")
    write_dataset(prefix, documents, tokens)
    samples, seconds, peak = run_in_fresh_process(build, prefix, cache)
    print(
        f"{documents:,} documents, {tokens:,} tokens: {samples:,} samples of {SEQ_LENGTH} + 1"
    )
    print(f"build the index: {seconds:.2f} s, peak memory of the process {peak:.0f} MB")
    opened = [run_in_fresh_process(open_built, prefix, cache) for _ in range(rounds)]
    dataset, index = (statistics.median(column) for column in zip(*opened))
    print(f"open what is built: {dataset:.3f} s the dataset and {index:.3f} s its index")
    visits = run_in_fresh_process(access, prefix, cache)
    times = {f"a random sample, {name}": visit for name, visit in zip(VISITS, visits)}
    for name, visit in times.items():
        median, p99 = np.percentile(visit, [50, 99]) * 1e6
        print(f"{name}: median {median:.1f} us, p99 {p99:.1f} us")
    open_seconds = {OPEN: [1.0] * rounds, "open what is built": [sum(s) for s in opened]}
    access_seconds = {ACCESS: [50e-6] * VISITED, **times}
    return [
        *report.compare(open_seconds, OPEN, {"open what is built": 1.0}),
        *report.compare(access_seconds, ACCESS, dict.fromkeys(times, 1.0)),
    ]


def loader_rows(folder: str, rounds: int) -> list[report.Row]:
    """Measure the loader against training, and print both in tokens per second."""
    seconds, tokens = run_in_fresh_process(feed, folder, rounds)
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
    """Run the benchmark, and return its exit code."""
    args = report.parser(__doc__).parse_args()
    divisor = 1
    rounds = 10
    if args.quick:
        divisor = QUICK_DIVISOR
        rounds = 3
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *index_rows(folder, DOCUMENTS // divisor, TOKENS // divisor, rounds),
            *loader_rows(folder, rounds),
        ]
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
