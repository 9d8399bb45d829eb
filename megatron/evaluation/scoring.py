"""Log-probabilities of tokens given the tokens before them, on all ranks in lockstep.

Shape suffixes: B rows of a batch, S positions, K last positions, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.model.gpt import GPTOutput
from megatron.parallel.groups import Groups, all_gather_objects

_LOGITS_AT_A_TIME = 1 << 26
"""Most elements of the fp32 copy of logits, 256 MB"""


class ScoreRequest(NamedTuple):
    """Tokens of which the last ones are scored."""

    tokens: np.ndarray
    """ids, integers; as many as the model has positions, and one more at most"""
    num_scored: int
    """number of scored tokens, 1 to all but one"""


class TokenScore(NamedTuple):
    """How well a model predicts the scored tokens of a request."""

    logprob: float
    """sum of the tokens' log-probabilities, natural logarithm"""
    is_greedy: bool
    """whether each token is the most likely one"""


@dataclass(frozen=True)
class _Row:
    """Inputs of the model, and the requests that need its outputs."""

    inputs: np.ndarray
    requests: list[int]
    """numbers of requests that differ in their last tokens only"""


@dataclass(frozen=True)
class TokenScorer:
    """Scores tokens with a model. All ranks call `score` with the same requests.

    Requests with equal inputs, such as answers of one token each to the same question, share a
    row. Rows are sorted by length into batches, which do not depend on the number of ranks, and
    each rank runs every n-th one. A rank without a batch runs one position of padding, because
    others may need its experts or its shards of the weights.

    Attributes:
        model: returns a `GPTOutput`, such as a `GPT` or a training engine around one, in
            evaluation mode.
        groups: the ranks.
        vocab_size: of the tokenizer; larger ids are padding, which a greedy choice leaves out.
        max_positions: inputs of the longest row.
        batch_size: rows of a batch.
        progress: see `GPT.forward`; 1: the end of the training.
    """

    model: Callable[..., GPTOutput]
    groups: Groups
    vocab_size: int
    max_positions: int
    batch_size: int = 8
    progress: float = 1.0

    def __post_init__(self):
        require(self.batch_size > 0, "--batch-size", self.batch_size, "a positive integer")

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScore]:
        """Score requests.

        Returns:
            One score for each request, on all ranks.
        """
        batches = _batches(requests, self.batch_size)
        rank = self.groups.rank
        world_size = self.groups.world_size
        own: dict[int, TokenScore] = {}
        for first in _rounds(len(batches), world_size, self.groups.is_rank0):
            batch = []
            if first + rank < len(batches):
                batch = batches[first + rank]
            own |= self._score_batch(batch, requests)
        scores: dict[int, TokenScore] = {}
        for part in all_gather_objects(own, self.groups):
            scores |= part
        return [scores[i] for i in range(len(requests))]

    def _score_batch(
        self, rows: list[_Row], requests: Sequence[ScoreRequest]
    ) -> dict[int, TokenScore]:
        """Run the model on a batch; return the scores by the number of their request."""
        most_scored = max(
            (requests[i].num_scored for row in rows for i in row.requests), default=1
        )
        logits_BKV = self._forward([row.inputs for row in rows], most_scored)
        row_N, index_N, target_N = _scored_tokens(rows, requests, most_scored)
        if not len(target_N):
            return {}
        device = logits_BKV.device
        logprobs = []
        greedy = []
        step = max(1, _LOGITS_AT_A_TIME // logits_BKV.shape[-1])
        for first in range(0, len(target_N), step):
            part = slice(first, first + step)
            target_n = torch.from_numpy(target_N[part]).to(device)
            logits_nV = logits_BKV[row_N[part], index_N[part]].float()
            target_n1 = target_n[:, None]
            logprobs.append(logits_nV.log_softmax(-1).gather(1, target_n1).squeeze(1))
            greedy.append(logits_nV[:, : self.vocab_size].argmax(-1) == target_n)
        return _sums_by_request(rows, requests, torch.cat(logprobs), torch.cat(greedy))

    def _forward(self, inputs: list[np.ndarray], most_scored: int) -> Tensor:
        """Run the model on rows that are padded on the right.

        Returns:
            The logits of the last `most_scored` tokens of each row [B, K, V]; before the
            beginning of a short row, those of its first token.
        """
        device = self.groups.device
        lengths_B = np.array([len(row) for row in inputs] or [0])
        longest = max(1, int(lengths_B.max()))
        tokens_BS = np.zeros((len(lengths_B), longest), np.int64)
        for row, tokens in zip(tokens_BS, inputs):
            row[: len(tokens)] = tokens
        last_BK = lengths_B[:, None] + np.arange(-most_scored, 0)
        padding_BS = None
        if lengths_B.min() < longest:
            is_padding_BS = np.arange(longest) >= lengths_B[:, None]
            padding_BS = torch.from_numpy(is_padding_BS).to(device)
        out = self.model(
            tokens_BS=torch.from_numpy(tokens_BS).to(device),
            padding_BS=padding_BS,
            progress=self.progress,
            independent_sequences=True,
            logits_at_BK=torch.from_numpy(last_BK.clip(min=0)).to(device),
        )
        return out.logits


def _batches(requests: Sequence[ScoreRequest], batch_size: int) -> list[list[_Row]]:
    """Return batches of rows, the longest rows first: too little memory shows immediately."""
    rows: dict[bytes, _Row] = {}
    for i, request in enumerate(requests):
        inputs = np.ascontiguousarray(request.tokens[:-1], np.int64)
        row = rows.setdefault(inputs.tobytes(), _Row(inputs, []))
        row.requests.append(i)
    ordered = sorted(rows.values(), key=lambda row: -len(row.inputs))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def _rounds(num_batches: int, world_size: int, is_rank0: bool) -> Sequence[int]:
    """Return the number of the first batch of each round, with a progress bar on a terminal."""
    firsts = range(0, num_batches, world_size)
    if not is_rank0 or not sys.stderr.isatty():
        return firsts
    from tqdm import tqdm

    return tqdm(firsts, unit=" batches", leave=False)


def _scored_tokens(
    rows: list[_Row], requests: Sequence[ScoreRequest], most_scored: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, index and target of all scored tokens of a batch, int64 [N] each.

    The index is that of the logits which predict the target, among the last `most_scored` of
    its row.
    """
    found: list[np.ndarray] = [np.zeros((3, 0), np.int64)]
    for number, row in enumerate(rows):
        for i in row.requests:
            request = requests[i]
            count = request.num_scored
            part = np.empty((3, count), np.int64)
            part[0] = number
            part[1] = np.arange(most_scored - count, most_scored)
            part[2] = request.tokens[len(request.tokens) - count :]
            found.append(part)
    row_N, index_N, target_N = np.concatenate(found, axis=1)
    return row_N, index_N, target_N


def _sums_by_request(
    rows: list[_Row], requests: Sequence[ScoreRequest], logprob_N: Tensor, is_greedy_N: Tensor
) -> dict[int, TokenScore]:
    """Add up the tokens of each request, in fp64."""
    logprobs = logprob_N.double().cpu().numpy()
    greedy = is_greedy_N.cpu().numpy()
    scores = {}
    start = 0
    for row in rows:
        for i in row.requests:
            part = slice(start, start + requests[i].num_scored)
            scores[i] = TokenScore(math.fsum(logprobs[part]), bool(greedy[part].all()))
            start = part.stop
    return scores
