"""Writes a corpus of real text that every machine has: the sources of this Python's standard library, as JSON lines."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}

EPILOG = """One file is one document: {"text": ..., "source": path in the library}. The order is that of the hashes of
the paths: always the same, and unrelated to the names, so that the last documents (a validation split) are like the
first."""


def find_sources(library: Path) -> list[Path]:
    """All .py files of the library, without installed packages, in the order of their paths' hashes."""
    files = [p.relative_to(library) for p in library.rglob("*.py")]
    files = [f for f in files if not SKIPPED_FOLDERS.intersection(f.parts)]
    return sorted(files, key=lambda f: hashlib.sha256(f.as_posix().encode()).digest())


def read_documents(library: Path, skipped: list[Path]) -> Iterator[tuple[str, bytes]]:
    """(path in the library, UTF-8 text) of each file that has any; what is not UTF-8 is added to `skipped`."""
    for name in find_sources(library):
        data = (library / name).read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError:
            skipped.append(name)
            continue
        if data:
            yield name.as_posix(), data


def write_corpus(library: Path, output: Path, max_bytes: int) -> tuple[int, int, int]:
    """Write under a temporary name and rename. Returns (documents, bytes of text, files skipped).

    Raises:
        ValueError: there is nothing to write.
    """
    documents = size = 0
    skipped: list[Path] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    temp = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "w", encoding="utf-8") as file:
            for name, data in read_documents(library, skipped):
                if max_bytes and size + len(data) > max_bytes:
                    break
                file.write(
                    json.dumps({"text": data.decode(), "source": name}, ensure_ascii=False)
                    + "\n"
                )
                documents, size = documents + 1, size + len(data)
        if not documents:
            raise ValueError(
                f"no Python sources in {library} within --max-bytes {max_bytes}. Raise --max-bytes, or "
                f"use a Python whose standard library is installed as .py files"
            )
        os.replace(temp, output)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temp)
    return documents, size, len(skipped)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--output", required=True, metavar="FILE", help="JSON-lines file to write")
    p.add_argument(
        "--max-bytes",
        type=int,
        default=0,
        metavar="N",
        help="stop before the text exceeds this (0: all)",
    )
    return p


def make(a: argparse.Namespace) -> None:
    if a.max_bytes < 0:
        raise ValueError(f"--max-bytes is {a.max_bytes}; allowed: 0 (all) or more")
    if not os.path.basename(a.output) or os.path.isdir(a.output):
        raise ValueError(f"--output is {a.output!r}; allowed: a file")
    documents, size, skipped = write_corpus(
        Path(sysconfig.get_path("stdlib")), Path(a.output), a.max_bytes
    )
    print(
        f"{a.output}: {documents} documents, {size} bytes of text, {skipped} files skipped (not UTF-8)"
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    return run_tool(p.prog, lambda: make(a))


if __name__ == "__main__":
    sys.exit(main())
