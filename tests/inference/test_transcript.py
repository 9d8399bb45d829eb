"""Printed prompts and continuations: their form, their order, and what acts on a terminal."""

from __future__ import annotations

import pytest

from megatron.inference.text import Continuation
from megatron.inference.transcript import Transcript, visible

END = Continuation("", [], "length")


def printed(prompts: list[str], calls: list[tuple[int, str | None]], **options) -> list[str]:
    """What is written after each call with a piece of text, or with None for the end."""
    written = []
    transcript = Transcript(prompts, write=written.append, **options)
    after_calls = []
    for number, text in calls:
        if text is None:
            transcript.callbacks.on_end(number, END)
        else:
            transcript.callbacks.on_text(number, text)
        after_calls.append("".join(written))
        written.clear()
    return after_calls


def test_control_characters_are_escaped():
    """A model may generate them; letters of all scripts, blanks and newlines stay."""
    text = "> a\n\r\t\0\x1b[2J\x85\u2028\ud800\u202e|größe 日本\u3000\xa0"
    shown = visible(text)
    assert shown == "> a\n\\r\t\\x00\\x1b[2J\\x85\\u2028\\ud800\\u202e|größe 日本\u3000\xa0"
    assert shown.splitlines() == shown.split("\n")


def test_each_line_has_its_sign():
    """Whatever a text contains, prompts and texts can be told apart."""
    calls = [(0, "b\n> c"), (0, "\n\n| d "), (0, None), (1, None)]
    expected = "> a\n> \n| b\n| > c\n| \n| | d \n", "> e\n| \n"
    assert printed(["a\n", "e"], calls, is_live=False) == ["", "", *expected]
    assert printed(["a\n", "e"], calls, is_live=True) == [
        "> a\n> \n| b\n| > c",
        "\n| \n| | d ",
        "\n",
        "> e\n| \n",
    ]
    assert printed(["a"], [(0, "b"), (0, None)], is_live=True, shows_prompts=False) == [
        "| b",
        "\n",
    ]


@pytest.mark.parametrize("is_live", [False, True])
def test_texts_have_the_order_of_prompts(is_live):
    calls = [(1, "x"), (0, "y"), (1, "z"), (1, None), (2, "w"), (0, None), (2, "v"), (2, None)]
    pieces = printed(["0", "1", "2"], calls, is_live=is_live)
    assert "".join(pieces) == "> 0\n| y\n> 1\n| xz\n> 2\n| wv\n"
    live = ["", "> 0\n| y", "", "", "", "\n> 1\n| xz\n", "> 2\n| wv", "\n"]
    assert not is_live or pieces == live
