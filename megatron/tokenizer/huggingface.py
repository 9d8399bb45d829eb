"""Tokenizers from a Hugging Face tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.tokenizer.base import Tokenizer, _file, digest, find_eod, one_line
from megatron.tokenizer.fast_bpe import FastBPE


class HuggingFaceTokenizer(FastBPE):
    """A `tokenizers.Tokenizer`; its own truncation, padding and special-token template are switched off.

    Args:
        name: the `--tokenizer-type`.
        tokenizer: changed in place.
        source: what the vocabulary came from, for messages.
        eod_token: literal of the end-of-document token when the files name it.
    """

    def __init__(
        self,
        name: str,
        tokenizer: tokenizers.Tokenizer,
        source: str,
        eod_token: str | None = None,
    ):
        import gigatoken

        self.name = name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # literals of special tokens are text
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = digest(
            sorted((i, token) for token, i in vocabulary.items()), spec["model"].get("merges")
        )
        self.eod = find_eod(vocabulary.get, source, eod_token)
        # gigatoken has no switch for it, but knows only the special tokens it is given
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
        self._fast = self._load_fast(lambda: gigatoken.Tokenizer.from_json(json.dumps(spec)))

    def _reference(self, texts: list[str]) -> list[list[int]]:
        return [
            e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _huggingface(model: str) -> Tokenizer:
    """A tokenizer.json, or the folder it is in, whose tokenizer_config.json may name the end-of-document token."""
    from tokenizers import Tokenizer as Backend

    path = Path(model) / "tokenizer.json" if model and Path(model).is_dir() else Path(model)
    file = _file(
        model and str(path),
        "--tokenizer-model",
        "HuggingFaceTokenizer",
        "tokenizer.json or its folder",
    )
    settings = path.parent / "tokenizer_config.json"
    eod_token = None
    try:
        if path.name == "tokenizer.json" and settings.is_file():
            eod_token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        backend = Backend.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"--tokenizer-model {model} is not a HuggingFace tokenizer ({one_line(error)})"
        ) from None
    if isinstance(eod_token, dict):  # an AddedToken spelt out
        eod_token = eod_token.get("content")
    return HuggingFaceTokenizer("HuggingFaceTokenizer", backend, file, eod_token)
