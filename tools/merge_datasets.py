"""Joins token datasets (.bin/.idx pairs) into one, document after document."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import numpy as np

    from megatron.data.indexed.reader import IndexedDataset
    from megatron.io.progress import ProgressCallback

EPILOG = """The inputs are taken in the order of their names, which is printed. They must have the
same token size and, where their .json records it, the same tokenizer, vocabulary and
end-of-document handling. Examples:
  python tools/merge_datasets.py --input shards/ --output-prefix data/all_text_document
  python tools/merge_datasets.py --input a_text_document b_text_document
    --output-prefix ab_text_document --verify"""
COMPARE_BYTES = 16 << 20  # bytes compared per step
COMMON_ENTRIES = ("tokenizer", "vocab_hash", "vocab_size", "eod", "append_eod")


@dataclass(frozen=True)
class Shard:
    """Description of an input. The dataset is closed: open, it would hold two file descriptors."""

    prefix: str
    dtype: np.dtype
    documents: int
    tokens: int
    sidecar: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Size of `.bin`."""
        return self.tokens * self.dtype.itemsize


def find_prefixes(inputs: list[str], output_prefix: str) -> list[str]:
    """Return the sorted prefixes of the shards that `--input` names, folders expanded.

    Raises:
        ValueError: there are none, one is named twice, or the output is among them.
    """
    from megatron.data.indexed.reader import dataset_identity

    prefixes = []
    for path in inputs:
        prefixes += _prefixes_at(path)
    if not os.path.basename(output_prefix) or os.path.isdir(output_prefix):
        example = os.path.join(output_prefix, "all_text_document")
        raise ValueError(
            f"--output-prefix is {output_prefix!r}; allowed: a path that ends in the pair's "
            f"name, such as {example}"
        )
    identities = [dataset_identity(prefix) for prefix in prefixes]
    if dataset_identity(output_prefix) in identities:
        raise ValueError(
            f"--output-prefix {output_prefix} is also an input. Write to another name or folder, "
            f"or remove what an earlier merge left"
        )
    for prefix, identity in zip(prefixes, identities):
        if identities.count(identity) > 1:
            raise ValueError(
                f"--input names {os.path.abspath(prefix)} twice. Name each shard once"
            )
    return sorted(prefixes)


def _prefixes_at(path: str) -> list[str]:
    """Return the prefixes of a folder, or the prefix that a path refers to."""
    from megatron.data.indexed.reader import dataset_prefix

    if not os.path.isdir(path):
        return [dataset_prefix(path)]
    prefixes = [str(p.with_suffix("")) for p in Path(path).glob("*.idx")]
    if not prefixes:
        raise ValueError(
            f"--input {path} is a folder without .idx files. Give the folder of the shards"
        )
    return prefixes


def describe_shard(prefix: str) -> Shard:
    """Open a dataset, which validates it, and describe it. Raises like `IndexedDataset`."""
    from megatron.data.indexed.reader import IndexedDataset

    dataset = IndexedDataset(prefix)
    return Shard(
        prefix, dataset.dtype, dataset.num_documents, dataset.num_tokens, dataset.sidecar
    )


def merge_sidecars(shards: list[Shard]) -> dict[str, Any]:
    """Return the sidecar entries of the merged dataset.

    The tokenizer is recorded only if every input has a sidecar.

    Raises:
        ValueError: two sidecars contradict each other, two datasets have different dtypes, or a
            sidecar is malformed.
    """
    from megatron.data.indexed.recorded_tokenizer import FLAGS_ENTRY

    first = shards[0]
    for shard in shards:
        if shard.dtype != first.dtype:
            raise ValueError(
                f"{shard.prefix} holds {shard.dtype}, {first.prefix} {first.dtype}; allowed: "
                f"the same dtype. Preprocess one of them again with the other's tokenizer"
            )
    with_sidecar = [shard for shard in shards if shard.sidecar]
    sources = []
    for shard in with_sidecar:
        _require_same_entries(with_sidecar[0], shard)
        sources += _sources(shard)
    record = {}
    if with_sidecar == shards:
        names = (*COMMON_ENTRIES, FLAGS_ENTRY)  # the files may have been elsewhere for others
        record = {name: first.sidecar[name] for name in names if name in first.sidecar}
    return {
        "tool": "merge_datasets",
        **record,
        "sources": sources,
        "merged": [os.path.abspath(shard.prefix) for shard in shards],
    }


def _require_same_entries(first: Shard, shard: Shard) -> None:
    """Require the same tokenizer and end-of-document handling in two sidecars."""
    for name in COMMON_ENTRIES:
        expected = first.sidecar.get(name)
        found = shard.sidecar.get(name)
        if expected != found:
            raise ValueError(
                f"{shard.prefix}.json records {name} {found}, {first.prefix}.json {expected}; "
                f"allowed: the same. Preprocess one of them again with the other's tokenizer"
            )


