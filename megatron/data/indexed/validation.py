"""Checks of a token dataset against the tokenizer and the options of a run."""

from __future__ import annotations

import os

import numpy as np

from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.tokenizer.base import Tokenizer

_SAMPLED_DOCUMENTS = 16  # documents, spread over a dataset, whose last token is checked


def check_sidecar(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, vocab_size: int | None = None
) -> None:
    """Compare the sidecar of a dataset with the tokenizer and the vocabulary of the run.

    A missing sidecar or entry is not compared, and neither is an argument that is None.

    Raises:
        ValueError: they contradict each other.
    """
    record = dataset.sidecar or {}
    path = os.fspath(dataset.prefix) + ".json"
    if tokenizer is not None:
        vocabulary = tokenizer.fingerprint
        if record.get("vocab_hash") not in (None, vocabulary):
            raise ValueError(
                f"{path} records vocab_hash {record['vocab_hash']} of {record.get('tokenizer')}, "
                f"this run's {tokenizer.name} has {vocabulary}: the ids stand for other tokens. "
                f"Use the tokenizer of the data, or preprocess the text again with this one"
            )
        has_eod = record.get("append_eod", True)
        if has_eod and record.get("eod") not in (None, tokenizer.eod):
            raise ValueError(
                f"{path} records eod {record['eod']} of {record.get('tokenizer')}, this run's "
                f"{tokenizer.name} has {tokenizer.eod}: documents end with another token. Name "
                f"that of the data with --eod-token, or preprocess the text again"
            )
    recorded = record.get("vocab_size", 0)
    if vocab_size is not None and (not isinstance(recorded, int) or recorded > vocab_size):
        raise ValueError(
            f"{path} records a vocabulary of {recorded} tokens; allowed in this run: "
            f"{vocab_size}. Use the tokenizer of the data"
        )


def check_eod(dataset: IndexedDataset, data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Check the last token of a few documents if an option needs end-of-document tokens.

    Raises:
        ValueError: the tokenizer has none, or a document ends with another token, so that the
            option would silently have no effect there.
    """
    if not data.eod_flags or tokenizer is None:
        return
    eod = tokenizer.require_eod(data.eod_flags[0])
    nonempty = np.flatnonzero(dataset.document_lengths())
    stride = max(1, len(nonempty) // _SAMPLED_DOCUMENTS)
    for document in nonempty[::stride].tolist():
        last = int(dataset.read(document)[-1])
        if last != eod:
            raise ValueError(
                f"{data.eod_flags[0]} is set, but document {document} of {dataset.prefix} ends "
                f"with token {last}, not with the end-of-document token {eod}; it "
                f"would have no effect there. Preprocess the text again with --append-eod, or "
                f"leave the flag out"
            )
