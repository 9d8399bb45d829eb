"""Text generation without a KV cache: every new token runs the model over the full window.

Shape suffixes: B rows, S positions of the window, V vocabulary.
"""

from __future__ import annotations

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
) -> list[list[int]]:
    """Continue each prompt.

    With sharded experts all ranks have to run in lockstep. So the model runs exactly
    `max_new_tokens` times, even when every row has ended, and random numbers come from one
    seeded CPU generator: ranks with the same arguments generate the same tokens.

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
    Returns:
        The new tokens of each row, including `eod` if it ended the row.
    Raises:
        ValueError: a prompt is empty, or a setting is out of its range.
    """
    sampling = _Sampling(temperature, top_p, top_k)
    sampling.check()
    _check_sizes(model, tokens, max_new_tokens, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    rows = [list(row) for row in tokens]
    running = list(range(len(rows)))
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            batch = [rows[i] for i in running]
            if not batch:
                # All rows have ended: the other ranks still need this one for their
                # all-to-all exchanges, so run the model on one token.
                batch = [rows[0][:1]]
            logits_BV = _last_logits(model, batch, progress)[:, :vocab_size]
            chosen = sampling.choose(logits_BV, generator)
            for i, token in zip(running, chosen, strict=False):
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

    def choose(self, logits_BV: Tensor, generator: torch.Generator) -> list[int]:
        """Choose one token per row."""
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            sorted_BV = sorted_BV[:, : self.top_k]
            ids_BV = ids_BV[:, : self.top_k]
        probability_BV = (sorted_BV / self.temperature).softmax(-1)
        # Probability of all tokens that are more likely than each one.
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV = probability_BV.masked_fill(before_BV >= self.top_p, 0.0)
        drawn_B1 = torch.multinomial(probability_BV, 1, generator=generator)
        return ids_BV.gather(1, drawn_B1).squeeze(1).tolist()


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


def _last_logits(model: GPT, rows: list[list[int]], progress: float) -> Tensor:
    """Return the logits after the last token of each row, fp32 on the CPU [B, V].

    Rows are padded on the right, where causal attention does not see the padding.
    """
    windows = [row[-model.config.max_positions :] for row in rows]
    longest = max(map(len, windows))
    device = model.embed_tokens.weight.device
    padded = [row + [0] * (longest - len(row)) for row in windows]
    tokens_BS = torch.tensor(padded, device=device)
    last_B = torch.tensor([len(row) - 1 for row in windows], device=device)
    logits_BSV = model(tokens_BS, progress=progress).logits
    return logits_BSV[torch.arange(len(rows), device=device), last_B].float().cpu()
