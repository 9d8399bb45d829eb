"""UTF-8 bytes as tokens."""

from __future__ import annotations

import numpy as np

from megatron.tokenizer.base import Tokenizer, digest


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; the end-of-document id is 256 and decodes to nothing."""

    name = "ByteTokenizer"
    vocab_size, eod = 257, 256

    def __init__(self):
        self.fingerprint = digest([self.name])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
        return ids, np.array([len(d) for d in data], np.int64)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")
