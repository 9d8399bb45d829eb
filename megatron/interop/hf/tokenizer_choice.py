"""The tokenizer of a Hugging Face folder as one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.config.fields import require
from megatron.config.tokenizer import TokenizerConfig
from megatron.log import get_logger
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer


def choose_tokenizer(
    folder: Path, content: Mapping[str, Any], without_files: TokenizerConfig
) -> TokenizerConfig:
    """Choose the tokenizer for the files of a folder.

    Args:
        content: Content of its config.json.
        without_files: Tokenizer that config.json names, which counts if it needs no files.

    Returns:
        Its configuration; that of a NullTokenizer, which reads and writes ids, if there are no
        files.
    """
    if (folder / "tokenizer.json").is_file():
        path = str(folder / "tokenizer.json")
        return TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=path)
    if (folder / "tokenizer.model").is_file():
        path = str(folder / "tokenizer.model")
        return TokenizerConfig("Llama2Tokenizer", tokenizer_model=path)
    vocab = folder / "vocab.json"
    merges = folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return TokenizerConfig(
            "GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges)
        )
    if not without_files.lacks_files:
        return without_files
    get_logger().info(
        "%s has no files of a tokenizer: the tokenizer is NullTokenizer, whose text is ids",
        folder,
    )
    # The end-of-document id of a NullTokenizer follows its ordinary ids.
    ordinary_ids = int(content["vocab_size"]) - 1
    return TokenizerConfig("NullTokenizer", tokenizer_model=str(ordinary_ids))


def build_checked(config: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Build a tokenizer whose ids a model's vocabulary contains.

    Raises:
        ValueError: A file is malformed, or the vocabulary is too small.
        FileNotFoundError: A file does not exist.
    """
    tokenizer = build_tokenizer(config)
    require(
        tokenizer.vocab_size <= vocab_size,
        "config.json: vocab_size",
        vocab_size,
        f"at least the {tokenizer.vocab_size} ids of the tokenizer",
        "Resize the model's embeddings with transformers first.",
    )
    return tokenizer


def moved(config: TokenizerConfig, folder: Path) -> TokenizerConfig:
    """Return a tokenizer's configuration whose files are in another folder."""
    paths = {}
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        value = getattr(config, name)
        if value and config.tokenizer_type != "NullTokenizer":
            paths[name] = str(folder / Path(value).name)
    return replace(config, **paths)
