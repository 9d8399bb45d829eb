"""Perplexity of texts per token, byte and word.

Perplexities of models with different tokenizers can be compared per byte or per word only: the
same text is cut into other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.evaluation.documents import TextDocument
from megatron.evaluation.scoring import ScoreRequest, TokenScore
from megatron.evaluation.windows import scored_windows

_TOKENS_AT_A_TIME = 1 << 20
"""tokens that are read before the model runs; sorting more by length saves little"""
_LARGEST_EXPONENT = 700.0
"""exp of more overflows an fp64 number: the perplexity of a diverged model stays finite"""


@dataclass(frozen=True)
class WindowOptions:
    """How documents are cut, and what is scored."""

    prefix: int
    """token before the first one of each document"""
    max_positions: int
    """tokens of a window, the first of which is only seen"""
    stride: int = 0
    """see `scored_windows`"""
    eod: int | None = None
    """token that is scored after each document; None: none"""


@dataclass
class PerplexityTotals:
    """Sums over documents, and the figures that follow from them."""

    documents: int = 0
    tokens: int = 0
    """scored tokens"""
    bytes: int = 0
    words: int = 0
    nll: float = 0.0
    """negative log-likelihood of all scored tokens, natural logarithm"""

    def figures(self) -> dict[str, float | None]:
        """Return the mean loss per token, and perplexities; None for a mean over nothing."""
        return {
            "loss": self._mean(self.tokens),
            "token_perplexity": _exp(self._mean(self.tokens)),
            "byte_perplexity": _exp(self._mean(self.bytes)),
            "word_perplexity": _exp(self._mean(self.words)),
            "bits_per_byte": self._mean(self.bytes * math.log(2)),
        }

    def _mean(self, count: float) -> float | None:
        return self.nll / count if count else None


def measure_perplexity(
    documents: Iterable[TextDocument],
    score: Callable[[Sequence[ScoreRequest]], Sequence[TokenScore]],
    options: WindowOptions,
) -> PerplexityTotals:
    """Score all tokens of documents, each of which only sees tokens of its own document.

    Args:
        score: scores requests, such as `TokenScorer.score`.

    Raises:
        ValueError: the stride does not fit the window.
    """
    totals = PerplexityTotals()
    requests: list[ScoreRequest] = []
    waiting = 0
    for document in documents:
        totals.documents += 1
        totals.bytes += document.num_bytes
        totals.words += document.num_words
        requests += _requests(document, options)
        waiting += len(document.tokens)
        if waiting >= _TOKENS_AT_A_TIME:
            _add(totals, requests, score(requests))
            requests = []
            waiting = 0
    _add(totals, requests, score(requests))
    return totals


def _requests(document: TextDocument, options: WindowOptions) -> list[ScoreRequest]:
    ends = [] if options.eod is None else [options.eod]
    tokens = np.concatenate(([options.prefix], document.tokens, ends)).astype(np.int64)
    windows = scored_windows(len(tokens), options.max_positions, options.stride)
    return [ScoreRequest(tokens[w.start : w.end], w.num_scored) for w in windows]


def _add(
    totals: PerplexityTotals, requests: Sequence[ScoreRequest], scores: Sequence[TokenScore]
) -> None:
    totals.tokens += sum(request.num_scored for request in requests)
    totals.nll -= math.fsum(score.logprob for score in scores)


def _exp(exponent: float | None) -> float | None:
    return None if exponent is None else math.exp(min(exponent, _LARGEST_EXPONENT))
