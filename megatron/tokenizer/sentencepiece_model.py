"""SentencePiece models."""

from __future__ import annotations

import numpy as np

from megatron.tokenizer.base import Tokenizer, digest, find_eod, flatten, one_line


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; with `bos`, every text starts with the begin-of-sequence id (Llama 2).

    Raises:
        ValueError: the file is no model, or lacks the special tokens.
    """

    def __init__(self, name: str, path: str, threads: int, bos: bool):
        import sentencepiece

        self.name, self._threads = name, threads
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--tokenizer-model {path} is not a SentencePiece model ({one_line(error)})"
            ) from None
        self.vocab_size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self.fingerprint = digest([(i, p, model.get_score(i)) for i, p in enumerate(pieces)])
        eod = pieces[model.eos_id()] if model.eos_id() >= 0 else None
        self.eod = find_eod({p: i for i, p in enumerate(pieces)}.get, path, eod)
        if bos and model.bos_id() < 0:
            raise ValueError(
                f"--tokenizer-model {path} has no begin-of-sequence token, which Llama2Tokenizer puts "
                f"before every document. Use SentencePieceTokenizer"
            )
        self.bos = model.bos_id() if bos else None

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(
            self._model.encode(texts, add_bos=self.bos is not None, num_threads=self._threads)
        )

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)
