"""Joins token shards (.bin/.idx pairs) into one, document after document."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.data.indexed import IndexedDataset

EPILOG = """The inputs are taken in the order of their names, which is printed. They must have the same token size and,
where their .json records it, the same tokenizer, vocabulary and end-of-document handling. Example:
  python tools/merge_datasets.py --input shards/ --output-prefix data/all_text_document"""
SAME = ("tokenizer", "vocab_hash", "vocab_size", "eod", "append_eod")


def find_prefixes(inputs: list[str], output_prefix: str) -> list[str]:
    """Prefixes of the shards named by folders and prefixes, sorted.

    Raises:
        ValueError: there are none, one comes twice, or the output is among them.
    """
    prefixes = []
    for path in inputs:
        in_folder = sorted(str(p.with_suffix("")) for p in Path(path).glob("*.idx")) if os.path.isdir(path) else [path]
        if not in_folder:
            raise ValueError(f"--input {path} is a folder without .idx files. Give the folder of the shards")
        prefixes += in_folder
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


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, metavar="PATH",
                   help="a folder with shards, or prefixes (without .bin and .idx)")
    p.add_argument("--output-prefix", required=True, metavar="PREFIX", help="prefix of the result")
    a = p.parse_args()
    from megatron.data.indexed import IndexedDataset
    from megatron.data.indexed_writer import IndexedWriter

    try:
        datasets = [IndexedDataset(prefix) for prefix in find_prefixes(a.input, a.output_prefix)]
        record = common_record(datasets)
        with IndexedWriter(a.output_prefix, datasets[0].dtype) as writer:
            for d in datasets:
                print(f"{d.prefix}: {d.num_documents} documents, {d.num_tokens} tokens"
                      + ("" if d.sidecar else " (no .json: its tokenizer is not checked)"))
                writer.add_dataset(d)
            writer.finish(record)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(f"-> {a.output_prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
