"""Repair of token datasets whose index does not count the last token of each document."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from megatron.data.indexed.opened import OpenedDataset
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import IndexedWriter, require_merge_space
from megatron.io.progress import ProgressCallback, no_progress
from megatron.tokenizer.base import Tokenizer

_BLOCK_DOCUMENTS = 1 << 22  # documents checked per step


def repair(
    opened: OpenedDataset,
    out: str,
    tokenizer: Tokenizer | None = None,
    progress: ProgressCallback = no_progress,
) -> int:
    """Write a copy with a correct index to the prefix `out`.

    Args:
        tokenizer: recorded in the sidecar of `out` if given.
        progress: called with the bytes just processed, twice the size of `.bin` in total.

    Returns:
        The token id that every document ends with.

    Raises:
        ValueError: there is nothing to repair; `out` is the input; the uncounted tokens are not
            all the same id, or not the end-of-document id of the tokenizer or the sidecar.
        OSError: the disk has no space for the result.
    """
    dataset = opened.dataset
    if not opened.uncounted_tokens:
        raise ValueError(
            f"--repair {out}: nothing to repair, {dataset.prefix}.idx counts all tokens of its "
            f".bin"
        )
    if os.path.realpath(out + ".bin") == os.path.realpath(dataset.prefix + ".bin"):
        raise ValueError(f"--repair {out} is the input itself. Write to another name or folder")
    eod = _common_last_token(dataset, progress)
    expected, source = opened.expected_eod(tokenizer)
    if expected not in (None, eod):
        raise ValueError(
            f"the uncounted tokens of {dataset.prefix} are all {eod}, the end-of-document id "
            f"{source} is {expected}; allowed: the same. Give the tokenizer of the data, or "
            f"preprocess the text again"
        )
    require_merge_space(out, [dataset])
    with IndexedWriter(out, dataset.dtype) as writer:
        writer.add_dataset(dataset, progress)
        writer.finish(_sidecar(dataset, tokenizer, eod))
    return eod


def _sidecar(dataset: IndexedDataset, tokenizer: Tokenizer | None, eod: int) -> dict[str, Any]:
    """Return the sidecar entries of the repaired dataset."""
    record = dict(dataset.sidecar or {})
    if tokenizer is not None:
        record["tokenizer"] = tokenizer.name
        record["vocab_hash"] = tokenizer.fingerprint
        record["vocab_size"] = tokenizer.vocab_size
    record["tool"] = "inspect_dataset"
    record["eod"] = eod
    record["append_eod"] = True
    record["repaired_from"] = os.path.abspath(dataset.prefix)
    return record


def _common_last_token(dataset: IndexedDataset, progress: ProgressCallback) -> int:
    """Return the id that every non-empty document ends with, required to be the same."""
    starts = dataset.index.document_starts()
    documents = np.flatnonzero(np.diff(starts))
    eod = dataset.tokens[starts[documents[0] + 1] - 1].item()
    tokens_read = 0
    for block in np.split(documents, range(_BLOCK_DOCUMENTS, len(documents), _BLOCK_DOCUMENTS)):
        last_tokens = dataset.tokens[starts[block + 1] - 1]
        different = np.flatnonzero(last_tokens != eod)
        if len(different):
            i = different[0]
            raise ValueError(
                f"the uncounted tokens of {dataset.prefix} differ: {eod} after document "
                f"{documents[0]}, {last_tokens[i]} after document {block[i]}, so that they are "
                f"no end-of-document tokens. Preprocess the text again"
            )
        end = starts[block[-1] + 1]
        progress((end - tokens_read) * dataset.dtype.itemsize)
        tokens_read = end
    return eod
