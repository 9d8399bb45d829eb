"""tools/preprocess_data.py against `tokenizers.encode_batch` with as many threads, and merging against `cat`.

The text is distinct: the sources of the standard library and of the installed packages, one file a document, encoded by
a byte-level BPE of GPT-2's size that is trained on a part of them. The baseline reads the same JSON lines with the
standard library, encodes them in batches, and writes the same two files; both are checked to be equal byte for byte.
Then 60 MB of it repeated to 300 MB and to 1.2 GB: time per byte and peak memory of all processes together.
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
VOCAB = 50257
REPEATED = 60_000_000
BATCH = 1000  # documents that the baseline encodes at once


def write_corpus(path: Path, max_bytes: int) -> int:
    """JSON lines of Python sources of this environment. Returns the bytes of text."""
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


def repeat(source: Path, target: Path, size: int) -> None:
    """The same lines again and again, up to a size."""
    data = source.read_bytes()[:REPEATED]
    data = data[: data.rindex(b"\n") + 1]
    with open(target, "wb") as out:
        for _ in range(size // len(data)):
            out.write(data)
        out.write(data[: data.rindex(b"\n", 0, size % len(data)) + 1])


def baseline(text: Path, tokenizer: Path, prefix: Path) -> None:
    """The straightforward program: json, `encode_batch`, numpy."""
    import numpy as np
    from tokenizers import Tokenizer

    from megatron.data.indexed.writer import IndexedWriter

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.encode_special_tokens = (
        True  # the literal <|endoftext|>, which some sources hold, is text
    )
    eod = encoder.token_to_id("<|endoftext|>")
    with IndexedWriter(prefix, np.uint16) as writer, open(text, encoding="utf-8") as lines:
        batch: list[str] = []
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == BATCH:
                _add(writer, encoder.encode_batch(batch), eod)
                batch = []
        _add(writer, encoder.encode_batch(batch), eod)


def _add(writer, encodings, eod: int) -> None:
    for encoding in encodings:
        writer.add_document(encoding.ids + [eod])


def ours(text: Path, tokenizer: Path, prefix: Path, workers: int) -> float:
    """The tool as a user starts it, start-up included. Returns the peak memory of its processes together, in bytes."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(REPO / "tools/preprocess_data.py"),
            "--input",
            str(text),
            "--output-prefix",
            str(prefix),
            "--append-eod",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(tokenizer),
            "--workers",
            str(workers),
        ],
        stdout=subprocess.DEVNULL,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(_memory, _family(process.pid))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def _family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [pid, *(int(c) for t in tasks for c in (t / "children").read_text().split())]
    except OSError:
        return []


def _memory(pid: int) -> float:
    """Bytes of a process in memory, those it shares with others counted in part (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0.0


def check_equal(a: Path, b: Path) -> None:
    for suffix in (".bin", ".idx"):
        if subprocess.run(["cmp", f"{a}{suffix}", f"{b}{suffix}"]).returncode:
            raise SystemExit(f"{a}{suffix} and {b}{suffix} differ")


def speed(
    folder: Path, text: Path, tokenizer: Path, workers: int, rounds: int
) -> list[report.Row]:
    """Our time as a share of the baseline's; the bar is a 25th."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    functions = {
        "tools/preprocess_data.py": lambda: ours(text, tokenizer, folder / "ours", workers),
        "tokenizers.encode_batch": lambda: baseline(text, tokenizer, folder / "plain"),
    }
    seconds = report.interleave(functions, rounds, warmup=0)
    size = os.path.getsize(text) / 1e6
    for name, values in seconds.items():
        print(
            f"{name}: {', '.join(f'{size / v:.1f}' for v in values)} MB/s of JSON lines, {workers} cores"
        )
    check_equal(folder / "ours_text_document", folder / "plain")
    rows = report.compare(
        seconds, "tokenizers.encode_batch", {"tools/preprocess_data.py": 1 / 25}
    )
    for row in rows:
        print(f"{1 / row.ratio:.1f} times as fast; tokens equal byte for byte")
    return rows


