"""Config section `tokenizer`: the kind of tokenizer and its files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require_choices

TOKENIZERS = (
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Llama2Tokenizer",
    "TiktokenTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
)


@dataclass(frozen=True)
class TokenizerConfig:
    """Kind of tokenizer, and its files."""

    tokenizer_type: str = option("GPT2BPETokenizer", choices=TOKENIZERS)
    """kind of tokenizer"""
    vocab_file: str = ""
    """vocab.json (GPT2BPETokenizer)"""
    merge_file: str = ""
    """merges.txt (GPT2BPETokenizer)"""
    tokenizer_model: str = ""
    """tokenizer.json or its directory (HuggingFaceTokenizer), .model file
    (SentencePieceTokenizer, Llama2Tokenizer), .tiktoken file (TiktokenTokenizer), or the
    vocabulary size (NullTokenizer)"""
    eod_token: str = ""
    """token of the vocabulary that ends documents; empty: the one that the tokenizer's files
    name, or else <|endoftext|>, </s> or another common one"""

    def __post_init__(self):
        require_choices(self)
