"""Tokenizers from a Hugging Face tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.base import Tokenizer, digest, find_eod, one_line, require_file
from megatron.tokenizer.fast_bpe import FastBPE

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(FastBPE):
    """A `tokenizers.Tokenizer` without truncation, padding and special-token templates.

    Args:
        name: the `--tokenizer-type`.
        tokenizer: changed in place.
        source: file of the vocabulary, for messages.
        eod_token: literal of the end-of-document token, if the files name it.
    Raises:
        ValueError: the vocabulary has no end-of-document token.
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
        tokenizer.encode_special_tokens = True  # literals of special tokens are ordinary text
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        tokens_by_id = sorted((i, token) for token, i in vocabulary.items())
        self.fingerprint = digest(tokens_by_id, spec["model"].get("merges"))
        self.eod = find_eod(vocabulary.get, source, eod_token)
        # gigatoken always recognises special tokens in text, but only those it is given.
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
        self._fast = self._load_fast(lambda: gigatoken.Tokenizer.from_json(json.dumps(spec)))

    def _reference(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def build_huggingface(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build a tokenizer from tokenizer.json or the directory that contains it.

    A tokenizer_config.json in that directory may name the end-of-document token.

    Raises:
        FileNotFoundError: the file is not set or does not exist.
        ValueError: a file is malformed, or the vocabulary has no end-of-document token.
    """
    from tokenizers import Tokenizer as Backend

    model = config.tokenizer_model
    path = Path(model)
    if model and path.is_dir():
        path = path / "tokenizer.json"
    file = require_file(
        model and str(path),
        "--tokenizer-model",
        "HuggingFaceTokenizer",
        "tokenizer.json or its folder",
    )
    try:
        eod_token = _named_eod(path)
        backend = Backend.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"--tokenizer-model {model} is not a HuggingFace tokenizer ({one_line(error)})"
        ) from None
    return HuggingFaceTokenizer("HuggingFaceTokenizer", backend, file, eod_token)


def _named_eod(path: Path) -> str | None:
    """Return the end-of-sequence token of the tokenizer_config.json next to a tokenizer.json."""
    settings = path.parent / "tokenizer_config.json"
    if path.name != "tokenizer.json" or not settings.is_file():
        return None
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    if isinstance(token, dict):  # a serialised AddedToken
        return token.get("content")
    return token
