"""Config section `tokenizer`: the kind of tokenizer and its files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require_choices
from megatron.config.needs import setting

TOKENIZERS = (
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Llama2Tokenizer",
    "TiktokenTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
)
_WITH_MODEL = tuple(
    kind for kind in TOKENIZERS if kind not in ("GPT2BPETokenizer", "ByteTokenizer")
)
"""Kinds of tokenizers with a --tokenizer-model"""
_WITH_EOD_TOKEN = tuple(
    kind for kind in TOKENIZERS if kind not in ("NullTokenizer", "ByteTokenizer")
)
"""Kinds of tokenizers with a vocabulary of texts"""


@dataclass(frozen=True)
class TokenizerConfig:
    """Kind of tokenizer, and its files."""

    tokenizer_type: str = option("GPT2BPETokenizer", choices=TOKENIZERS)
    """kind of tokenizer"""
    vocab_file: str = option("", needs=setting("tokenizer_type", "GPT2BPETokenizer"))
    """vocab.json (GPT2BPETokenizer)"""
    merge_file: str = option("", needs=setting("tokenizer_type", "GPT2BPETokenizer"))
    """merges.txt (GPT2BPETokenizer)"""
    tokenizer_model: str = option("", needs=setting("tokenizer_type", *_WITH_MODEL))
    """tokenizer.json or its directory (HuggingFaceTokenizer), .model file
    (SentencePieceTokenizer, Llama2Tokenizer), .tiktoken file (TiktokenTokenizer), or the
    vocabulary size (NullTokenizer)"""
    eod_token: str = option("", needs=setting("tokenizer_type", *_WITH_EOD_TOKEN))
    """token of the vocabulary that ends documents; empty: the one that the tokenizer's files
    name, or else <|endoftext|>, </s> or another common one"""

    def __post_init__(self):
        require_choices(self)

    @property
    def lacks_files(self) -> bool:
        """Whether the tokenizer needs a file or a size, and none is named."""
        if self.tokenizer_type == "ByteTokenizer":
            return False
        return not (self.vocab_file or self.merge_file or self.tokenizer_model)
