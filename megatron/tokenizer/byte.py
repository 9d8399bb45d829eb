"""Tokenizer whose tokens are UTF-8 bytes."""

from __future__ import annotations

import numpy as np

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, digest, refuse_eod_token


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens; the end-of-document id is 256 and decodes to nothing."""

    name = "ByteTokenizer"
    vocab_size = 257
    eod = 256

    def __init__(self):
        self.fingerprint = digest([self.name])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
        return ids, np.array([len(d) for d in data], np.int64)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def build_byte(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build the byte tokenizer, which needs no files and no threads.

    Raises:
        ValueError: --eod-token is set.
    """
    refuse_eod_token(config, ByteTokenizer.eod)
    return ByteTokenizer()
