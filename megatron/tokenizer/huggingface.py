"""Tokenizers from a Hugging Face tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.tokenizer import TokenizerConfig
from megatron.log import warn_on_rank0
from megatron.tokenizer.base import Tokenizer, digest, find_eod, one_line, require_file
from megatron.tokenizer.fast_bpe import FastBPE
from megatron.tokenizer.special_tokens import hide_tokens, tokens_in_text, unknown_token

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(FastBPE):
    """A `tokenizers.Tokenizer` without truncation, padding and special-token templates.

    Args:
        name: the `--tokenizer-type`.
        tokenizer: changed in place.
        source: file of the vocabulary, for messages.
        eod_flag: value of --eod-token; empty: not set.
        eod_token: literal of the end-of-document token, if the files name it.
    Raises:
        ValueError: the flag names a token that is not in the vocabulary, or that stands for
            unknown text.
    """

    def __init__(
        self,
        name: str,
        tokenizer: tokenizers.Tokenizer,
        source: str,
        eod_flag: str = "",
        eod_token: str | None = None,
    ):
        self.name = name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        tokens_by_id = sorted((i, token) for token, i in vocabulary.items())
        self.fingerprint = digest(tokens_by_id, spec["model"].get("merges"))
        literal = find_eod(vocabulary, source, eod_flag, eod_token)
        self.eod = vocabulary.get(literal)
        if eod_flag and eod_flag == unknown_token(spec):
            raise ValueError(
                f"--eod-token is {eod_flag!r}, which stands for unknown text in {source}; "
                "allowed: a token that no text is encoded to"
            )
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        if literal is not None:
            special.add(literal)
        self._build_encoders(spec, special)

    def _build_encoders(self, spec: dict[str, Any], special: set[str]) -> None:
        """Build the reference and the fast encoder, to which special tokens are ordinary text."""
        self._encoder = self._tokenizer
        hidden = tokens_in_text(spec, special)
        if hidden:
            spec = hide_tokens(spec, hidden)
            self._encoder = type(self._tokenizer).from_str(json.dumps(spec))
        self._encoder.encode_special_tokens = True
        # gigatoken always recognises special tokens in text, but only those it is given.
        added = [token for token in spec["added_tokens"] if not token["special"]]
        single_words = [token["content"] for token in added if token["single_word"]]
        if single_words:
            warn_on_rank0(
                "gigatoken ignores that the token %r is recognised as a separate word only: "
                "using the reference implementation of %s, which is much slower",
                single_words[0],
                self.name,
            )
            return
        content = json.dumps({**spec, "added_tokens": added})
        self._fast = self._load_fast(
            lambda gigatoken: gigatoken.Tokenizer.from_json(content),
        )

    def _reference(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"{self.name} cannot encode a text ({one_line(error)}). Add a token for unknown "
                "text to the vocabulary, or use another tokenizer"
            ) from None
        return [encoding.ids for encoding in encodings]

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def literal(self, token: int) -> str:
        """Return the text of a token in the vocabulary, such as <|endoftext|>."""
        return self._tokenizer.id_to_token(token)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def build_huggingface(config: TokenizerConfig, threads: int) -> Tokenizer:
    """Build a tokenizer from tokenizer.json or the directory that contains it.

    A tokenizer_config.json in that directory may name the end-of-document token.

    Raises:
        FileNotFoundError: the file is not set or does not exist.
        ValueError: a file is malformed, or --eod-token is not in the vocabulary.
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
    return HuggingFaceTokenizer(
        config.tokenizer_type, backend, file, config.eod_token, eod_token
    )


def _named_eod(path: Path) -> str | None:
    """Return the end-of-sequence token of the tokenizer_config.json next to a tokenizer.json."""
    settings = path.parent / "tokenizer_config.json"
    if path.name != "tokenizer.json" or not settings.is_file():
        return None
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    if isinstance(token, dict):  # a serialised AddedToken
        return token.get("content")
    return token
