"""Classes of tokens, and texts that are shown without invisible characters."""

from __future__ import annotations

import unicodedata

import pytest

from megatron.analysis.record_texts import token_texts
from megatron.analysis.token_classes import TOKEN_CLASSES, token_classes, visible_text
from megatron.config.schema import TokenizerConfig
from megatron.tokenizer.build import build_tokenizer


def names(texts: list[str], starts: tuple[int, ...] = (0,)) -> list[str]:
    return [TOKEN_CLASSES[number] for number in token_classes(texts, starts)]


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["Hel", "lo", " wor", "ld"], "start continuation start continuation"),
        (["def", " f", "(", "x", "):", "\n"], "keyword start symbol start symbol whitespace"),
        (["def", "ine"], "start continuation"),
        ([" return", " 12", "3rd"], "keyword number continuation"),
        (["_", "name", "e\u0301", "\u0301"], "symbol continuation continuation continuation"),
        (["", "\u65e5", "\ufffd", "\u672c"], "token start token start"),
        ([" ", "\t\n", "\U0001f642", "\u0663"], "whitespace whitespace symbol number"),
        (["if "], "keyword"),
    ],
)
def test_classes_follow_their_definition(texts, expected):
    """Expected are the last words of the names."""
    assert [name.split()[-1] for name in names(texts)] == expected.split()


def test_document_begins_a_word():
    """Neither a continuation nor a keyword crosses the boundary of documents."""
    assert names(["for", "mat"], (0, 1)) == ["keyword", "word start"]


@pytest.mark.parametrize(
    "text, shown",
    [
        (" a b", " a b"),
        ("\n", "\u21b5\n"),
        ("\t", "\u21e5\t"),
        ("\x00\x1b\r", "\u2400\u241b\u240d"),
        ("a\u202eb", "a\u27e8U+202E\u27e9b"),
        ("\u200b\u2028\ud800", "\u27e8U+200B\u27e9\u27e8U+2028\u27e9\u27e8U+D800\u27e9"),
        ("\u0301", "\u25cc\u0301"),
        ("", "\u00b7"),
        ("x" * 90, "x" * 80 + "\u2026"),
        ("<b>&\"'", "<b>&\"'"),
    ],
)
def test_shown_text_has_no_invisible_characters(text, shown):
    assert visible_text(text) == shown


def test_no_control_or_format_character_is_shown():
    for code in range(0x3000):
        shown = visible_text("a" + chr(code))
        bad = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cn")]
        assert set(bad) <= {"\n", "\t"}, code


def test_token_texts_add_up_to_the_text():
    """The bytes of a character are its last token's; bytes that are none are U+FFFD."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
    text = "h\u00e9 \U0001f642"
    texts = token_texts(tokenizer, tokenizer.encode(text).tolist())
    assert texts == ["h", "", "\u00e9", " ", "", "", "", "\U0001f642"]
    assert token_texts(tokenizer, [0xFF, 0x61]) == ["", "\ufffda"]
    assert token_texts(tokenizer, [0x61, 0xE2]) == ["a", "\ufffd"]
    assert token_texts(tokenizer, []) == []
