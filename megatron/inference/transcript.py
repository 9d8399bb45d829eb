"""Prompts and continuations as lines of text.

    > the lines of a prompt
    | the lines of its continuation, which begins where the prompt ends

Blanks, tabs and newlines are shown as they are, and control characters that act on a terminal as
escapes. Each line begins with its sign: no text can be taken for another part of the output.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence

from megatron.inference.text import Continuation, TextCallbacks

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, surrogates, and separators of lines and paragraphs"""
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of the text after them"""


def visible(text: str) -> str:
    """Escape the characters that act on a terminal, except tabs and newlines."""
    shown = []
    for character in text:
        is_control = unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS
        if is_control and character not in "\t\n":
            character = character.encode("unicode_escape").decode("ascii")
        shown.append(character)
    return "".join(shown)


def _write_to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Transcript:
    """Prints continuations in the order of their prompts, while they are generated.

    Args:
        prompts: texts of the prompts.
        is_live: print the current prompt's continuation piece by piece; False: print each one
            when it has ended.
        shows_prompts: also print the lines of the prompts.
        write: writes text.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        is_live: bool,
        shows_prompts: bool = True,
        write: Callable[[str], None] = _write_to_stdout,
    ):
        self.prompts = prompts
        self.is_live = is_live
        self.shows_prompts = shows_prompts
        self.write = write
        self._current = 0
        """Prompt whose continuation is printed next"""
        self._is_open = False
        """Its first line has been begun"""
        self._unprinted = [""] * len(prompts)
        self._has_ended = [False] * len(prompts)

    @property
    def callbacks(self) -> TextCallbacks:
        """What `generate_texts` calls."""
        return TextCallbacks(self._add, self._end)

    def _add(self, number: int, text: str) -> None:
        self._unprinted[number] += text
        if self.is_live and number == self._current:
            self._print()

    def _end(self, number: int, continuation: Continuation) -> None:
        self._has_ended[number] = True
        while self._current < len(self.prompts) and self._has_ended[self._current]:
            self._print()
            self.write("\n")
            self._current += 1
            self._is_open = False

    def _print(self) -> None:
        """Print what the current prompt has and is not printed yet."""
        shown = ""
        if not self._is_open and self.shows_prompts:
            shown += _with_sign("> ", self.prompts[self._current]) + "\n"
        if not self._is_open:
            shown += "| "
        self._is_open = True
        shown += visible(self._unprinted[self._current]).replace("\n", "\n| ")
        self._unprinted[self._current] = ""
        self.write(shown)


def _with_sign(sign: str, text: str) -> str:
    """Return text with a sign before each of its lines."""
    return sign + visible(text).replace("\n", f"\n{sign}")
