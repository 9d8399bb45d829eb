"""The class of each token of a text, and how a token's text is shown."""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Sequence

TOKEN_CLASSES = (
    "word start",
    "word continuation",
    "keyword",
    "number",
    "punctuation or symbol",
    "whitespace",
    "bytes or special token",
)
"""Names of the classes, by number"""

_WORD_START = 0
_CONTINUATION = 1
_KEYWORD = 2
_NUMBER = 3
_PUNCTUATION = 4
_WHITESPACE = 5
_NO_TEXT = 6

_REPLACEMENT = "\ufffd"
_DOTTED_CIRCLE = "\u25cc"
_LONGEST_SHOWN = 80
"""Characters of a token that are shown"""

# Keywords of other languages than Python.
_OTHER_KEYWORDS = """
async await boolean catch const constexpr default define do double elif else endif enum extern
final float fn func function goto impl include int interface let long match mut namespace new
null nullptr package private protected pub public return short signed sizeof static struct super
switch template this throw throws trait try typedef typename union unsigned use using var virtual
void volatile while
"""
KEYWORDS = frozenset(keyword.kwlist) | frozenset(_OTHER_KEYWORDS.split())
"""Those that are English words, such as "for", are counted in prose as well"""


def token_classes(texts: Sequence[str], starts: Sequence[int] = (0,)) -> list[int]:
    """Return the class of each token, an index into `TOKEN_CLASSES`.

    A token with a letter starts a word unless it follows a letter, digit or underscore directly
    and begins with one. A keyword is one token that is a complete word.

    Args:
        texts: the text that each token adds, see `megatron.analysis.record_texts.token_texts`.
        starts: the first token of each document.
    """
    first_tokens = set(starts)
    classes = []
    before = ""
    for number, text in enumerate(texts):
        if number in first_tokens:
            before = ""
        classes.append(_class_of(text, before))
        before = text or before
    for number, text in enumerate(texts):
        if classes[number] != _WORD_START or text.strip() not in KEYWORDS:
            continue
        is_last = number + 1 == len(texts) or number + 1 in first_tokens
        if is_last or text[-1].isspace() or not _continues(texts[number + 1]):
            classes[number] = _KEYWORD
    return classes


def _class_of(text: str, before: str) -> int:
    """Return the class of a token by its text and that of the token before it."""
    visible = text.replace(_REPLACEMENT, "")
    if not visible:
        return _NO_TEXT
    if visible.isspace():
        return _WHITESPACE
    if any(map(_is_letter, visible)):
        if _continues(text) and before and _is_word_character(before[-1]):
            return _CONTINUATION
        return _WORD_START
    if any(character.isnumeric() for character in visible):
        return _NUMBER
    return _PUNCTUATION


def _continues(text: str) -> bool:
    """Return whether a text continues a word that the text before it ended with."""
    return bool(text) and _is_word_character(text[0])


def _is_letter(character: str) -> bool:
    return character.isalpha() or unicodedata.category(character).startswith("M")


def _is_word_character(character: str) -> bool:
    return character == "_" or character.isnumeric() or _is_letter(character)


def visible_text(text: str) -> str:
    """Return what is shown for a token's text: nothing that is invisible or moves other text.

    Line breaks and tabs have a symbol before them. Other control and format characters, such as
    those that change the direction of text, are shown by their names or numbers.
    """
    shown = text[:_LONGEST_SHOWN]
    if len(text) > _LONGEST_SHOWN:
        shown += "\u2026"
    if shown and unicodedata.category(shown[0]).startswith("M"):
        shown = _DOTTED_CIRCLE + shown  # it would combine with what is before the token
    return "".join(map(_visible_character, shown)) or "\u00b7"


def _visible_character(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u21e5\t"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"):
        return f"\u27e8U+{code:04X}\u27e9"
    return character
