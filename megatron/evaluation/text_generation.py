"""Generation of text for many prompts, distributed over the ranks in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from megatron.model.gpt import GPT
from megatron.parallel.groups import Groups, all_gather_objects
from megatron.tokenizer.base import Tokenizer


class GenerationRequest(NamedTuple):
    """A prompt, and how it is continued."""

    tokens: tuple[int, ...]
    """ids of the prompt, one or more"""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """strings that end the text and are left out"""
    temperature: float = 0.0
    """0: always the most likely token"""
    top_p: float = 1.0
    top_k: int = 0

    @property
    def options(self) -> tuple:
        """What requests of one batch have in common."""
        return self[1:]


@dataclass(frozen=True)
class TextGenerator:
    """Continues prompts. All ranks call `generate` with the same requests.

    Attributes:
        model: in evaluation mode.
        groups: the ranks; each runs every n-th batch.
        tokenizer: decodes the new tokens.
        batch_size: prompts of a batch.
        progress: see `GPT.forward`; 1: the end of the training.
        is_sharded: whether every step needs all ranks (ZeRO 3).
        end_tokens: tokens that end a text; None: the tokenizer's end-of-document token.
    """

    model: GPT
    groups: Groups
    tokenizer: Tokenizer
    batch_size: int = 8
    progress: float = 1.0
    is_sharded: bool = False
    end_tokens: frozenset[int] | None = None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Return the new text of each request, on all ranks."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (requests[i].options, -len(requests[i].tokens)),
        )
        own: dict[int, str] = {}
        for _, group in groupby(order, key=lambda i: requests[i].options):
            own |= self._generate_alike(list(group), requests)
        texts: dict[int, str] = {}
        for part in all_gather_objects(own, self.groups):
            texts |= part
        return [texts[i] for i in range(len(requests))]

    def _generate_alike(
        self, numbers: list[int], requests: Sequence[GenerationRequest]
    ) -> dict[int, str]:
        """Continue prompts with the same options; return this rank's texts by number."""
        size = self.batch_size
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        texts: dict[int, str] = {}
        for first in range(0, len(batches), self.groups.world_size):
            batch: list[int] = []
            if first + self.groups.rank < len(batches):
                batch = batches[first + self.groups.rank]
            # A rank without a batch continues a prompt of one token: others may need its experts.
            prompts = [list(requests[i].tokens) for i in batch] or [[0]]
            new = self._continue(prompts, requests[numbers[0]])
            texts |= dict(zip(batch, new))
        return texts

    def _continue(self, prompts: list[list[int]], request: GenerationRequest) -> list[str]:
        """Continue the prompts of one batch."""
        from megatron.inference.sampling import Sampling
        from megatron.inference.text import generate_texts

        sampling = Sampling(request.temperature, request.top_k, request.top_p)
        continuations = generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=request.max_new_tokens,
            stop=request.stop,
            eod=self.end_tokens,
            sampling=sampling,
            progress=self.progress,
            fixed_steps=self.is_sharded,
        )
        return [continuation.text for continuation in continuations]
