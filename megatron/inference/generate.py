"""Text generation without a KV cache: every new token runs the model over the full window.

The text for a prompt does not depend on the other prompts of the batch, up to rounding of
the logits: matrix products of other sizes may differ in the last bit, which matters where
two tokens, or a token's experts, are almost equally likely.

Shape suffixes: B rows, S positions of the window, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[list[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eod: int | None = None,
    seed: int = 0,
    progress: float = 1.0,
    independent_prompts: bool = True,
) -> list[list[int]]:
    """Continue each prompt.

    With sharded experts all ranks have to run in lockstep. So the model runs exactly
    `max_new_tokens` times, even when every row has ended. Each row has a CPU generator of its
    own: ranks with the same arguments generate the same tokens.

    Args:
        tokens: prompts of any lengths; the model sees the last `max_positions` tokens of
            prompt and continuation.
        vocab_size: vocabulary size of the tokenizer; larger ids are padding and are never
            chosen.
        temperature: divisor of the logits; 0: always choose the most likely token.
        top_p: choose among the fewest most likely tokens whose probabilities sum to this; 1:
            no limit.
        top_k: choose among this many most likely tokens; 0: no limit.
        eod: a row ends with this token; None: rows end after `max_new_tokens`.
        progress: see `GPT.forward`; 1: the end of the training.
        independent_prompts: no capacity limit, and gates that look at other tokens see one
            prompt at a time. False: the layers' capacity factors of evaluation apply.
    Returns:
        The new tokens of each row, including `eod` if it ended the row.
    Raises:
        ValueError: a prompt is empty, or a setting is out of its range.
    """
    sampling = _Sampling(temperature, top_p, top_k)
    sampling.check()
    _check_sizes(model, tokens, max_new_tokens, vocab_size)
    generators = _row_generators(tokens, seed)
    rows = [list(row) for row in tokens]
    running = list(range(len(rows)))
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            batch = [rows[i] for i in running]
            logits_BV = _last_logits(model, batch, progress, independent_prompts)
            chosen = sampling.choose(
                logits_BV[:, :vocab_size], [generators[i] for i in running]
            )
            for i, token in zip(running, chosen, strict=True):
                rows[i].append(token)
            running = [i for i in running if rows[i][-1] != eod]
    finally:
        model.train(was_training)
    return [row[len(prompt) :] for row, prompt in zip(rows, tokens, strict=True)]


@dataclass(frozen=True)
class _Sampling:
    """How the next token is chosen; see `generate`."""

    temperature: float
    top_p: float
    top_k: int

    def check(self) -> None:
        """Raise ValueError if a setting is out of its range."""
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")

    def choose(self, logits_BV: Tensor, generators: list[torch.Generator]) -> list[int]:
        """Choose one token per row, with one random number of each row's generator."""
        if not generators:
            return []
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
        uniform_B1 = torch.stack([torch.rand(1, generator=g) for g in generators])
        cumulative_BV = probability_BV.cumsum(-1)
        # The first token whose cumulative probability is above the random number. An fp32
        # number below 1 times the total stays below it in fp64.
        limit_B1 = uniform_B1 * cumulative_BV[:, -1:]
        drawn_B1 = (cumulative_BV <= limit_B1).sum(-1, keepdim=True)
        return ids_BV.gather(1, drawn_B1).squeeze(1).tolist()


def _row_generators(tokens: list[list[int]], seed: int) -> list[torch.Generator]:
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


def _check_sizes(
    model: GPT, tokens: list[list[int]], max_new_tokens: int, vocab_size: int
) -> None:
    """Raise ValueError if a prompt is empty or a number of tokens is out of its range."""
    require(
        bool(tokens) and all(tokens),
        "lengths of the prompts",
        [len(row) for row in tokens],
        "one prompt or more, each of one token or more",
        "Start an empty prompt with the end-of-document token.",
    )
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "0 or more")
    require(
        0 < vocab_size <= model.vocab_size,
        "vocab_size",
        vocab_size,
        f"1 to the model's {model.vocab_size}",
    )


def _last_logits(
    model: GPT, rows: list[list[int]], progress: float, independent_sequences: bool
) -> Tensor:
    """Return the logits after the last token of each row, fp32 on the CPU [B, V].

    Rows are padded on the right, where causal attention does not see the padding and no gate
    routes it. Without rows the model runs on one position of padding: the other ranks still
    need this one for their all-to-all exchanges.
    """
    windows = [row[-model.config.max_positions :] for row in rows]
    lengths = [len(row) for row in windows]
    longest = max(lengths, default=1)
    device = model.embed_tokens.weight.device
    padded = [row + [0] * (longest - len(row)) for row in windows]
    tokens_BS = torch.tensor(padded or [[0]], device=device)
    lengths_B = torch.tensor(lengths or [0], device=device)
    padding_BS = None
    if min(lengths, default=0) < longest:
        padding_BS = torch.arange(longest, device=device) >= lengths_B[:, None]
    logits_BSV = model(
        tokens_BS,
        padding_BS=padding_BS,
        progress=progress,
        independent_sequences=independent_sequences,
    ).logits
    last_B = lengths_B[: len(rows)] - 1
    return logits_BSV[torch.arange(len(rows), device=device), last_B].float().cpu()
