"""The language model of lm-evaluation-harness over a model of ours.

The harness asks for log-likelihoods of continuations, log-likelihoods of texts, and generated
text. `HarnessModel` answers with calls of `LockstepRanks`, so that a program on rank 0 uses the
model on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron.config.fields import require
from megatron.evaluation.lockstep import LockstepRanks
from megatron.evaluation.scoring import ScoreRequest, TokenScore, TokenScorer
from megatron.evaluation.text_generation import GenerationRequest, TextGenerator
from megatron.evaluation.windows import Window, continuation_windows, scored_windows
from megatron.inference.chat import ChatTemplate
from megatron.optional_packages import import_optional
from megatron.tokenizer.base import Tokenizer

SCORE = "score"
GENERATE = "generate"
_MOST_NEW_TOKENS = 256
"""tokens to generate where a task sets no number, as in the harness"""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""names that tasks use for the number of tokens to generate, in the harness's order"""


class HarnessModel:
    """What a model of the harness does beyond `TemplateLM`, its base class.

    `TemplateLM` splits each question into context and continuation and moves blanks at the end
    of the context to the continuation; our numbers are thus comparable with those of other
    models in the harness.

    Args:
        ranks: calls SCORE and GENERATE on all ranks.
        tokenizer: of the model.
        max_positions: most tokens that the model sees.
        template: turns conversations into text; None: prompts are ordinary text.
    """

    def __init__(
        self,
        ranks: LockstepRanks,
        tokenizer: Tokenizer,
        max_positions: int,
        template: ChatTemplate | None = None,
    ):
        super().__init__()
        self.template = template
        self.ranks = ranks
        self.text_tokenizer = tokenizer
        self.max_length = max_positions

    @property
    def eot_token_id(self) -> int | None:
        """Id of the end-of-document token."""
        return self.text_tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: the one that the tokenizer puts before texts, or
        the end of the previous document.

        Raises:
            ValueError: the vocabulary has neither.
        """
        return prefix_token(self.text_tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Encode a text.

        Args:
            add_special_tokens: False: without the token that the tokenizer puts before texts.
        """
        if self.template is not None:
            return self.template.encode_text(string)
        ids = self.text_tokenizer.encode(string).tolist()
        if add_special_tokens is False and self.text_tokenizer.bos is not None:
            return ids[1:]
        return ids

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness would store prompts."""
        return self.text_tokenizer.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation."""
        return self.template.render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], **_: object) -> list[tuple[float, bool]]:
        """Score continuations after their contexts; see `TemplateLM`, without a second bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Score continuations after their contexts."""
        pieces = []
        for texts, context, continuation in requests:
            require(
                len(continuation) > 0,
                "the continuation of a task",
                texts[1],
                "a text of one token or more after its context",
            )
            tokens = np.array([*context, *continuation], np.int64)
            windows = continuation_windows(len(tokens), len(continuation), self.max_length)
            pieces.append(_requests(tokens, windows))
        return [(score.logprob, score.is_greedy) for score in self._score(pieces)]

    def loglikelihood_rolling(self, requests: Iterable[Any], **_: object) -> list[float]:
        """Score complete texts: each token after the ones before it in its window."""
        pieces = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            tokens = np.array([self.prefix_token_id, *tokens], np.int64)
            pieces.append(_requests(tokens, scored_windows(len(tokens), self.max_length)))
        return [score.logprob for score in self._score(pieces)]

    def _score(self, pieces: list[list[ScoreRequest]]) -> list[TokenScore]:
        """Score texts that are cut into windows; one result per text."""
        scores = iter(
            self.ranks.call(SCORE, [request for piece in pieces for request in piece])
        )
        results = []
        for piece in pieces:
            parts = [next(scores) for _ in piece]
            logprob = sum(part.logprob for part in parts)
            results.append(TokenScore(logprob, all(part.is_greedy for part in parts)))
        return results

    def generate_until(self, requests: Iterable[Any], **_: object) -> list[str]:
        """Continue prompts up to a stop string, which is left out."""
        return self.ranks.call(GENERATE, [self._generation(*r.args) for r in requests])

    def _generation(self, prompt: str, options: Mapping[str, Any]) -> GenerationRequest:
        """Translate the options of a task; the prompt is cut on the left to leave space."""
        limits = [options[name] for name in _LIMITS if options.get(name) is not None]
        max_new_tokens = int(limits[0]) if limits else _MOST_NEW_TOKENS
        longest = self.max_length - max_new_tokens
        require(
            longest > 0,
            "tokens that a task generates",
            max_new_tokens,
            f"fewer than the {self.max_length} positions of the model",
        )
        until = options.get("until") or []
        if isinstance(until, str):
            until = [until]
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        tokens = self.tok_encode(prompt)[-longest:]
        return GenerationRequest(
            tokens=tuple(tokens or [self.prefix_token_id]),
            max_new_tokens=max_new_tokens,
            stop=tuple(string for string in until if string),
            temperature=temperature,
            top_p=float(options.get("top_p") or 1.0),
            top_k=int(options.get("top_k") or 0),
        )


def build_harness_model(
    scorer: TokenScorer,
    generator: TextGenerator,
    tokenizer: Tokenizer,
    needed_by: str,
    template: ChatTemplate | None = None,
) -> HarnessModel:
    """Build the harness's language model around a scorer and a generator.

    Args:
        needed_by: the flag that needs the harness.
        template: of conversations; None: prompts are ordinary text.

    Raises:
        ValueError: lm_eval is not installed.
    """
    base = import_optional("lm_eval.api.model", "eval", needed_by).TemplateLM
    functions = {SCORE: scorer.score, GENERATE: generator.generate}
    ranks = LockstepRanks(scorer.groups, functions)
    # The base class is imported at use only, because the package is optional.
    harness_class = type("MegatronLM", (HarnessModel, base), {})
    return harness_class(ranks, tokenizer, scorer.max_positions, template)


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token that precedes the first token of a text when it is scored.

    Raises:
        ValueError: the vocabulary has neither a beginning-of-text nor an end-of-document token.
    """
    if tokenizer.bos is not None:
        return tokenizer.bos
    return tokenizer.require_eod("a text without context")


def _requests(tokens: np.ndarray, windows: Iterable[Window]) -> list[ScoreRequest]:
    return [ScoreRequest(tokens[w.start : w.end], w.num_scored) for w in windows]
