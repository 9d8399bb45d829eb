"""Tokenizers from SentencePiece models."""

from __future__ import annotations

import numpy as np

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import (
    Tokenizer,
    digest,
    find_eod,
    flatten,
    one_line,
    require_file,
)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    Args:
        name: the `--tokenizer-type`.
        path: path of the model.
        threads: number of encoding threads; -1: one per core.
        bos: whether every text starts with the begin-of-sequence id (Llama 2).
    Raises:
        ValueError: the file is not a model, or lacks a special token.
    """

    def __init__(self, name: str, path: str, threads: int, bos: bool):
        import sentencepiece

        self.name = name
        self._threads = threads
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--tokenizer-model {path} is not a SentencePiece model ({one_line(error)})"
            ) from None
        self._model = model
        self.vocab_size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self.fingerprint = digest(
            [(i, piece, model.get_score(i)) for i, piece in enumerate(pieces)]
        )
        eod = None
        if model.eos_id() >= 0:
            eod = pieces[model.eos_id()]
        id_of_piece = {piece: i for i, piece in enumerate(pieces)}
        self.eod = find_eod(id_of_piece.get, path, eod)
        if bos:
            self.bos = self._bos_id(path)

    def _bos_id(self, path: str) -> int:
        bos = self._model.bos_id()
        if bos < 0:
            raise ValueError(
                f"--tokenizer-model {path} has no begin-of-sequence token, which "
                "Llama2Tokenizer puts before every document. Use SentencePieceTokenizer"
            )
        return bos

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        add_bos = self.bos is not None
        return flatten(self._model.encode(texts, add_bos=add_bos, num_threads=self._threads))

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def build_sentencepiece(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build a SentencePiece tokenizer without a begin-of-sequence token; raises as the class."""
    return _build(config, threads, bos=False)


def build_llama2(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build a SentencePiece tokenizer that starts each text with the begin-of-sequence token."""
    return _build(config, threads, bos=True)


def _build(config: TokenizerConfig, threads: int, bos: bool) -> Tokenizer:
    kind = config.tokenizer_type
    path = require_file(config.tokenizer_model, "--tokenizer-model", kind, "the .model file")
    return SentencePieceTokenizer(kind, path, threads or -1, bos)
