"""Training, validation and test samples of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.fields import flag_name
from megatron.config.schema import DataConfig
from megatron.data.indexed.reader import IndexedDataset, dataset_identity
from megatron.data.indexed.validation import check_eod, check_sidecar
from megatron.data.sampling.blend import Blend, Samples, parse_blend, quotas
from megatron.data.sampling.mock_samples import MockSamples
from megatron.data.sampling.sample_index import (
    RepeatedEpochs,
    SampleIndex,
    parse_split,
    split_documents,
)
from megatron.data.streaming.reader import StreamSamples
from megatron.data.streaming.stream import StreamingContext, open_streams
from megatron.io.content_id import content_id
from megatron.log import get_logger, is_rank0, warn_on_rank0
from megatron.tokenizer.base import Tokenizer

SPLITS = ("train", "valid", "test")
_LOG_SECONDS = 30.0
"""Time between two lines about the progress of building many sample indices."""
_LISTED_DATASETS = 5  # in a warning about a blend
_SET_NAMES = {"valid": "validation set", "test": "test set"}


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
    log_missing: bool = True,
) -> dict[str, Samples | None]:
    """Build the samples of the three splits, and of the sets of `--valid-sets`.

    A split comes from its own `--<split>-data-path`, or else from its share (`--split`) of the
    documents of each dataset of `--data-path`. The training split may also come from
    `--streaming-data-path`, and all of them from `--mock-data`. With `--dataloader-type
    cyclic`, each training dataset repeats the samples of its own epoch, also within a blend: the
    weights then hold at any point of the run, and a small dataset is repeated more often.

    There is no validation or test split, which one line of the log states, if nothing names its
    data, its share is 0, or the documents of its share hold fewer tokens than one sample. In a
    blend, datasets with such a share are left out. A path of its own must hold enough tokens.

    Args:
        seq_length: S; samples have S + 1 tokens.
        train_samples, valid_samples, test_samples: number of samples of each split; each set of
            --valid-sets has as many as the validation split.
        tokenizer: compared with the sidecars of the datasets; None: not compared.
        vocab_size: largest vocabulary that a sidecar may record; None: not compared.
        streaming: context of `--streaming-data-path`, which also needs the tokenizer.
        log_missing: log why there is no validation or test split.

    Returns:
        The samples of "train", "valid", "valid/NAME" for each set of --valid-sets, and "test",
        in this order; None for a split that the run does not have.

    Raises:
        FileNotFoundError: a dataset is missing.
        ValueError: a dataset is corrupt, too small, or was made with another tokenizer; the
            training split has no documents; an option needs end-of-document tokens that the
            data lacks.
    """
    parse_split(data.split)  # validated even if every split has its own path
    builder = _SplitBuilder(
        data, seq_length, seed, tokenizer, vocab_size, streaming, log_missing
    )
    splits = {
        "train": builder.build("train", train_samples),
        "valid": builder.build("valid", valid_samples),
    }
    for name, words in data.named_valid_sets.items():
        samples = None
        if valid_samples:
            samples = builder.from_prefixes(words, f"--valid-sets {name}=", valid_samples)
        splits[f"valid/{name}"] = samples
    splits["test"] = builder.build("test", test_samples)
    return splits


def index_cache_folders(data: DataConfig) -> list[str]:
    """Return the folders in which the sample indices of a run are stored."""
    folders = set()
    for words in (
        data.data_path,
        data.train_data_path,
        data.valid_data_path,
        data.test_data_path,
        *data.named_valid_sets.values(),
    ):
        for _, prefix in parse_blend(words)[:1]:
            folders.add(_cache_folder(data, prefix))
    return sorted(folders)


def _cache_folder(data: DataConfig, first_prefix: str) -> str:
    """Return the folder for the indices of a blend that begins with this prefix."""
    return data.data_cache_path or str(Path(first_prefix).parent / "index_cache")


@dataclass(frozen=True)
class _Source:
    """Documents of one dataset that belong to a split."""

    weight: float | None
    """in the blend; None: the number of tokens"""
    dataset: IndexedDataset
    documents: tuple[int, int]
    """range (start, stop)"""

    @property
    def tokens(self) -> int:
        start, stop = self.documents
        return int(self.dataset.document_lengths()[start:stop].sum())


@dataclass(frozen=True)
class _SplitBuilder:
    """Builds the splits of a run one by one; every dataset is opened once."""

    data: DataConfig
    seq_length: int
    seed: int
    tokenizer: Tokenizer | None
    vocab_size: int | None
    streaming: StreamingContext | None
    log_missing: bool
    _opened: dict[str, IndexedDataset] = field(default_factory=dict)
    _compared: set[str] = field(default_factory=set)
    """flags whose datasets were compared with each other"""

    def build(self, split: str, num_samples: int) -> Samples | None:
        """Build one split; None if it has no samples."""
        if num_samples == 0:
            return None
        if self.data.mock_data:
            return self._mock_samples(split, num_samples)
        if split == "train" and self.data.streaming_data_path:
            return self._from_streams(num_samples)
        own_path = getattr(self.data, f"{split}_data_path")
        if own_path:
            cyclic = split == "train" and self.data.dataloader_type == "cyclic"
            flag = flag_name(f"{split}_data_path")
            return self.from_prefixes(own_path, flag, num_samples, cyclic)
        if split == "train":
            return self._train_share(num_samples)
        return self._evaluation_share(split, num_samples)

    def _mock_samples(self, split: str, num_samples: int) -> MockSamples:
        return MockSamples(
            self.tokenizer.vocab_size,
            self.tokenizer.eod,
            seq_length=self.seq_length,
            num_samples=num_samples,
            seed=self.seed,
            stream=SPLITS.index(split),
        )

    def from_prefixes(
        self, words: Sequence[str], flag: str, num_samples: int, cyclic: bool = False
    ) -> Samples:
        """Build a split of all documents of one dataset or of a blend.

        Args:
            words: see `parse_blend`.
            flag: the flag that they come from, for messages.
            cyclic: repeat the samples of one epoch.
        """
        sources = []
        for weight, dataset in self._open_blend(words, flag):
            sources.append(_Source(weight, dataset, (0, dataset.num_documents)))
        return self._from_sources(sources, num_samples, flag, cyclic)

    def _train_share(self, num_samples: int) -> Samples:
        """Build the training split from its share of each dataset of --data-path."""
        if not self.data.data_path:
            raise ValueError(
                f"--train-data-path and --data-path are both empty, and {num_samples} train "
                f"samples are requested. Give one of the two"
            )
        sources = []
        for weight, dataset in self._open_blend(self.data.data_path, "--data-path"):
            documents = _share_of(dataset, "train", self.data.split)
            if documents[0] == documents[1]:
                raise ValueError(
                    f"the train split of {dataset.prefix} is empty: --split {self.data.split} "
                    f"of {dataset.num_documents} documents ({dataset.num_tokens} tokens) leaves "
                    f"none. Give it a larger share, or its own --train-data-path"
                )
            sources.append(_Source(weight, dataset, documents))
        cyclic = self.data.dataloader_type == "cyclic"
        return self._from_sources(sources, num_samples, "train split", cyclic)

    def _evaluation_share(self, split: str, num_samples: int) -> Samples | None:
        """Build validation or test from its share of each dataset that has enough of it.

        Returns:
            None if there is no such dataset, which is logged.
        """
        kind = _SET_NAMES[split]
        own_flag = flag_name(f"{split}_data_path")
        if not self.data.data_path:
            if split != "valid" or not self.data.valid_sets:
                self._log_missing(f"no {kind}: neither {own_flag} nor --data-path is set")
            return None
        if parse_split(self.data.split)[SPLITS.index(split)] == 0:
            self._log_missing(f"no {kind}: its share of --split {self.data.split} is 0")
            return None
        sources = []
        too_small = []
        for weight, dataset in self._open_blend(self.data.data_path, "--data-path"):
            source = _Source(weight, dataset, _share_of(dataset, split, self.data.split))
            if source.tokens > self.seq_length:
                sources.append(source)
            else:
                too_small.append(source)
        if too_small and self.log_missing:
            self._warn_of_small_shares(split, too_small, left_out=bool(sources))
        if not sources:
            return None
        return self._from_sources(sources, num_samples, f"{split} split")

    def _log_missing(self, message: str) -> None:
        if self.log_missing:
            get_logger().info("%s", message)

    def _warn_of_small_shares(
        self, split: str, too_small: Sequence[_Source], left_out: bool
    ) -> None:
        """Log once which datasets have too few tokens for one sample in their share."""
        shown = []
        for source in too_small[:_LISTED_DATASETS]:
            start, stop = source.documents
            shown.append(
                f"{source.dataset.prefix} ({stop - start} of {source.dataset.num_documents} "
                f"documents, {source.tokens} tokens)"
            )
        if len(too_small) > len(shown):
            shown.append(f"{len(too_small) - len(shown)} more")
        consequence = f"no {_SET_NAMES[split]}"
        if left_out:
            consequence = f"datasets left out of the {_SET_NAMES[split]}"
        warn_on_rank0(
            "%s: the share by --split %s is less than one sample of %d tokens in %s. Give it a "
            "larger share, or its own %s",
            consequence,
            self.data.split,
            self.seq_length + 1,
            ", ".join(shown),
            flag_name(f"{split}_data_path"),
        )

    def _from_sources(
        self,
        sources: Sequence[_Source],
        num_samples: int,
        what: str,
        cyclic: bool = False,
    ) -> Samples:
        """Build the samples of documents in token files, blended if there are several sources.

        Args:
            what: name of the split for the log.
        """
        weights = [source.weight for source in sources]
        if weights[0] is None:
            weights = [max(1, source.tokens) for source in sources]
        cache_dir = _cache_folder(self.data, sources[0].dataset.prefix)
        parts = []
        logged_at = time.monotonic()
        for source, quota in zip(sources, quotas(weights, num_samples)):
            if time.monotonic() - logged_at >= _LOG_SECONDS:
                logged_at = time.monotonic()
                get_logger().info(
                    "%s: %d of %d datasets have their sample index",
                    what,
                    len(parts),
                    len(sources),
                )
            needed = max(1, quota)
            if cyclic:
                epoch = self._sample_index(source, None, cache_dir)
                parts.append(RepeatedEpochs(epoch, needed, self.seed))
            else:
                parts.append(self._sample_index(source, needed, cache_dir))
        return _blend(parts, weights, num_samples, self.seed, cache_dir)

    def _open_blend(
        self, words: Sequence[str], flag: str
    ) -> list[tuple[float | None, IndexedDataset]]:
        """Open the datasets of a blend, and return them with their weights."""
        blend = [(weight, self._open(prefix)) for weight, prefix in parse_blend(words, flag)]
        datasets = [dataset for _, dataset in blend]
        _check_unique(datasets, flag)
        if self.log_missing and is_rank0() and flag not in self._compared:
            self._compared.add(flag)
            _warn_of_copies(datasets, flag)
        return blend

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
        source: _Source,
        num_samples: int | None,
        cache_dir: str,
    ) -> SampleIndex:
        return SampleIndex(
            source.dataset,
            source.documents,
            self.seq_length,
            num_samples,
            self.seed,
            cache_dir=cache_dir,
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


def _warn_of_copies(datasets: Sequence[IndexedDataset], flag: str) -> None:
    """Log which dataset of a blend is a copy of another: it has the same order of samples."""
    by_size: dict[tuple[int, int], list[str]] = {}
    for dataset in datasets:
        by_size.setdefault((dataset.num_documents, dataset.num_tokens), []).append(
            dataset.prefix
        )
    for prefixes in by_size.values():
        if len(prefixes) == 1:
            continue
        seen: dict[str, str] = {}
        for prefix in prefixes:
            content = content_id([f"{prefix}.idx", f"{prefix}.bin"])
            first = seen.setdefault(content, prefix)
            if first != prefix:
                warn_on_rank0(
                    "%s: %s has the same content as %s: each of its samples comes twice in a row. "
                    "Name one of them, with the sum of their weights",
                    flag,
                    prefix,
                    first,
                )
                return


def _share_of(dataset: IndexedDataset, name: str, split: str) -> tuple[int, int]:
    """Return the documents (start, stop) of a dataset that belong to one of the splits.

    Args:
        name: the split, of `SPLITS`.
        split: value of `--split`.
    """
    return split_documents(dataset.num_documents, split)[SPLITS.index(name)]
