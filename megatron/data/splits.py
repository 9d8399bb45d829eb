"""The training, validation and test samples of a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.sampling.blend import Blend, Samples, parse_blend, quotas
from megatron.data.sampling.sample_index import (
    RepeatedEpochs,
    SampleIndex,
    parse_split,
    split_documents,
)
from megatron.data.streaming.producer import StreamingContext, StreamSamples, open_streams
from megatron.tokenizer.base import Tokenizer

SPLITS = ("train", "valid", "test")

EOD_DOCUMENTS = 16  # how many documents, spread over a dataset, stand for all


def build_splits(
    data: DataConfig,
    *,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    production: StreamingContext | None = None,
) -> dict[str, Samples | None]:
    """The samples of a run: {"train", "valid", "test"} -> that many samples, or None where 0 are asked for.

    A split comes from its own `--<split>-data-path`, or else from its share (`--split`) of the documents of each
    prefix of `--data-path`; that of training may also come from `--streaming-data-path`. With `--dataloader-type
    cyclic`, each training dataset is a `Cycle` of its own one epoch, also in a blend: the weights hold at any point of
    the run, and a small dataset comes round more often.

    Args:
        tokenizer: compared with what the datasets' sidecars record; None: not compared.
        vocab_size: largest vocabulary a sidecar may record; None: not compared.
        production: for `--streaming-data-path`, which also needs the tokenizer.

    Raises:
        FileNotFoundError: a dataset is missing.
        ValueError: a dataset is damaged, made by another tokenizer, or too small; a split has no documents; an option
            needs end-of-document tokens that the data lacks.
    """
    parse_split(data.split)  # a malformed one is an error also when it is not needed
    opened: dict[str, IndexedDataset] = {}
    splits: dict[str, Samples | None] = {}
    for which, samples in zip(SPLITS, (train_samples, valid_samples, test_samples)):
        splits[which] = None
        if samples == 0:
            continue
        if which == "train" and data.streaming_data_path:
            splits[which] = _stream(data, seq_length, samples, seed, tokenizer, production)
            continue
        own = getattr(data, f"{which}_data_path")
        blend = parse_blend(own or data.data_path)
        if not blend:
            advice = f"--{which}-data-path" if data.streaming_data_path else "one of the two"
            raise ValueError(
                f"--{which}-data-path and --data-path are both empty, and {samples} {which} samples are "
                f"asked for. Give {advice}"
                + ("" if which == "train" else ", or --eval-iters 0")
            )
        for _, prefix in blend:
            if prefix not in opened:
                opened[prefix] = IndexedDataset(prefix)
                check_sidecar(opened[prefix], tokenizer, vocab_size)
                check_eod(opened[prefix], data, tokenizer)
        parts = [
            (opened[prefix], _documents(opened[prefix], which, "" if own else data.split))
            for _, prefix in blend
        ]
        weights = [weight for weight, _ in blend]
        if weights[0] is None:
            weights = [
                max(1, int(d.document_lengths()[start:stop].sum()))
                for d, (start, stop) in parts
            ]
        cache = data.data_cache_path or str(Path(blend[0][1]).parent / "index_cache")
        drawn = []
        for part, needed in zip(parts, quotas(weights, samples)):
            needed = max(1, needed)
            if which == "train" and data.dataloader_type == "cyclic":
                drawn.append(
                    RepeatedEpochs(
                        SampleIndex(*part, seq_length, None, seed, cache_dir=cache),
                        needed,
                        seed,
                    )
                )
            else:
                drawn.append(SampleIndex(*part, seq_length, needed, seed, cache_dir=cache))
        splits[which] = (
            drawn[0]
            if len(drawn) == 1
            else Blend(drawn, weights, samples, seed, cache_dir=cache)
        )
    return splits


def _stream(
    data: DataConfig,
    seq_length: int,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    production: StreamingContext,
) -> Samples:
    """The samples of `--streaming-data-path`, whose producers are started if this process is the one to do so."""
    weights, entries = zip(*parse_blend(data.streaming_data_path, "--streaming-data-path"))
    cache, streams = open_streams(data, entries, tokenizer, production)
    if weights[0] is None:
        sizes = [stream.size for stream in streams]
        weights = sizes if all(sizes) else [1] * len(sizes)
    drawn = [
        StreamSamples(
            stream,
            tokenizer.vocab_size,
            seq_length,
            max(1, needed),
            seed,
            data.streaming_shuffle_samples,
        )
        for stream, needed in zip(streams, quotas(weights, num_samples))
    ]
    if production.starts:
        for samples in drawn:
            samples.start()
    return (
        drawn[0]
        if len(drawn) == 1
        else Blend(drawn, weights, num_samples, seed, cache_dir=cache)
    )


def _documents(dataset: IndexedDataset, which: str, split: str) -> tuple[int, int]:
    """The documents of one split of a dataset; all of them when `split` is empty."""
    if not split:
        return 0, dataset.num_documents
    ranges = split_documents(dataset.num_documents, split)
    start, stop = ranges[SPLITS.index(which)]
    if start == stop:
        counts = ", ".join(f"{b - a} {name}" for name, (a, b) in zip(SPLITS, ranges))
        raise ValueError(
            f"the {which} split of {dataset.prefix} is empty: --split {split} of {dataset.num_documents} "
            f"documents ({dataset.num_tokens} tokens) gives {counts} documents. Give it a larger share, "
            f"or its own --{which}-data-path"
            + ("" if which == "train" else ", or --eval-iters 0")
        )
    return start, stop


def check_sidecar(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, vocab_size: int | None = None
) -> None:
    """Compare what a dataset's sidecar records with the run's tokenizer. A missing sidecar or entry is fine.

    Raises:
        ValueError: they contradict each other.
    """
    record = dataset.sidecar or {}
    path = os.fspath(dataset.prefix) + ".json"
    for entry, ours in (
        ("vocab_hash", tokenizer and tokenizer.fingerprint),
        ("eod", tokenizer and tokenizer.eod),
    ):
        if tokenizer is not None and record.get(entry) not in (None, ours):
            raise ValueError(
                f"{path} records {entry} {record[entry]} of {record.get('tokenizer')}, this run's "
                f"{tokenizer.name} has {ours}: the ids mean other tokens. Use the tokenizer of the "
                f"data, or preprocess the text again with this one"
            )
    recorded = record.get("vocab_size", 0)
    if vocab_size is not None and (not isinstance(recorded, int) or recorded > vocab_size):
        raise ValueError(
            f"{path} records a vocabulary of {record['vocab_size']} tokens; allowed in this run: "
            f"{vocab_size}. Use the tokenizer of the data"
        )


def check_eod(dataset: IndexedDataset, data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Look at the ends of a few documents when an option of `data` needs end-of-document tokens.

    Raises:
        ValueError: a document ends without one, so that the option would silently do nothing there.
    """
    if not data.eod_flags or tokenizer is None:
        return
    filled = np.flatnonzero(dataset.document_lengths())
    for document in filled[:: max(1, len(filled) // EOD_DOCUMENTS)].tolist():
        if (last := int(dataset.read(document)[-1])) != tokenizer.eod:
            raise ValueError(
                f"{data.eod_flags[0]} is set, but document {document} of {dataset.prefix} ends with token "
                f"{last}, not with the end-of-document token {tokenizer.eod}; it would have no effect "
                f"there. Preprocess the text again with --append-eod, or leave the flag out"
            )
