"""Joins token shards (.bin/.idx pairs) into one, document after document."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import numpy as np

    from megatron.data.indexed.reader import IndexedDataset

EPILOG = """The inputs are taken in the order of their names, which is printed. They must have the same token size and,
where their .json records it, the same tokenizer, vocabulary and end-of-document handling. Examples:
  python tools/merge_datasets.py --input shards/ --output-prefix data/all_text_document
  python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document --verify"""
BLOCK = 16 << 20  # bytes compared at once
SAME = ("tokenizer", "vocab_hash", "vocab_size", "eod", "append_eod")


@dataclass(frozen=True)
class Shard:
    """What is kept of an input: open, it would hold two file descriptors."""

    prefix: str
    dtype: np.dtype
    documents: int
    tokens: int
    sidecar: dict[str, Any] | None


def find_prefixes(inputs: list[str], output_prefix: str) -> list[str]:
    """Prefixes of the shards named by folders and prefixes, sorted.

    Raises:
        ValueError: there are none, one comes twice, or the output is among them.
    """
    from megatron.data.indexed.reader import prefix_of

    prefixes = []
    for path in inputs:
        found = [prefix_of(path)]
        if os.path.isdir(path):
            found = [str(p.with_suffix("")) for p in Path(path).glob("*.idx")]
        if not found:
            raise ValueError(
                f"--input {path} is a folder without .idx files. Give the folder of the shards"
            )
        prefixes += found
    if not os.path.basename(output_prefix) or os.path.isdir(output_prefix):
        raise ValueError(
            f"--output-prefix is {output_prefix!r}; allowed: a path that ends in the pair's name, such as "
            f"{os.path.join(output_prefix, 'all_text_document')}"
        )
    places = [_place(p) for p in prefixes]
    if _place(output_prefix) in places:
        raise ValueError(
            f"--output-prefix {output_prefix} is also an input. Write to another name or folder, or "
            f"remove what an earlier merge left"
        )
    if len(set(places)) < len(places):
        twice = next(p for p, place in zip(prefixes, places) if places.count(place) > 1)
        raise ValueError(f"--input names {os.path.abspath(twice)} twice. Name each shard once")
    return sorted(prefixes)


def _place(prefix: str) -> tuple[int, int] | str:
    """The same for all names of a pair: where its `.bin` is on the disk, if it is there."""
    try:
        stat = os.stat(prefix + ".bin")
    except OSError:
        return os.path.abspath(prefix)
    return stat.st_dev, stat.st_ino


def look_at(prefix: str) -> Shard:
    """Open a dataset, which checks it, and close it. Raises as `IndexedDataset`."""
    from megatron.data.indexed.reader import IndexedDataset

    d = IndexedDataset(prefix)
    return Shard(prefix, d.dtype, d.num_documents, d.num_tokens, d.sidecar)


def common_record(shards: list[Shard]) -> dict[str, Any]:
    """What the sidecars agree on. The tokenizer is recorded only when every input has a sidecar.

    Raises:
        ValueError: two sidecars contradict each other, two datasets have different dtypes, or a sidecar is malformed.
    """
    first = shards[0]
    known = [s for s in shards if s.sidecar]
    for s in shards:
        if s.dtype != first.dtype:
            raise ValueError(
                f"{s.prefix} holds {s.dtype}, {first.prefix} {first.dtype}; allowed: the same dtype. "
                f"Preprocess one of them again with the other's tokenizer"
            )
    sources = []
    for s in known:
        for entry in SAME:
            ours, theirs = known[0].sidecar.get(entry), s.sidecar.get(entry)
            if ours != theirs:
                raise ValueError(
                    f"{s.prefix}.json records {entry} {theirs}, {known[0].prefix}.json {ours}; allowed: "
                    f"the same. Preprocess one of them again with the other's tokenizer"
                )
        found = s.sidecar.get("sources", [])
        if not isinstance(found, list):
            raise ValueError(
                f"{s.prefix}.json records sources {found!r}; allowed: a list. Correct it, or remove the "
                f"file"
            )
        sources += found
    record = (
        {entry: first.sidecar[entry] for entry in SAME if entry in first.sidecar}
        if known == shards
        else {}
    )
    return {
        "tool": "merge_datasets",
        **record,
        "sources": sources,
        "merged": [os.path.abspath(s.prefix) for s in shards],
    }


def verify(
    written: str, datasets: Iterable[IndexedDataset], progress: Callable[[int], object]
) -> None:
    """Read the result back, before it is published, and compare it with the datasets, one at a time.

    Args:
        written: its prefix.
        progress: called with the bytes just compared.

    Raises:
        ValueError: it differs; the message says where.
    """
    from megatron.data.indexed.reader import IndexedDataset

    try:
        result = IndexedDataset(written)
        sequences = documents = 0
        with open(written + ".bin", "rb") as file:
            if hasattr(
                os, "posix_fadvise"
            ):  # what the disk holds, not what memory still holds of the writing
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for d in datasets:
                _compare_index(result, d, sequences, documents)
                _compare_tokens(file, d, progress)
                sequences, documents = sequences + len(d), documents + d.num_documents
        if (sequences, documents) != (len(result), result.num_documents):
            raise ValueError(
                f"{result.prefix}.idx differs from the indices of the inputs: it has more of them"
            )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--verify: {error}. Nothing is published: merge again, and if this comes back, check the "
            f"disk"
        ) from None


def _compare_index(
    result: IndexedDataset, d: IndexedDataset, sequence: int, document: int
) -> None:
    """The lengths and the document index of the part that begins there; the pointers are the running sum of the
    lengths, or it would not open."""
    import numpy as np

    lengths = result.lengths[sequence : sequence + len(d)]
    bounds = result.document_index[document : document + d.num_documents + 1]
    if not (
        np.array_equal(lengths, d.lengths)
        and np.array_equal(bounds, sequence + d.document_index)
    ):
        raise ValueError(
            f"{result.prefix}.idx differs from the indices of the inputs, from {d.prefix} on"
        )


def _compare_tokens(
    ours: BinaryIO, d: IndexedDataset, progress: Callable[[int], object]
) -> None:
    with open(d.prefix + ".bin", "rb") as theirs:
        while block := theirs.read(BLOCK):
            at = ours.tell()
            if ours.read(len(block)) != block:
                raise ValueError(
                    f"{ours.name} differs from {d.prefix}.bin in the {len(block)} bytes from byte {at} on"
                )
            progress(len(block))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders with shards, or prefixes, with or without .bin or .idx",
    )
    p.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="prefix of the result"
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and publish it only if it equals the inputs byte for byte",
    )
    return p


def merge(a: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megatron.data.indexed.reader import IndexedDataset, prefix_of
    from megatron.data.indexed.writer import IndexedWriter, require_space

    out = prefix_of(a.output_prefix)
    shards = [look_at(prefix) for prefix in find_prefixes(a.input, out)]
    record = common_record(shards)

    def datasets() -> Iterator[IndexedDataset]:
        return (IndexedDataset(s.prefix) for s in shards)

    def bar(what: str) -> tqdm:
        return tqdm(
            total=sum(s.tokens * s.dtype.itemsize for s in shards),
            desc=what,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    require_space(out, datasets())
    for s in shards:
        print(
            f"{s.prefix}: {s.documents} documents, {s.tokens} tokens"
            + ("" if s.sidecar else " (no .json: its tokenizer is not checked)")
        )
    with bar("copy") as b, IndexedWriter(out, shards[0].dtype) as writer:
        for d in datasets():
            writer.add_dataset(d, b.update)
        written = writer.prepare(record)
        if a.verify:
            with bar("verify") as b:
                verify(written, datasets(), b.update)
        writer.finish()
    print(
        f"-> {out}: {writer.num_documents} documents, {writer.num_tokens} tokens"
        + (", read back and equal to the inputs" if a.verify else "")
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    return run_tool(p.prog, lambda: merge(a))


if __name__ == "__main__":
    sys.exit(main())
