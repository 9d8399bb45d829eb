"""Config section `data`: token files, text streams and how samples are cut from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.fields import (
    flag_name,
    option,
    require,
    require_choices,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.needs import setting

_DATA_SOURCES = (
    "data_path",
    "data_args_path",
    "per_split_data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "valid_sets",
    "streaming_data_path",
    "mock_data",
)
"""Fields that name where tokens come from"""
_ONLY_WITHOUT = {
    "data_args_path": ("data_path", "train_data_path", "streaming_data_path"),
    "per_split_data_args_path": (
        "data_path",
        "data_args_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "streaming_data_path",
    ),
    "mock_data": tuple(name for name in _DATA_SOURCES if name != "mock_data"),
}
"""Fields that cannot be set together with others"""
# A name, an equals sign, and the first word of the set. A path with a folder before its equals
# sign, such as data/lang=en, is no name.
_SET_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from, and how samples are cut from them."""

    data_path: tuple[str, ...] = option(())
    """prefixes of .bin/.idx pairs, optionally each preceded by its weight:
    0.7 a 0.3 b"""
    train_data_path: tuple[str, ...] = option(())
    """like --data-path, for the training split only; not with --data-path"""
    valid_data_path: tuple[str, ...] = option((), needs=setting("eval_iters"))
    """like --data-path, for the validation split only"""
    test_data_path: tuple[str, ...] = option((), needs=setting("eval_iters"))
    """like --data-path, for the test split only"""
    valid_sets: tuple[str, ...] = option((), needs=setting("eval_iters"))
    """further validation sets that are evaluated and logged one by one, each a name, =, and
    what --valid-data-path takes: wiki=a code=0.7 b 0.3 c"""
    data_args_path: str = ""
    """text file with the words of --data-path, for long blends: weights and prefixes
    separated by whitespace, on any number of lines"""
    per_split_data_args_path: str = ""
    """JSON file with the words of --train-data-path, --valid-data-path and
    --test-data-path: an object with the lists train, valid and test, each of which may be
    missing"""
    mock_data: bool = False
    """train and evaluate on random tokens, without data files; the tokenizer needs no files
    either if --vocab-size is set"""
    streaming_data_path: tuple[str, ...] = option(())
    """text to tokenize in separate processes during training: .jsonl, .gz, .xz, .zst and
    .parquet files, quoted patterns, directories, or hf:NAME for a Hugging Face dataset.
    Each argument is one source. Sources are mixed in proportion to their size on disk,
    compressed or not (equally if a size is unknown), or by weights: 0.7 a.jsonl 0.3 b. The
    tokens are stored in --data-cache-path and reused by later epochs and runs. Not with
    --data-path or --train-data-path"""
    streaming_json_key: str = option("text", needs=setting("streaming_data_path"))
    """key (column) that holds the text in --streaming-data-path"""
    streaming_shuffle_samples: int = option(1024, needs=setting("streaming_data_path"))
    """consecutive samples of a source of --streaming-data-path that are shuffled together,
    and therefore tokenized before the first step; 1: keep the order of the files"""
    split: str = option("969,30,1", needs=setting("data_path") | setting("data_args_path"))
    """proportions in which the documents of --data-path are split into training,
    validation, test"""
    data_cache_path: str = ""
    """directory for the sample indices and for the tokens of --streaming-data-path; empty:
    index_cache next to the first data prefix, stream_cache next to the first source"""
    dataloader_type: str = option("single", choices=("single", "cyclic"))
    """order of training samples: single cuts and shuffles as many epochs as the run needs
    and visits each sample once; cyclic cuts one epoch and repeats its samples, in a new
    order each time"""
    num_workers: int = 0
    """worker processes per rank that read data ahead; 0: read in the training process"""
    reset_position_ids: bool = False
    """restart positions after each end-of-document token"""
    reset_attention_mask: bool = False
    """do not attend across end-of-document tokens"""
    eod_mask_loss: bool = False
    """exclude from the loss the prediction of the token after an end-of-document token"""

    def __post_init__(self):
        require_choices(self)
        require_setting(
            self,
            "train_data_path",
            not (self.data_path and self.train_data_path),
            "only without --data-path",
            "Use one of the two.",
        )
        require_setting(
            self,
            "streaming_data_path",
            not (self.streaming_data_path and (self.data_path or self.train_data_path)),
            "only without --data-path and --train-data-path",
            "Validation has --valid-data-path.",
        )
        for name, others in _ONLY_WITHOUT.items():
            used = [flag_name(other) for other in others if getattr(self, other)]
            require_setting(
                self,
                name,
                not (getattr(self, name) and used),
                f"only without {' and '.join(used)}",
                "Use one of them.",
            )
        parse_named_sets(self.valid_sets)
        require_setting(
            self,
            "dataloader_type",
            not self.streaming_data_path or self.dataloader_type == "single",
            "single with --streaming-data-path",
            "Its order is set by --streaming-shuffle-samples.",
        )
        require_positive_integers(self, "streaming_shuffle_samples")
        require_not_negative(self, "num_workers")

    @property
    def named_valid_sets(self) -> dict[str, tuple[str, ...]]:
        """The words of each set of --valid-sets, by name."""
        return parse_named_sets(self.valid_sets)

    @property
    def eod_flags(self) -> list[str]:
        """Enabled flags that need end-of-document tokens in the data."""
        names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return [flag_name(name) for name in names if getattr(self, name)]


def parse_named_sets(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse `name=prefix name=weight prefix weight prefix ...` of --valid-sets.

    Returns:
        By name, in the order of the flag, the words of each set.

    Raises:
        ValueError: the first word has no name, a name comes twice, or a set is empty.
    """
    flag = "--valid-sets"
    sets: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        named = _SET_NAME.fullmatch(word)
        if named is None:
            require(
                bool(sets),
                f"the first word of {flag}",
                word,
                "name=prefix, with a name of letters, digits, '.', '_' and '-'",
            )
            current.append(word)
            continue
        name, first = named.groups()
        require(name not in sets, f"a name of {flag}", name, "each name once")
        current = sets[name] = [first] if first else []
    for name, members in sets.items():
        require(bool(members), f"the set {name} of {flag}", "", "one prefix or more")
    return {name: tuple(members) for name, members in sets.items()}
