"""Joins token shards (.bin/.idx pairs) into one, document after document."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.data.indexed import IndexedDataset

EPILOG = """The inputs are taken in the order of their names, which is printed. They must have the same token size and,
where their .json records it, the same tokenizer, vocabulary and end-of-document handling. Examples:
  python tools/merge_datasets.py --input shards/ --output-prefix data/all_text_document
  python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document --verify"""
BLOCK = 16 << 20  # bytes compared at once
SAME = ("tokenizer", "vocab_hash", "vocab_size", "eod", "append_eod")


def find_prefixes(inputs: list[str], output_prefix: str) -> list[str]:
    """Prefixes of the shards named by folders and prefixes, sorted.

    Raises:
        ValueError: there are none, one comes twice, or the output is among them.
    """
    from megatron.data.indexed import prefix_of

    prefixes = []
    for path in inputs:
        found = [prefix_of(path)]
        if os.path.isdir(path):
            found = [str(p.with_suffix("")) for p in Path(path).glob("*.idx")]
        if not found:
            raise ValueError(f"--input {path} is a folder without .idx files. Give the folder of the shards")
        prefixes += found
    names = [os.path.abspath(p) for p in prefixes]
    if os.path.abspath(output_prefix) in names:
        raise ValueError(f"--output-prefix {output_prefix} is also an input. Write to another name or folder, or "
                         f"remove what an earlier merge left")
    if len(set(names)) < len(names):
        raise ValueError(f"--input names {next(n for n in names if names.count(n) > 1)} twice. Name each shard once")
    return sorted(prefixes)


def common_record(datasets: list[IndexedDataset]) -> dict[str, Any]:
    """What the sidecars agree on. The tokenizer is recorded only when every input has a sidecar.

    Raises:
        ValueError: two sidecars contradict each other, or two datasets have different dtypes.
    """
    first = datasets[0]
    known = [d for d in datasets if d.sidecar]
    for d in datasets:
        if d.dtype != first.dtype:
            raise ValueError(f"{d.prefix} holds {d.dtype}, {first.prefix} {first.dtype}; allowed: the same dtype. "
                             f"Preprocess one of them again with the other's tokenizer")
    for d in known:
        for entry in SAME:
            ours, theirs = known[0].sidecar.get(entry), d.sidecar.get(entry)
            if ours != theirs:
                raise ValueError(f"{d.prefix}.json records {entry} {theirs}, {known[0].prefix}.json {ours}; allowed: "
                                 f"the same. Preprocess one of them again with the other's tokenizer")
    record = {entry: first.sidecar[entry] for entry in SAME if entry in first.sidecar} if known == datasets else {}
    sources = [s for d in known for s in d.sidecar.get("sources", [])]
    return {"tool": "merge_datasets", **record, "sources": sources,
            "merged": [os.path.abspath(d.prefix) for d in datasets]}


def verify(written: str, datasets: list[IndexedDataset], progress: Callable[[int], object]) -> None:
    """Read the result back, before it is published, and compare it with the datasets.

    Args:
        written: its prefix.
        progress: called with the bytes just compared.

    Raises:
        ValueError: it differs; the message says where.
    """
    from megatron.data.indexed import IndexedDataset

    try:
        result = IndexedDataset(written)
        _compare_index(result, datasets)
        _compare_tokens(result, datasets, progress)
    except (ValueError, OSError) as error:
        raise ValueError(f"--verify: {error}. Nothing is published: merge again, and if this comes back, check the "
                         f"disk") from None


def _compare_index(result: IndexedDataset, datasets: list[IndexedDataset]) -> None:
    """The lengths and the document index; the pointers are the running sum of the lengths, or it would not open."""
    import numpy as np

    lengths = np.concatenate([d.lengths for d in datasets])
    firsts = np.cumsum([0, *(len(d) for d in datasets)])
    bounds = np.concatenate([[0], *(first + d.document_index[1:] for first, d in zip(firsts, datasets))])
    if not (np.array_equal(result.lengths, lengths) and np.array_equal(result.document_index, bounds)):
        raise ValueError(f"{result.prefix}.idx differs from the indices of the inputs")


def _compare_tokens(result: IndexedDataset, datasets: list[IndexedDataset], progress: Callable[[int], object]) -> None:
    at = 0
    with open(result.prefix + ".bin", "rb") as ours:
        if hasattr(os, "posix_fadvise"):  # what the disk holds, not what memory still holds of the writing
            os.posix_fadvise(ours.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for d in datasets:
            with open(d.prefix + ".bin", "rb") as theirs:
                while block := theirs.read(BLOCK):
                    if ours.read(len(block)) != block:
                        raise ValueError(f"{result.prefix}.bin differs from {d.prefix}.bin in the {len(block)} bytes "
                                         f"from byte {at} on")
                    at += len(block)
                    progress(len(block))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, metavar="PATH",
                   help="folders with shards, or prefixes, with or without .bin or .idx")
    p.add_argument("--output-prefix", required=True, metavar="PREFIX", help="prefix of the result")
    p.add_argument("--verify", action="store_true",
                   help="read the result back and publish it only if it equals the inputs byte for byte")
    return p


def main() -> int:
    from tqdm import tqdm

    from megatron.data.indexed import IndexedDataset, prefix_of
    from megatron.data.indexed_writer import IndexedWriter, require_space

    p = parser()
    a = p.parse_args()
    out = prefix_of(a.output_prefix)

    def bar(what: str) -> tqdm:
        return tqdm(total=sum(d.tokens.nbytes for d in datasets), desc=what, unit="B", unit_scale=True,
                    disable=not sys.stderr.isatty())

    try:
        datasets = [IndexedDataset(prefix) for prefix in find_prefixes(a.input, out)]
        record = common_record(datasets)
        require_space(out, datasets)
        for d in datasets:
            print(f"{d.prefix}: {d.num_documents} documents, {d.num_tokens} tokens"
                  + ("" if d.sidecar else " (no .json: its tokenizer is not checked)"))
        with bar("copy") as b, IndexedWriter(out, datasets[0].dtype) as writer:
            for d in datasets:
                writer.add_dataset(d, b.update)
            written = writer.prepare(record)
            if a.verify:
                with bar("verify") as b:
                    verify(written, datasets, b.update)
            writer.finish()
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(f"-> {out}: {writer.num_documents} documents, {writer.num_tokens} tokens"
          + (", read back and equal to the inputs" if a.verify else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
