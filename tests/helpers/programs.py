"""Helpers for the tests of token files and data tools: hand-made files, tools as programs."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron.data.indexed.reader import IndexedDataset

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO / "../shared/data"
BYTES = ("--tokenizer-type", "ByteTokenizer")
TEXTS = ["hello", "", "naïve 日本\n<|endoftext|>", "a" * 300]
CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}


def run(script: str, *arguments, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script of this repository and check its exit code."""
    done = subprocess.run(
        [sys.executable, str(REPO / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,  # benchmarks take minutes on a busy machine
    )
    assert done.returncode == code, done.stderr
    return done


def jsonl(path: Path, texts: list[str], **more) -> Path:
    """Write texts as JSON lines; `more` are further keys of each line."""
    lines = [json.dumps({"text": text, **more}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def documents(prefix: Path) -> list[list[int]]:
    """Read the token ids of all documents of a .bin/.idx pair."""
    dataset = IndexedDataset(prefix)
    return [dataset.read(i).tolist() for i in range(dataset.num_documents)]


def one_line_error(done: subprocess.CompletedProcess) -> str:
    """Check that a program printed an error of one line and nothing else; return the line."""
    assert done.stdout == "" and done.stderr.endswith("\n")
    (line,) = done.stderr.splitlines()
    assert ": error: " in line
    return line


def by_hand(
    prefix: Path,
    sequences: list[list[int]],
    bounds: list[int],
    *,
    dtype: str = "uint16",
    **changes,
) -> str:
    """Write a .bin/.idx pair with `struct` alone, and return its prefix.

    Args:
        bounds: number of the first sequence of each document, and the number of sequences.
        changes: parts of the files to replace.
    """
    size = np.dtype(dtype).itemsize
    lengths = changes.get("lengths", [len(s) for s in sequences])
    pointers = []
    position = 0
    for length in lengths:
        pointers.append(position)
        position += length * size
    pointers = changes.get("pointers", pointers)
    idx = changes.get("magic", b"MMIDIDX\x00\x00")
    idx += struct.pack(
        "<QBQQ",
        changes.get("version", 1),
        changes.get("code", CODES[dtype]),
        len(lengths),
        len(bounds),
    )
    idx += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(
        f"<{len(pointers)}q", *pointers
    )
    idx += struct.pack(f"<{len(bounds)}q", *bounds) + changes.get("tail", b"")
    Path(f"{prefix}.idx").write_bytes(idx)
    tokens = b"".join(np.array(s, dtype).tobytes() for s in sequences)
    Path(f"{prefix}.bin").write_bytes(tokens + changes.get("bin", b""))
    return str(prefix)
