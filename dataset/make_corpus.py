"""Writes a corpus of real text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}

EPILOG = """One file is one document: {"text": ..., "source": path in the library}. The order is
that of the hashes of the paths: always the same, and unrelated to the names, so that the last
documents (a validation split) are like the first."""


def find_sources(library: Path) -> list[Path]:
    """Return the .py files of a library in the order of their paths' hashes.

    Installed packages are left out. Paths are relative to the library.
    """
    files = [path.relative_to(library) for path in library.rglob("*.py")]
    files = [path for path in files if not SKIPPED_FOLDERS.intersection(path.parts)]
    return sorted(files, key=_path_hash)


def _path_hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def read_documents(library: Path, skipped: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (path in the library, UTF-8 text) of each non-empty file.

    Args:
        skipped: files that are not valid UTF-8 are appended to this list.
    """
    for path in find_sources(library):
        data = (library / path).read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError:
            skipped.append(path)
            continue
        if data:
            yield path.as_posix(), data


def write_corpus(library: Path, output: Path, max_bytes: int) -> tuple[int, int, int]:
    """Write the sources of a library to a JSON-lines file, atomically.

    Args:
        max_bytes: largest total size of the texts; 0: no limit.

    Returns:
        Number of documents, bytes of text, number of files skipped.

    Raises:
        ValueError: there is no document within `max_bytes`.
    """
    from megatron.io.atomic_write import atomic_open

    documents = 0
    size = 0
    skipped: list[Path] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(output) as file:
        for source, data in read_documents(library, skipped):
            if max_bytes and size + len(data) > max_bytes:
                break
            record = {"text": data.decode(), "source": source}
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            documents += 1
            size += len(data)
        if not documents:
            raise ValueError(
                f"no Python sources in {library} within --max-bytes {max_bytes}. Raise "
                f"--max-bytes, or use a Python whose standard library is installed as .py files"
            )
    return documents, size, len(skipped)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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


def make(args: argparse.Namespace) -> None:
    """Write the corpus that the flags describe."""
    if args.max_bytes < 0:
        raise ValueError(f"--max-bytes is {args.max_bytes}; allowed: 0 (all) or more")
    if not os.path.basename(args.output) or os.path.isdir(args.output):
        raise ValueError(f"--output is {args.output!r}; allowed: a file")
    library = Path(sysconfig.get_path("stdlib"))
    documents, size, skipped = write_corpus(library, Path(args.output), args.max_bytes)
    print(
        f"{args.output}: {documents} documents, {size} bytes of text, {skipped} files skipped "
        f"(not UTF-8)"
    )


def main() -> int:
    """Run the program, and return its exit code."""
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
