"""OpenAI's encodings from .tiktoken files."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from megatron.tokenizer.base import digest, one_line
from megatron.tokenizer.fast_bpe import FastBPE

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTION
    + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTION
    + "?"
)

TIKTOKEN = {  # a .tiktoken file has ranks only: file name -> (split regex, its name in gigatoken, special tokens)
    "r50k_base": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "gpt2",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": (
        CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
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
    "o200k_base": (
        CASED_WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "o200k",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


class TiktokenTokenizer(FastBPE):
    """One of OpenAI's encodings from its `.tiktoken` file of ranks, recognised by the file's name.

    Raises:
        ValueError: tiktoken is not installed, the encoding is unknown, or the file is malformed.
    """

    name = "TiktokenTokenizer"

    def __init__(self, path: str):
        try:
            import tiktoken
        except ImportError:
            raise ValueError(
                f"--tokenizer-type {self.name} needs the package tiktoken, which is not installed. "
                f"Install it: pip install tiktoken"
            ) from None
        import gigatoken

        stem = Path(path).stem
        if stem not in TIKTOKEN:
            raise ValueError(
                f"--tokenizer-model {path} has no known encoding in its name; allowed: "
                f"{', '.join(f'{n}.tiktoken' for n in TIKTOKEN)}. Rename the file to its encoding"
            )
        pattern, scheme, specials = TIKTOKEN[stem]
        try:
            ranks = {
                base64.b64decode(token, validate=True): int(rank)
                for token, rank in (
                    line.split() for line in Path(path).read_bytes().splitlines() if line
                )
            }
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"--tokenizer-model {path} is not a .tiktoken file ({one_line(error)})"
            ) from None
        self._encoding = tiktoken.Encoding(
            stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = self._encoding.n_vocab
        self.eod = specials["<|endoftext|>"]
        named = [(rank, token.hex()) for token, rank in ranks.items()] + [
            (i, token) for token, i in specials.items()
        ]
        self.fingerprint = digest(sorted(named))
        self._fast = self._load_fast(
            lambda: gigatoken.Tokenizer.from_tiktoken(path, scheme, {})
        )

    def _reference(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)
