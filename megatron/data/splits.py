"""Training, validation and test samples of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset, dataset_identity
from megatron.data.indexed.validation import check_eod, check_sidecar
from megatron.data.sampling.blend import Blend, Samples, parse_blend, quotas
from megatron.data.sampling.sample_index import (
    RepeatedEpochs,
    SampleIndex,
    parse_split,
    split_documents,
)
from megatron.data.streaming.reader import StreamSamples
from megatron.data.streaming.stream import StreamingContext, open_streams
from megatron.log import get_logger
from megatron.tokenizer.base import Tokenizer

SPLITS = ("train", "valid", "test")
_LOG_SECONDS = 30.0
"""Time between two lines about the progress of building many sample indices."""


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
    streaming: StreamingContext | None = None,
) -> dict[str, Samples | None]:
    """Build the samples of the three splits.

    A split comes from its own `--<split>-data-path`, or else from its share (`--split`) of the
    documents of each dataset of `--data-path`. The training split may also come from
    `--streaming-data-path`. With `--dataloader-type cyclic`, each training dataset repeats the
    samples of its own epoch, also within a blend: the weights then hold at any point of the run,
    and a small dataset is repeated more often.

    Args:
        seq_length: S; samples have S + 1 tokens.
        train_samples, valid_samples, test_samples: number of samples of each split.
        tokenizer: compared with the sidecars of the datasets; None: not compared.
        vocab_size: largest vocabulary that a sidecar may record; None: not compared.
        streaming: context of `--streaming-data-path`, which also needs the tokenizer.

    Returns:
        The samples of "train", "valid" and "test"; None for a split of 0 samples.

    Raises:
        FileNotFoundError: a dataset is missing.
        ValueError: a dataset is corrupt, too small, or was made with another tokenizer; a split
            has no documents; an option needs end-of-document tokens that the data lacks.
    """
    parse_split(data.split)  # validated even if every split has its own path
    builder = _SplitBuilder(data, seq_length, seed, tokenizer, vocab_size, streaming)
    counts = {"train": train_samples, "valid": valid_samples, "test": test_samples}
    return {split: builder.build(split, counts[split]) for split in SPLITS}


@dataclass(frozen=True)
class _SplitBuilder:
    """Builds the splits of a run one by one; every dataset is opened once."""

    data: DataConfig
    seq_length: int
    seed: int
    tokenizer: Tokenizer | None
    vocab_size: int | None
    streaming: StreamingContext | None
    _opened: dict[str, IndexedDataset] = field(default_factory=dict)

    def build(self, split: str, num_samples: int) -> Samples | None:
        """Build one split; None if it has no samples."""
        if num_samples == 0:
            return None
        if split == "train" and self.data.streaming_data_path:
            return self._from_streams(num_samples)
        return self._from_datasets(split, num_samples)

    def _from_datasets(self, split: str, num_samples: int) -> Samples:
        """Build a split from token files."""
        own_path = getattr(self.data, f"{split}_data_path")
        blend = parse_blend(own_path or self.data.data_path)
        if not blend:
            raise ValueError(self._no_data_message(split, num_samples))
        datasets = [self._open(prefix) for _, prefix in blend]
        flag = f"--{split}-data-path" if own_path else "--data-path"
        _check_unique(datasets, flag)
        if own_path:
            documents = [(0, dataset.num_documents) for dataset in datasets]
        else:
            documents = [_documents_of(d, split, self.data.split) for d in datasets]
        weights = [weight for weight, _ in blend]
        if weights[0] is None:
            weights = [_count_tokens(d, *part) for d, part in zip(datasets, documents)]
        cache_dir = self.data.data_cache_path
        if not cache_dir:
            cache_dir = str(Path(datasets[0].prefix).parent / "index_cache")
        cyclic = split == "train" and self.data.dataloader_type == "cyclic"
        parts = []
        logged_at = time.monotonic()
        for dataset, part, quota in zip(datasets, documents, quotas(weights, num_samples)):
            if time.monotonic() - logged_at >= _LOG_SECONDS:
                logged_at = time.monotonic()
                get_logger().info(
                    "%s split: %d of %d datasets have their sample index",
                    split,
                    len(parts),
                    len(datasets),
                )
            needed = max(1, quota)
            if cyclic:
                epoch = self._sample_index(dataset, part, None, cache_dir)
                parts.append(RepeatedEpochs(epoch, needed, self.seed))
            else:
                parts.append(self._sample_index(dataset, part, needed, cache_dir))
        return _blend(parts, weights, num_samples, self.seed, cache_dir)

    def _open(self, prefix: str) -> IndexedDataset:
        """Open and check a dataset, once for all splits."""
        if prefix not in self._opened:
            dataset = IndexedDataset(prefix)
            check_sidecar(dataset, self.tokenizer, self.vocab_size)
            check_eod(dataset, self.data, self.tokenizer)
            self._opened[prefix] = dataset
        return self._opened[prefix]

    def _sample_index(
        self,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        num_samples: int | None,
        cache_dir: str,
    ) -> SampleIndex:
        return SampleIndex(
            dataset, documents, self.seq_length, num_samples, self.seed, cache_dir=cache_dir
        )

    def _no_data_message(self, split: str, num_samples: int) -> str:
        advice = "one of the two"
        if self.data.streaming_data_path:
            advice = f"--{split}-data-path"
        return (
            f"--{split}-data-path and --data-path are both empty, and {num_samples} {split} "
            f"samples are requested. Give {advice}{_or_no_evaluation(split)}"
        )

    def _from_streams(self, num_samples: int) -> Samples:
        """Build the training split from raw text, and start the producers if this process does."""
        blend = parse_blend(self.data.streaming_data_path, "--streaming-data-path")
        weights, entries = zip(*blend)
        cache_dir, streams = open_streams(self.data, entries, self.tokenizer, self.streaming)
        if weights[0] is None:
            weights = [stream.size for stream in streams]
            if not all(weights):  # the size of a source is unknown
                weights = [1] * len(streams)
        parts = [
            StreamSamples(
                stream,
                self.tokenizer.vocab_size,
                self.seq_length,
                max(1, quota),
                self.seed,
                self.data.streaming_shuffle_samples,
            )
            for stream, quota in zip(streams, quotas(weights, num_samples))
        ]
        if self.streaming.starts:
            for samples in parts:
                samples.start()
        return _blend(parts, weights, num_samples, self.seed, cache_dir)


def _blend(
    parts: Sequence[Samples],
    weights: Sequence[float],
    num_samples: int,
    seed: int,
    cache_dir: str,
) -> Samples:
    """Return the blend of several datasets, or the only one as it is."""
    if len(parts) == 1:
        return parts[0]
    return Blend(parts, weights, num_samples, seed, cache_dir=cache_dir)


def _check_unique(datasets: Sequence[IndexedDataset], flag: str) -> None:
    """Raise ValueError if a blend has a dataset twice, possibly by two names.

    Both would give the same samples in the same order, each sample twice in a row. The weights
    are not added up here: that would change the order of the samples of a run that is resumed.
    """
    names: dict[tuple[int, int] | str, str] = {}
    for dataset in datasets:
        key = dataset_identity(dataset.prefix)
        if key in names:
            other = names[key]
            also = "" if other == dataset.prefix else f" (also as {other})"
            raise ValueError(
                f"{flag} names {dataset.prefix} twice{also}; allowed: each dataset once, because "
                f"each of its samples would come twice in a row. Name it once, with the sum of "
                f"its weights"
            )
        names[key] = dataset.prefix


def _count_tokens(dataset: IndexedDataset, start: int, stop: int) -> int:
    """Return the number of tokens of a range of documents, at least 1 as a blend weight."""
    return max(1, int(dataset.document_lengths()[start:stop].sum()))


def _documents_of(dataset: IndexedDataset, name: str, split: str) -> tuple[int, int]:
    """Return the documents (start, stop) of a dataset that belong to one of the splits.

    Args:
        name: the split, of `SPLITS`.
        split: value of `--split`.

    Raises:
        ValueError: the split has no documents.
    """
    ranges = split_documents(dataset.num_documents, split)
    start, stop = ranges[SPLITS.index(name)]
    if start == stop:
        counts = ", ".join(
            f"{last - first} {other}" for other, (first, last) in zip(SPLITS, ranges)
        )
        raise ValueError(
            f"the {name} split of {dataset.prefix} is empty: --split {split} of "
            f"{dataset.num_documents} documents ({dataset.num_tokens} tokens) gives {counts} "
            f"documents. Give it a larger share, or its own --{name}-data-path"
            f"{_or_no_evaluation(name)}"
        )
    return start, stop


def _or_no_evaluation(split: str) -> str:
    """Return the additional advice for a split other than training."""
    if split == "train":
        return ""
    return ", or --eval-iters 0"
