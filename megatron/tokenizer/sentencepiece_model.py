"""Tokenizers from SentencePiece models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron.config.tokenizer import TokenizerConfig
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import (
    Tokenizer,
    digest,
    find_eod,
    flatten,
    one_line,
    require_file,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    Args:
        name: the `--tokenizer-type`.
        path: path of the model.
        threads: number of encoding threads; -1: one per core.
        bos: whether every text starts with the begin-of-sequence id (Llama 2).
        eod_token: value of --eod-token; empty: not set.
    Raises:
        ValueError: the package is not installed, the file is not a model, or lacks a special
            token.
    """

    def __init__(self, name: str, path: str, threads: int, bos: bool, eod_token: str = ""):
        sentencepiece = import_optional(
            "sentencepiece", "sentencepiece", f"--tokenizer-type {name}"
        )
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
        named = None
        if model.eos_id() >= 0:
            named = pieces[model.eos_id()]
        id_of_piece = {piece: i for i, piece in enumerate(pieces)}
        self.eod = id_of_piece.get(find_eod(id_of_piece, path, eod_token, named))
        self._encoder = self._build_encoder(path)
        if bos:
            self.bos = self._bos_id(path)

    def _build_encoder(self, path: str) -> SentencePieceProcessor:
        """Return the model in which no text is encoded to the end-of-document id.

        Only control symbols are never found in text, so that piece becomes one.
        """
        eod = self.eod
        if eod is None or self._model.is_control(eod):
            return self._model
        piece = self._model.id_to_piece(eod)
        if self._model.is_unknown(eod) or self._model.is_byte(eod):
            raise ValueError(
                f"--eod-token is {piece!r}, which stands for unknown text in {path}; allowed: a "
                "piece that no text is encoded to"
            )
        models = import_optional(
            "sentencepiece.sentencepiece_model_pb2",
            "sentencepiece",
            f"the end-of-document token {piece!r} of {path}, which is no control symbol,",
        )
        content = models.ModelProto.FromString(self._model.serialized_model_proto())
        content.pieces[eod].type = models.ModelProto.SentencePiece.CONTROL
        return type(self._model)(model_proto=content.SerializeToString())

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
        return flatten(self._encoder.encode(texts, add_bos=add_bos, num_threads=self._threads))

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
    return SentencePieceTokenizer(kind, path, threads or -1, bos, config.eod_token)
