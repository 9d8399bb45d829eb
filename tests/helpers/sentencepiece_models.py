"""Small SentencePiece models."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXACT = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
"""Options of a model that encodes every text, and decodes it to the same text"""


def train(path: Path, sentences: Iterable[str], vocab_size: int, **options: Any) -> Path:
    """Train a BPE model, and return the path of its file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path