def scale(
    folder: Path, text: Path, tokenizer: Path, workers: int, sizes: tuple[int, int], rounds: int
) -> list[report.Row]:
    """Time per byte and peak memory at the larger size, against the smaller."""
    inputs, seconds, memory = [], {}, {}
    for size in sizes:
        inputs.append(folder / f"{size // 1000000} MB")
        repeat(text, inputs[-1], size)
    for _ in range(rounds):
        for path in inputs:
            start = time.perf_counter()
            memory.setdefault(path.name, []).append(
                ours(path, tokenizer, folder / "scale", workers)
            )
            seconds.setdefault(path.name, []).append(
                (time.perf_counter() - start) / path.stat().st_size
            )
    small = inputs[0].name
    for name in memory:
        print(
            f"{name}: {', '.join(f'{1 / s / 1e6:.0f}' for s in seconds[name])} MB/s, "
            f"{', '.join(f'{m / 1e6:.0f}' for m in memory[name])} MB of memory"
        )
    rows = []
    for kind, values, bar in (("time per byte", seconds, 1.15), ("peak memory", memory, 1.10)):
        rows += [
            report.Row(f"{kind}, {r.name}", r.baseline, r.ratio, r.low, r.high, bar)
            for r in report.compare(values, small)
        ]
    return rows


def merge(folder: Path, shards: int, rounds: int) -> list[report.Row]:
    """The merge tool's time on copies of one shard, against `cat` of the same files, both up to the disk (sync)."""
    names = []
    for i in range(shards):
        for suffix in (".bin", ".idx"):
            names.append(folder / f"shard{i}{suffix}")
            subprocess.run(
                ["cp", "--reflink=never", folder / f"scale_text_document{suffix}", names[-1]],
                check=True,
            )
    tool = [
        sys.executable,
        str(REPO / "tools/merge_datasets.py"),
        "--output-prefix",
        str(folder / "all"),
        "--input",
        *(str(n.with_suffix("")) for n in names if n.suffix == ".bin"),
    ]
    bins = " ".join(f"'{n}'" for n in names)
    cat = f"cat {bins} > '{folder}/cat'; sync '{folder}/cat'"

    def run(command) -> None:
        for old in [*folder.glob("all*"), folder / "cat"]:
            old.unlink(missing_ok=True)
        os.sync()
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)

    seconds: dict[str, list[float]] = {"tools/merge_datasets.py": [], "cat": []}
    for _ in range(rounds):
        for name, command in (("tools/merge_datasets.py", tool), ("cat", ["bash", "-c", cat])):
            taken: list[float] = []
            run(command)
            seconds[name] += taken
    size = sum(n.stat().st_size for n in names) / 1e6
    for name, values in seconds.items():
        print(f"{name}: {', '.join(f'{size / v:.0f}' for v in values)} MB/s of {size:.0f} MB")
    return report.compare(seconds, "cat", {"tools/merge_datasets.py": 1 / 0.8})


def main() -> int:
    p = report.parser(__doc__)
    p.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes and threads (default: usable cores)",
    )
    p.add_argument("--only", choices=("speed", "scale", "merge"), help="one part")
    args: argparse.Namespace = p.parse_args()
    from megatron.data.ingest.encoder_pool import usable_cores

    workers = args.workers or usable_cores()
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder / "corpus.jsonl", 4_000_000 if args.quick else 300_000_000)
        print(f"{size / 1e6:.0f} MB of distinct text")
        subprocess.run(
            [
                sys.executable,
                str(REPO / "tools/train_tokenizer.py"),
                "--input",
                str(folder / "corpus.jsonl"),
                "--vocab-size",
                "1000" if args.quick else str(VOCAB),
                "--max-bytes",
                "40000000",
                "--output",
                str(folder / "tokenizer.json"),
            ],
            check=True,
        )
        text, tokenizer, rounds = folder / "corpus.jsonl", folder / "tokenizer.json", 3
        if args.only in (None, "speed"):
            rows += speed(folder, text, tokenizer, workers, rounds)
        if args.only != "speed":
            sizes = (2_000_000, 8_000_000) if args.quick else (300_000_000, 1_200_000_000)
            scaled = scale(
                folder, text, tokenizer, workers, sizes, 2 if args.only == "merge" else rounds
            )
            rows += scaled if args.only != "merge" else []
        if args.only in (None, "merge"):
            rows += merge(folder, 2 if args.quick else 6, 5)
    if args.quick:  # of what start-up takes, nothing can be said
        rows = [replace(row, bar=None) for row in rows]
    print(
        f"peak memory of this program: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )
    return report.finish(rows, args)


if __name__ == "__main__":
    sys.exit(main())
