"""How the next token is chosen from the logits.

The number of random numbers that a row draws does not depend on the other rows, and each row
has a generator of its own: what is sampled for a prompt does not depend on its batch.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.fields import require


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the limits apply one after another, in this order.

    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float = 1.0
    """divisor of the logits; 0: always choose the most likely token"""
    top_k: int = 0
    """choose among this many most likely tokens; 0: no limit"""
    top_p: float = 1.0
    """choose among the fewest most likely tokens whose probabilities sum to this; 1: no limit
    (Holtzman et al. 2020)"""
    min_p: float = 0.0
    """choose among tokens with at least this multiple of the largest probability; 0: no limit
    (Nguyen et al. 2025)"""
    repetition_penalty: float = 1.0
    """divisor of the positive logits, and factor of the negative ones, of tokens that the row
    already has; 1: none (Keskar et al. 2019)"""

    def __post_init__(self):
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "more than 0",
        )

    def choose(
        self,
        logits_BV: Tensor,
        generators: Sequence[torch.Generator],
        rows: Sequence[Sequence[int]],
    ) -> list[int]:
        """Choose one token per row, with one random number of each row's generator.

        Args:
            logits_BV: fp32 on the CPU.
            generators: those of the rows, on the CPU; greedy choices do not use them.
            rows: all tokens of each row so far.
        """
        if len(logits_BV) == 0:
            return []
        if self.repetition_penalty != 1.0:
            logits_BV = self._penalize(logits_BV, rows)
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            sorted_BV = sorted_BV[:, : self.top_k]
            ids_BV = ids_BV[:, : self.top_k]
        probability_BV = (sorted_BV / self.temperature).softmax(-1, dtype=torch.float64)
        # Probability of all tokens that are more likely than each one.
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV = probability_BV.masked_fill(before_BV >= self.top_p, 0.0)
        least_B1 = self.min_p * probability_BV[:, :1]
        probability_BV = probability_BV.masked_fill(probability_BV < least_B1, 0.0)
        uniform_B1 = torch.stack([torch.rand(1, generator=g) for g in generators])
        cumulative_BV = probability_BV.cumsum(-1)
        # The first token whose cumulative probability is above the random number. An fp32
        # number below 1 times the total stays below it in fp64.
        limit_B1 = uniform_B1 * cumulative_BV[:, -1:]
        drawn_B1 = (cumulative_BV <= limit_B1).sum(-1, keepdim=True)
        return ids_BV.gather(1, drawn_B1).squeeze(1).tolist()

    def _penalize(self, logits_BV: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits with the repetition penalty."""
        logits_BV = logits_BV.clone()
        vocab_size = logits_BV.shape[1]
        for logits_V, row in zip(logits_BV, rows, strict=True):
            seen = torch.tensor(sorted({i for i in row if i < vocab_size}))
            values = logits_V[seen]
            divided = values / self.repetition_penalty
            multiplied = values * self.repetition_penalty
            logits_V[seen] = torch.where(values > 0, divided, multiplied)
        return logits_BV


GREEDY = Sampling(temperature=0.0)
"""Always the most likely token"""


def row_generators(tokens: Sequence[Sequence[int]], seed: int) -> list[torch.Generator]:
    """Return a generator for each prompt, seeded by it and its number among equal ones."""
    generators = []
    seen: Counter[tuple[int, ...]] = Counter()
    for row in tokens:
        prompt = tuple(row)
        digest = hashlib.sha256(repr((seed, seen[prompt], prompt)).encode()).digest()
        seen[prompt] += 1
        row_seed = int.from_bytes(digest[:8], "little") % 2**63
        generators.append(torch.Generator().manual_seed(row_seed))
    return generators
