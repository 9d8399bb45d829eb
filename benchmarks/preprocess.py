"""tools/preprocess_data.py against `tokenizers.encode_batch`, and merging against `cat`.

Both encoders use the same number of threads. The text has no repetitions: the sources of the
standard library and of the installed packages, one file per document. It is encoded by a
byte-level BPE of the size of GPT-2's, trained on a part of it. The baseline reads the same
JSON lines with the standard library, encodes them in batches, and writes the same two files,
which are checked to be equal byte for byte.

Then 60 MB of the text are repeated to 300 MB and to 1.2 GB, to compare the time per byte and
the peak memory of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

REPO = Path(__file__).resolve().parent.parent
TOOL = "tools/preprocess_data.py"
MERGE_TOOL = "tools/merge_datasets.py"
BASELINE = "tokenizers.encode_batch"
VOCAB_SIZE = 50257
REPEATED_BYTES = 60_000_000
BATCH_DOCUMENTS = 1000  # documents per call of the baseline's encoder


def write_corpus(path: Path, max_bytes: int) -> int:
    """Write the Python sources of this environment as JSON lines. Returns the bytes of text."""
    written = 0
    with open(path, "w", encoding="utf-8") as out:
        for folder in ("stdlib", "purelib"):
            for source in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
                try:
                    text = source.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if text and written < max_bytes:
                    out.write(json.dumps({"text": text}) + "\n")
                    written += len(text.encode())
    return written


def repeat_lines(source: Path, target: Path, size: int) -> None:
    """Repeat the first lines of a file up to a size."""
    data = source.read_bytes()[:REPEATED_BYTES]
    data = data[: data.rindex(b"\n") + 1]
    with open(target, "wb") as out:
        for _ in range(size // len(data)):
            out.write(data)
        out.write(data[: data.rindex(b"\n", 0, size % len(data)) + 1])


def run_baseline(text: Path, tokenizer: Path, prefix: Path) -> None:
    """Run the straightforward program: json, `encode_batch`, numpy."""
    import numpy as np
    from tokenizers import Tokenizer

    from megatron.data.indexed.writer import IndexedWriter

    encoder = Tokenizer.from_file(str(tokenizer))
    # The literal <|endoftext|>, which some sources contain, is ordinary text.
    encoder.encode_special_tokens = True
    eod = encoder.token_to_id("<|endoftext|>")
    with IndexedWriter(prefix, np.uint16) as writer, open(text, encoding="utf-8") as lines:
        batch: list[str] = []
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == BATCH_DOCUMENTS:
                _write_encodings(writer, encoder.encode_batch(batch), eod)
                batch = []
        _write_encodings(writer, encoder.encode_batch(batch), eod)


def _write_encodings(writer, encodings, eod: int) -> None:
    for encoding in encodings:
        writer.add_document(encoding.ids + [eod])


def run_tool(text: Path, tokenizer: Path, prefix: Path, workers: int) -> float:
    """Run the tool as a user does, including its start-up.

    Returns the peak memory of its processes together, in bytes.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, str(REPO / TOOL)),
            *("--input", str(text)),
            *("--output-prefix", str(prefix)),
            "--append-eod",
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(tokenizer)),
            *("--workers", str(workers)),
        ],
        stdout=subprocess.DEVNULL,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(_memory_bytes, _process_family(process.pid))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def _process_family(pid: int) -> list[int]:
    """List a process and its children."""
    family = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            family += map(int, (task / "children").read_text().split())
    except OSError:
        return []
    return family


def _memory_bytes(pid: int) -> float:
    """Measure the memory of a process, with its part of shared pages (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0.0


def check_equal(a: Path, b: Path) -> None:
    """Exit with a message if two .bin/.idx pairs differ."""
    for suffix in (".bin", ".idx"):
        if subprocess.run(["cmp", f"{a}{suffix}", f"{b}{suffix}"]).returncode:
            raise SystemExit(f"{a}{suffix} and {b}{suffix} differ")


def measure_speed(
    folder: Path, text: Path, tokenizer: Path, workers: int, rounds: int
) -> list[report.Row]:
    """Measure the tool's time against the baseline's; the bar is one 25th."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    functions = {
        TOOL: lambda: run_tool(text, tokenizer, folder / "ours", workers),
        BASELINE: lambda: run_baseline(text, tokenizer, folder / "plain"),
    }
    seconds = report.interleave(functions, rounds, warmup=0)
    megabytes = os.path.getsize(text) / 1e6
    for name, values in seconds.items():
        speeds = ", ".join(f"{megabytes / v:.1f}" for v in values)
        print(f"{name}: {speeds} MB/s of JSON lines, {workers} cores")
    check_equal(folder / "ours_text_document", folder / "plain")
    rows = report.compare(seconds, BASELINE, {TOOL: 1 / 25})
    for row in rows:
        print(f"{1 / row.ratio:.1f} times as fast; tokens equal byte for byte")
    return rows


