"""Config section `data`: token files, text streams and how samples are cut from them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    flag_name,
    option,
    require_choices,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.needs import setting


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
    split: str = option("969,30,1", needs=setting("data_path"))
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
    def eod_flags(self) -> list[str]:
        """Enabled flags that need end-of-document tokens in the data."""
        names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return [flag_name(name) for name in names if getattr(self, name)]
