"""Builds tokenizers by Megatron's names.

A new tokenizer is a file in this folder, a line in TOKENIZER_BUILDERS, and its name among the
choices of `--tokenizer-type` (megatron/config/tokenizer.py).

Text is untrusted: the literal of a special token (`<|endoftext|>`, `</s>`) inside a document
is encoded as ordinary text and never becomes the special id; callers add the ids of special
tokens. Two exceptions come with the tokenizer's files: the token for unknown text, and
user-defined symbols of a SentencePiece model, unless they end documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.byte import build_byte
from megatron.tokenizer.gpt2_bpe import build_gpt2_bpe
from megatron.tokenizer.huggingface import build_huggingface
from megatron.tokenizer.null import build_null
from megatron.tokenizer.sentencepiece_model import build_llama2, build_sentencepiece
from megatron.tokenizer.tiktoken_bpe import build_tiktoken

# Functions of the configuration and the number of threads (0: one per core).
TOKENIZER_BUILDERS: dict[str, Callable[[TokenizerConfig, int], Tokenizer]] = {
    "GPT2BPETokenizer": build_gpt2_bpe,
    "HuggingFaceTokenizer": build_huggingface,
    "SentencePieceTokenizer": build_sentencepiece,
    "Llama2Tokenizer": build_llama2,
    "TiktokenTokenizer": build_tiktoken,
    "NullTokenizer": build_null,
    "ByteTokenizer": build_byte,
}


def build_tokenizer(config: TokenizerConfig, threads: int = 0) -> Tokenizer:
    """Build the configured tokenizer.

    Args:
        threads: threads of the encoding library; 0: one per core. Takes effect before the
            first text of the process is encoded.
    Raises:
        FileNotFoundError: a required file is not set or does not exist.
        ValueError: the tokenizer type is unknown, a file is malformed, a package is not
            installed, or --eod-token is not in the vocabulary.
    """
    if config.tokenizer_type not in TOKENIZER_BUILDERS:
        raise ValueError(
            f"--tokenizer-type is {config.tokenizer_type!r}; allowed: "
            f"{' '.join(TOKENIZER_BUILDERS)}"
        )
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by gigatoken and tokenizers
    return TOKENIZER_BUILDERS[config.tokenizer_type](config, threads)