def measure_scaling(
    folder: Path, text: Path, tokenizer: Path, workers: int, sizes: tuple[int, int], rounds: int
) -> list[report.Row]:
    """Measure time per byte and peak memory at the larger size against the smaller."""
    inputs = []
    for size in sizes:
        inputs.append(folder / f"{size // 1000000} MB")
        repeat_lines(text, inputs[-1], size)
    seconds: dict[str, list[float]] = {path.name: [] for path in inputs}
    memory: dict[str, list[float]] = {path.name: [] for path in inputs}
    for _ in range(rounds):
        for path in inputs:
            start = time.perf_counter()
            memory[path.name].append(run_tool(path, tokenizer, folder / "scale", workers))
            taken = time.perf_counter() - start
            seconds[path.name].append(taken / path.stat().st_size)
    for name in memory:
        speeds = ", ".join(f"{1 / s / 1e6:.0f}" for s in seconds[name])
        peaks = ", ".join(f"{m / 1e6:.0f}" for m in memory[name])
        print(f"{name}: {speeds} MB/s, {peaks} MB of memory")
    rows = []
    for kind, values, bar in (("time per byte", seconds, 1.15), ("peak memory", memory, 1.10)):
        for row in report.compare(values, inputs[0].name):
            rows.append(replace(row, name=f"{kind}, {row.name}", bar=bar))
    return rows


def measure_merging(folder: Path, shards: int, rounds: int) -> list[report.Row]:
    """Measure the merge tool's time against `cat` of the same files, both up to the disk."""
    files = []
    for i in range(shards):
        for suffix in (".bin", ".idx"):
            copy = folder / f"shard{i}{suffix}"
            original = folder / f"scale_text_document{suffix}"
            subprocess.run(["cp", "--reflink=never", original, copy], check=True)
            files.append(copy)
    prefixes = [str(file.with_suffix("")) for file in files if file.suffix == ".bin"]
    tool = [sys.executable, str(REPO / MERGE_TOOL), "--output-prefix", str(folder / "all")]
    tool += ["--input", *prefixes]
    names = " ".join(f"'{file}'" for file in files)
    cat = ["bash", "-c", f"cat {names} > '{folder}/cat'; sync '{folder}/cat'"]
    seconds: dict[str, list[float]] = {MERGE_TOOL: [], "cat": []}
    for _ in range(rounds):
        for name, command in ((MERGE_TOOL, tool), ("cat", cat)):
            seconds[name].append(_time_writing(folder, command))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    for name, values in seconds.items():
        speeds = ", ".join(f"{megabytes / v:.0f}" for v in values)
        print(f"{name}: {speeds} MB/s of {megabytes:.0f} MB")
    return report.compare(seconds, "cat", {MERGE_TOOL: 1 / 0.8})


def _time_writing(folder: Path, command: list[str]) -> float:
    """Measure the seconds of a command, whose earlier output is removed first."""
    for old in [*folder.glob("all*"), folder / "cat"]:
        old.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def train_tokenizer(text: Path, output: Path, vocab_size: int) -> None:
    """Train a byte-level BPE on 40 MB of a text."""
    subprocess.run(
        [
            *(sys.executable, str(REPO / "tools/train_tokenizer.py")),
            *("--input", str(text)),
            *("--vocab-size", str(vocab_size)),
            *("--max-bytes", "40000000"),
            *("--output", str(output)),
        ],
        check=True,
    )


def measure(args: argparse.Namespace, workers: int, folder: Path) -> list[report.Row]:
    """Prepare the text and the tokenizer, and measure the requested parts."""
    text = folder / "corpus.jsonl"
    tokenizer = folder / "tokenizer.json"
    size = write_corpus(text, 4_000_000 if args.quick else 300_000_000)
    print(f"{size / 1e6:.0f} MB of distinct text")
    train_tokenizer(text, tokenizer, 1000 if args.quick else VOCAB_SIZE)
    rounds = 3
    rows: list[report.Row] = []
    if args.only in (None, "speed"):
        rows += measure_speed(folder, text, tokenizer, workers, rounds)
    if args.only != "speed":
        sizes = (2_000_000, 8_000_000) if args.quick else (300_000_000, 1_200_000_000)
        # Merging uses the output of the larger size.
        scale_rounds = 2 if args.only == "merge" else rounds
        scaled = measure_scaling(folder, text, tokenizer, workers, sizes, scale_rounds)
        if args.only != "merge":
            rows += scaled
    if args.only in (None, "merge"):
        rows += measure_merging(folder, 2 if args.quick else 6, 5)
    return rows


def main() -> int:
    p = report.parser(__doc__)
    p.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes and threads (default: usable cores)",
    )
    p.add_argument("--only", choices=("speed", "scale", "merge"), help="measure one part")
    args: argparse.Namespace = p.parse_args()
    from megatron.data.ingest.encoder_pool import usable_cores

    workers = args.workers or usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, workers, Path(folder))
    if args.quick:  # start-up dominates these times
        rows = [replace(row, bar=None) for row in rows]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this program: {peak:.0f} MB")
    return report.finish(rows, args)


if __name__ == "__main__":
    sys.exit(main())
