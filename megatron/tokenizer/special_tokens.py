"""Special tokens in the text of a document: which ones a `tokenizer.json` would recognise there.

`tokenizers` can be told to treat the added token `</s>` as ordinary text, but its models know
nothing of special tokens: Unigram, WordPiece and WordLevel find every entry of their vocabulary
in the text, and BPE finds those that merges produce or, with `ignore_merges`, that equal a word.
Such an entry is renamed in the copy of the file that encodes. Then text is encoded as it would
be if the vocabulary did not have the entry.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator
from typing import Any

# Entries that stand for one byte of a character without an entry. They have to be found.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def tokens_in_text(spec: dict[str, Any], literals: Collection[str]) -> set[str]:
    """Return which of the special tokens can be the encoding of a part of a text.

    Args:
        spec: content of a `tokenizer.json`.
        literals: the special tokens.
    """
    model = spec["model"]
    ordinary = {token["content"] for token in spec["added_tokens"] if not token["special"]}
    found = ordinary & set(literals)
    entries = set(literals) & _vocabulary(model)
    if model.get("byte_fallback"):
        entries = {token for token in entries if not _BYTE_TOKEN.fullmatch(token)}
    if model["type"] == "BPE" and not model["ignore_merges"]:
        products = {product for _, _, product in _merges(model)}
        entries = {t for t in entries if t in products or _is_symbol(model, t)}
    return found | entries


def hide_tokens(spec: dict[str, Any], literals: Collection[str]) -> dict[str, Any]:
    """Return a copy of a `tokenizer.json` in which no text is encoded to the given tokens.

    Their ids remain in use, by names of 128 random bits, which no text contains.

    Raises:
        ValueError: a token is a character that BPE would leave out of the text without it.
    """
    model = spec["model"]
    if model["type"] == "BPE" and not model["unk_token"] and not model["byte_fallback"]:
        for literal in sorted(literals):
            if _is_symbol(model, literal):
                raise ValueError(
                    f"the special token {literal!r} is also the only token for a character of "
                    "text; allowed: one that is not. Set --eod-token to another token if it is "
                    "that, or rename it in the tokenizer's files"
                )
    names = {literal: secrets.token_hex(16) for literal in literals}
    model = dict(model)
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right, product in _merges(model)
            if names.keys().isdisjoint((left, right, product))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = []
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token = {**token, "content": names[token["content"]], "special": True}
        added.append(token)
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def unknown_token(spec: dict[str, Any]) -> str | None:
    """Return the token that stands for text without an entry in the vocabulary, if any."""
    model = spec["model"]
    if model["type"] != "Unigram":
        return model.get("unk_token")
    if model["unk_id"] is None:
        return None
    return model["vocab"][model["unk_id"]][0]


def _vocabulary(model: dict[str, Any]) -> set[str]:
    if model["type"] == "Unigram":
        return {token for token, _ in model["vocab"]}
    return set(model["vocab"])


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two parts of each merge, and its product."""
    prefix = model["continuing_subword_prefix"] or ""
    for left, right in model["merges"]:
        yield left, right, left + right[len(prefix) :]


def _is_symbol(model: dict[str, Any], token: str) -> bool:
    """Whether a token is what BPE starts from, a single character."""
    stem = token.removeprefix(model["continuing_subword_prefix"] or "")
    return len(stem.removesuffix(model["end_of_word_suffix"] or "")) <= 1
