"""Generation of text: prompts are encoded, new tokens are decoded as they come.

The text of a continuation is decoded after the end of its prompt, so that a tokenizer which drops
a blank at the beginning of a text does not drop it here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import require
from megatron.inference.generate import generate, token_set
from megatron.model.gpt import GPT
from megatron.tokenizer.base import Tokenizer

_CONTEXT = 8
"""Tokens of the prompt after which the first new token is decoded"""
_REPLACEMENT = "\ufffd"
"""What tokenizers decode the first bytes of an incomplete character to"""


@dataclass(frozen=True)
class Continuation:
    """What a model generated for one prompt."""

    text: str
    """without the end-of-document token, and without the stop string and what follows it"""
    tokens: list[int]
    """all new tokens, including those of a stop string or the end-of-document token"""
    end: str
    """why it ended: "eod", "stop" (a stop string) or "length" (the number of new tokens)"""


@dataclass(frozen=True)
class TextCallbacks:
    """Functions that are called while text is generated, with the number of the prompt."""

    on_text: Callable[[int, str], None] | None = None
    """the next piece of text; all pieces together are the text of the continuation"""
    on_end: Callable[[int, Continuation], None] | None = None
    """the continuation has ended"""


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    eod: int | Collection[int] | None = None,
    callbacks: TextCallbacks | None = None,
    **options: Any,
) -> list[Continuation]:
    """Continue each prompt with text.

    Args:
        prompts: texts, or the tokens of texts.
        stop: strings that end a continuation, wherever they begin and end within tokens.
        eod: see `generate`; None: the tokenizer's end-of-document token.
        callbacks: called during generation.
        options: further arguments of `generate`, such as `sampling`.
    Raises:
        ValueError: as `generate`, or a stop string is empty.
    """
    require(all(stop), "a stop string", "", "a text of one character or more")
    if eod is None:
        eod = tokenizer.eod
    rows = []
    for number, prompt in enumerate(prompts):
        tokens = encode_prompt(tokenizer, prompt)
        decoder = TextDecoder(tokenizer, tokens)
        rows.append(
            _Row(number, tokens, decoder, _StopFilter(stop), callbacks or TextCallbacks())
        )
    end_tokens = token_set(eod)
    generate(
        model,
        [row.prompt for row in rows],
        max_new_tokens=max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        on_token=lambda row, token: rows[row].add(token, token in end_tokens, max_new_tokens),
        **options,
    )
    return [row.result() for row in rows]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Return the tokens of a text; tokens are returned as they are."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt).tolist()
    return list(prompt)


class TextDecoder:
    """Decodes tokens one by one; the bytes of an incomplete character are held back.

    Args:
        prompt: tokens before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._num_shown = len(self._tokens)
        """The text of so many of `_tokens` has been returned"""

    def add(self, token: int) -> str:
        """Return the characters that a token completes; "" if its bytes are held back."""
        self._tokens.append(token)
        text = self._text_to_show()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        # The tokens whose text was shown last are the context of the next ones.
        del self._tokens[: self._num_shown]
        self._num_shown = len(self._tokens)
        return text

    def finish(self) -> str:
        """Return what is held back: bytes that are no character."""
        text = self._text_to_show()
        self._num_shown = len(self._tokens)
        return text

    def _text_to_show(self) -> str:
        shown = self.tokenizer.decode(self._tokens[: self._num_shown])
        return self.tokenizer.decode(self._tokens)[len(shown) :]


class _StopFilter:
    """Passes text through up to a stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]):
        self.stop = stop
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown, and whether a stop string follows it."""
        text = self._held + text
        found = [text.find(string) for string in self.stop if string in text]
        if found:
            self._held = ""
            return text[: min(found)], True
        shown = len(text) - max((_overlap(text, string) for string in self.stop), default=0)
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """Return the text that is held back."""
        return self._held


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of a text with which a string begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0


class _Row:
    """One prompt and its continuation; see `generate_texts`."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        decoder: TextDecoder,
        stop: _StopFilter,
        callbacks: TextCallbacks,
    ):
        self.number = number
        self.prompt = prompt
        self.decoder = decoder
        self.stop = stop
        self.callbacks = callbacks
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.end = "length"

    def add(self, token: int, is_end: bool, max_new_tokens: int) -> bool:
        """Add a token; return whether it is the end or completes a stop string."""
        self.tokens.append(token)
        is_last = is_end or len(self.tokens) == max_new_tokens
        text = "" if is_end else self.decoder.add(token)
        if is_last:
            text += self.decoder.finish()
        shown, is_stopped = self.stop.add(text)
        if is_last and not is_stopped:
            shown += self.stop.finish()
        self._show(shown)
        if is_stopped:
            self.end = "stop"
        elif is_end:
            self.end = "eod"
        if (is_stopped or is_last) and self.callbacks.on_end is not None:
            self.callbacks.on_end(self.number, self.result())
        return is_stopped or is_end

    def result(self) -> Continuation:
        """Return the continuation so far."""
        return Continuation("".join(self.pieces), self.tokens, self.end)

    def _show(self, text: str) -> None:
        if not text:
            return
        self.pieces.append(text)
        if self.callbacks.on_text is not None:
            self.callbacks.on_text(self.number, text)