def _sources(shard: Shard) -> list:
    """Return the sources that a sidecar records."""
    sources = shard.sidecar.get("sources", [])
    if not isinstance(sources, list):
        raise ValueError(
            f"{shard.prefix}.json records sources {sources!r}; allowed: a list. Correct it, or "
            f"remove the file"
        )
    return sources


def verify(merged: str, datasets: Iterable[IndexedDataset], progress: ProgressCallback) -> None:
    """Read the staged result back and compare it with the inputs, one at a time.

    Args:
        merged: prefix of the staged result.
        progress: called with the bytes just compared.

    Raises:
        ValueError: the result differs; the message names the position.
    """
    from megatron.data.indexed.reader import IndexedDataset

    try:
        result = IndexedDataset(merged)
        sequences = 0
        documents = 0
        with open(merged + ".bin", "rb") as file:
            _drop_page_cache(file)
            for dataset in datasets:
                _compare_index(result, dataset, sequences, documents)
                _compare_tokens(file, dataset, progress)
                sequences += len(dataset)
                documents += dataset.num_documents
        if (sequences, documents) != (len(result), result.num_documents):
            raise ValueError(
                f"{result.prefix}.idx differs from the indices of the inputs: it has more of them"
            )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--verify: {error}. Nothing is published: merge again, and if this comes back, check "
            f"the disk"
        ) from None


def _drop_page_cache(file: BinaryIO) -> None:
    """Make reads return what is on the disk, not what is still in memory from writing."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _compare_index(
    result: IndexedDataset, dataset: IndexedDataset, sequence: int, document: int
) -> None:
    """Compare the lengths and the document index of one input with its part of the result.

    The pointers need no comparison: a dataset opens only if they are the running sum of the
    lengths.

    Args:
        sequence, document: first sequence and document of the input in the result.
    """
    import numpy as np

    lengths = result.lengths[sequence : sequence + len(dataset)]
    boundaries = result.document_index[document : document + dataset.num_documents + 1]
    same_lengths = np.array_equal(lengths, dataset.lengths)
    same_documents = np.array_equal(boundaries, sequence + dataset.document_index)
    if not same_lengths or not same_documents:
        raise ValueError(
            f"{result.prefix}.idx differs from the indices of the inputs, from {dataset.prefix} "
            f"on"
        )


def _compare_tokens(
    merged: BinaryIO, dataset: IndexedDataset, progress: ProgressCallback
) -> None:
    """Compare `.bin` of one input with the next bytes of the result."""
    with open(dataset.prefix + ".bin", "rb") as file:
        while block := file.read(COMPARE_BYTES):
            offset = merged.tell()
            if merged.read(len(block)) != block:
                raise ValueError(
                    f"{merged.name} differs from {dataset.prefix}.bin in the {len(block)} bytes "
                    f"from byte {offset} on"
                )
            progress(len(block))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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


def merge(args: argparse.Namespace) -> None:
    """Merge the inputs and publish the result, after reading it back if requested."""
    from megatron.data.indexed.reader import IndexedDataset, dataset_prefix
    from megatron.data.indexed.writer import IndexedWriter, require_merge_space
    from megatron.io.progress import byte_progress_bar

    out = dataset_prefix(args.output_prefix)
    shards = [describe_shard(prefix) for prefix in find_prefixes(args.input, out)]
    sidecar = merge_sidecars(shards)
    size = sum(shard.nbytes for shard in shards)

    def datasets() -> Iterator[IndexedDataset]:
        return (IndexedDataset(shard.prefix) for shard in shards)

    require_merge_space(out, datasets())
    for shard in shards:
        print_shard(shard)
    with byte_progress_bar("copy", size) as bar, IndexedWriter(out, shards[0].dtype) as writer:
        for dataset in datasets():
            writer.add_dataset(dataset, bar.update)
        staged = writer.prepare(sidecar)
        if args.verify:
            with byte_progress_bar("verify", size) as verify_bar:
                verify(staged, datasets(), verify_bar.update)
        writer.finish()
    line = f"-> {out}: {writer.num_documents} documents, {writer.num_tokens} tokens"
    if args.verify:
        line += ", read back and equal to the inputs"
    print(line)


def print_shard(shard: Shard) -> None:
    """Print what an input holds."""
    line = f"{shard.prefix}: {shard.documents} documents, {shard.tokens} tokens"
    if not shard.sidecar:
        line += " (no .json: its tokenizer is not checked)"
    print(line)


def main() -> int:
    """Run the program, and return its exit code."""
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: merge(args))


if __name__ == "__main__":
    sys.exit(main())
