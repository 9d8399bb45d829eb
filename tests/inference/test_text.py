"""Text from tokens: blanks after prompts, characters in parts, stop strings, callbacks."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from megatron.inference import text
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

EOD = ByteTokenizer.eod


def metaspace_tokenizer() -> HuggingFaceTokenizer:
    """Words with their blanks, and bytes for other characters, as in Llama 2."""
    tokens = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁fox",
        "s",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return HuggingFaceTokenizer("HuggingFaceTokenizer", backend, "made here")


def pieces_of(tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    decoder = text.TextDecoder(tokenizer, prompt)
    return [*(decoder.add(token) for token in tokens), decoder.finish()]


def test_incomplete_characters_are_held_back():
    """A piece ends where a character does; invalid bytes appear with the next character."""
    pieces = pieces_of(ByteTokenizer(), [120], list("aé日🦊z".encode()))
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "🦊", "z", ""]
    invalid = [0xFF, 0x61, 0xE6, 0x97]
    assert pieces_of(ByteTokenizer(), [120], invalid) == ["", "\ufffda", "", "", "\ufffd"]


def test_blank_after_prompt_is_kept():
    """Decoding the new tokens alone drops it."""
    tokenizer = metaspace_tokenizer()
    ids = tokenizer._tokenizer.get_vocab()
    new = [ids[token] for token in ("▁fox", "s", "▁", "▁the", "<0xC3>", "<0xA9>")]
    assert tokenizer.decode(new) == "foxs  theé"
    assert pieces_of(tokenizer, [ids["▁the"]], new) == [" fox", "s", " ", " the", "", "é", ""]
    assert "".join(pieces_of(tokenizer, [], new)) == "foxs  theé"


@pytest.fixture
def scripted(monkeypatch):
    """Replace the model by scripts: the tokens that each row gets until it ends."""

    def run(scripts: list[bytes | list[int]], limit: int = 100, **options):
        def generate(model, tokens, *, max_new_tokens, on_token, **rest):
            assert tokens == [[120]] * len(scripts) and max_new_tokens == limit
            running = set(range(len(scripts)))
            for step in range(limit):
                for row in sorted(running):
                    if step == len(scripts[row]):
                        raise AssertionError(f"row {row} has not ended")
                    if on_token(row, scripts[row][step]):
                        running.remove(row)

        monkeypatch.setattr(text, "generate", generate)
        prompts = ["x"] * len(scripts)
        return text.generate_texts(
            None, ByteTokenizer(), prompts, max_new_tokens=limit, **options
        )

    return run


@pytest.mark.parametrize(
    ("script", "stop", "expected"),
    [
        (b"one. two", ["."], "one"),
        (b"one\n\ntwo", ["\n\n"], "one"),
        (b"one\n\n", ["\n"], "one"),
        (b"aabaac", ["aac"], "aab"),
        (b"user: x", ["x", "user:"], ""),
        (b"it ends", ["s", "nds"], "it e"),
        ("né!".encode(), ["é"], "n"),
    ],
)
def test_text_ends_before_stop_string(scripted, script, stop, expected):
    (row,) = scripted([script], stop=stop)
    assert row.text == expected and row.end == "stop"
    assert len(row.tokens) <= len(script)


def test_stop_string_may_straddle_tokens():
    """The token that completes it may have text after it."""
    stop = text._StopFilter(["END", "stop"])
    assert [stop.add(piece) for piece in ("a E", "N", "X s", "to")] == [
        ("a ", False),
        ("", False),
        ("ENX ", False),
        ("", False),
    ]
    assert stop.add("p it") == ("", True)
    other = text._StopFilter(["END"])
    assert other.add("x ENDs END") == ("x ", True) and other.finish() == ""
    assert other.add("EN") == ("", False) and other.finish() == "EN"


def test_ends_are_told_apart(scripted):
    """The text has no end-of-document token; what was held back appears at the end."""
    scripts = [[97, 98, EOD], [97, 98, 99, 100], [97, 0xE6, EOD], [97, 10, 98]]
    rows = scripted(scripts, limit=4, stop=["ab!", "\n", "c?"])
    assert rows == [
        text.Continuation("ab", [97, 98, EOD], "eod"),
        text.Continuation("abcd", [97, 98, 99, 100], "length"),
        text.Continuation("a\ufffd", [97, 0xE6, EOD], "eod"),
        text.Continuation("a", [97, 10], "stop"),
    ]
    (row,) = scripted([[97, 98]], limit=2, stop=["bc"])
    assert row == text.Continuation("ab", [97, 98], "length")
    (row,) = scripted([[98, 7]], limit=9, eod={7, 8})
    assert row.end == "eod" and row.text == "b"


def test_pieces_add_up_to_text(scripted):
    """Every continuation ends once, after its last piece."""
    pieces = {0: "", 1: ""}
    ends = []

    def on_text(row: int, piece: str) -> None:
        assert piece and row not in dict(ends)
        pieces[row] += piece

    callbacks = text.TextCallbacks(on_text, lambda row, result: ends.append((row, result)))
    scripts = [list("größe no".encode()), [*b"n", 0xFF, EOD]]
    rows = scripted(scripts, limit=10, stop=[" no"], callbacks=callbacks)
    assert [row.text for row in rows] == list(pieces.values()) == ["größe", "n\ufffd"]
    assert sorted(ends) == [(0, rows[0]), (1, rows[1])]


def test_prompts_may_be_tokens(scripted):
    (expected,) = scripted([b"ab"], limit=2)
    assert text.generate_texts(None, ByteTokenizer(), [[120]], max_new_tokens=2) == [expected]


def test_empty_stop_string_is_refused(scripted):
    with pytest.raises(ValueError, match="a stop string is ''; allowed: a text of one"):
        scripted([b"ab"], stop=["x", ""])
