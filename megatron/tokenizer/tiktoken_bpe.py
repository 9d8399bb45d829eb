"""OpenAI's encodings from .tiktoken files."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from megatron.config.tokenizer import TokenizerConfig
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import Tokenizer, digest, find_eod, one_line, require_file
from megatron.tokenizer.fast_bpe import FastBPE


@dataclass(frozen=True)
class _Encoding:
    """What a .tiktoken file, which holds ranks only, does not say."""

    pattern: str
    """regular expression that splits text into words"""
    gigatoken_scheme: str
    """name of the encoding in gigatoken"""
    special_tokens: dict[str, int]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWERCASE_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
)
_UPPERCASE_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)

# Encodings by the stem of the file's name.
_ENCODINGS = {
    "r50k_base": _Encoding(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "gpt2",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": _Encoding(
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "cl100k",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": _Encoding(
        f"{_LOWERCASE_WORD}{_CONTRACTION}?|{_UPPERCASE_WORD}{_CONTRACTION}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "o200k",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


class TiktokenTokenizer(FastBPE):
    """One of OpenAI's encodings from its `.tiktoken` file, recognised by the file's name.

    Args:
        eod_token: special token that ends documents; empty: `<|endoftext|>`.
    Raises:
        ValueError: tiktoken is not installed, the encoding is unknown, the file is malformed,
            or `eod_token` is none of the special tokens.
    """

    name = "TiktokenTokenizer"

    def __init__(self, path: str, eod_token: str = ""):
        tiktoken = import_optional("tiktoken", "tiktoken", f"--tokenizer-type {self.name}")
        stem = Path(path).stem
        if stem not in _ENCODINGS:
            known = ", ".join(f"{name}.tiktoken" for name in _ENCODINGS)
            raise ValueError(
                f"--tokenizer-model {path} has no known encoding in its name; allowed: {known}. "
                "Rename the file to its encoding"
            )
        encoding = _ENCODINGS[stem]
        special_tokens = encoding.special_tokens
        ranks = _read_ranks(path)
        self._encoding = tiktoken.Encoding(
            stem,
            pat_str=encoding.pattern,
            mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )
        self.vocab_size = self._encoding.n_vocab
        self.eod = special_tokens[find_eod(special_tokens, path, eod_token)]
        tokens_by_id = [(rank, token.hex()) for token, rank in ranks.items()]
        tokens_by_id += [(i, token) for token, i in special_tokens.items()]
        self.fingerprint = digest(sorted(tokens_by_id))
        scheme = encoding.gigatoken_scheme
        self._fast = self._load_fast(
            lambda gigatoken: gigatoken.Tokenizer.from_tiktoken(path, scheme, {})
        )

    def _reference(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def build_tiktoken(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build one of OpenAI's encodings; raises as `TiktokenTokenizer`, or FileNotFoundError."""
    path = require_file(
        config.tokenizer_model,
        "--tokenizer-model",
        config.tokenizer_type,
        "the .tiktoken file",
    )
    return TiktokenTokenizer(path, config.eod_token)


def _read_ranks(path: str) -> dict[bytes, int]:
    """Return the rank of each token in a .tiktoken file."""
    ranks = {}
    try:
        for line in Path(path).read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"--tokenizer-model {path} is not a .tiktoken file ({one_line(error)})"
        ) from None
    return ranks
