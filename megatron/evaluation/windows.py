"""Windows over the tokens of a document that is longer than the model has positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron.config.fields import require


class Window(NamedTuple):
    """Tokens [start, end) of a document, of which the last `num_scored` are predicted."""

    start: int
    end: int
    num_scored: int


def scored_windows(num_tokens: int, max_positions: int, stride: int = 0) -> Iterator[Window]:
    """Cut tokens into windows in which each token but the first is predicted once.

    A window has `max_positions + 1` tokens, because its last one is no input. The windows are
    those of lm-evaluation-harness if `stride` is `max_positions`: they share one token, which
    the first prediction sees, and the last one begins earlier, so that it is full, too.

    Args:
        num_tokens: tokens of the document with the one that its first prediction sees.
        max_positions: positions of the model, 1 or more.
        stride: tokens that each window after the first predicts. With fewer, each sees more
            tokens before it, `max_positions - stride + 1` or more. 0: `max_positions`.

    Raises:
        ValueError: the stride is negative or larger than a window.
    """
    require(
        0 <= stride <= max_positions,
        "--stride",
        stride,
        f"1 to {max_positions}, the tokens of a window, or 0 for as many",
    )
    stride = stride or max_positions
    scored_to = 1
    end = min(max_positions + 1, num_tokens)
    while scored_to < num_tokens:
        yield Window(max(0, end - max_positions - 1), end, end - scored_to)
        scored_to = end
        end = min(end + stride, num_tokens)


def continuation_windows(
    num_tokens: int, num_scored: int, max_positions: int
) -> Iterator[Window]:
    """Cut a context and its continuation, of which the last `num_scored` tokens are predicted.

    The context is cut on the left so that all fits one window. A continuation that is longer
    than a window is cut as by `scored_windows`, after one token of context.
    """
    if num_scored <= max_positions:
        yield Window(max(0, num_tokens - max_positions - 1), num_tokens, num_scored)
        return
    first = num_tokens - num_scored - 1
    for window in scored_windows(num_scored + 1, max_positions):
        yield Window(first + window.start, first + window.end, window.num_scored)
