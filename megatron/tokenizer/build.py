"""Tokenizers by Megatron's names, behind one interface: text -> ids, many texts -> one flat array and lengths.

Text is untrusted: the literal string of a special token (`<|endoftext|>`, `</s>`) in a document encodes as the ordinary
text it is and never becomes the special id; ids of special tokens are added by the caller. Two limits that come with
the file and not from here: a HuggingFace tokenizer without merges (WordLevel) whose vocabulary holds the literal as a
word, and user-defined symbols of a SentencePiece model.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron.config.schema import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, _file
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.gpt2_bpe import _gpt2
from megatron.tokenizer.huggingface import _huggingface
from megatron.tokenizer.null import LARGEST_NULL, NullTokenizer
from megatron.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron.tokenizer.tiktoken_bpe import TiktokenTokenizer

if TYPE_CHECKING:
    pass


def build_tokenizer(config: TokenizerConfig, threads: int = 0) -> Tokenizer:
    """The tokenizer that the flags name.

    Args:
        threads: threads of the encoding library; 0: all cores. Takes effect before the first text of the process.
    Raises:
        FileNotFoundError: a file it needs is not given or not there.
        ValueError: a file is malformed, or names no end-of-document token.
    """
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by gigatoken and tokenizers
    kind, model = config.tokenizer_type, config.tokenizer_model
    if kind == "GPT2BPETokenizer":
        return _gpt2(config)
    if kind == "HuggingFaceTokenizer":
        return _huggingface(model)
    if kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        path = _file(model, "--tokenizer-model", kind, "the .model file")
        return SentencePieceTokenizer(kind, path, threads or -1, bos=kind == "Llama2Tokenizer")
    if kind == "TiktokenTokenizer":
        return TiktokenTokenizer(_file(model, "--tokenizer-model", kind, "the .tiktoken file"))
    if kind == "NullTokenizer":
        if not (
            model.isascii()
            and model.isdecimal()
            and len(model) < 20
            and 0 < int(model) <= LARGEST_NULL
        ):
            raise ValueError(
                f"--tokenizer-model is {model!r}; allowed for NullTokenizer: the vocabulary size, 1 to "
                f"{LARGEST_NULL} (ids are stored as int32)"
            )
        return NullTokenizer(int(model))
    return ByteTokenizer()
