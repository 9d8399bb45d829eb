"""Text generation without a cache: every new token runs the model over the whole window.

Shape suffixes: B rows, S window, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.schema import require
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

    Sharded experts need all ranks in lockstep. So the model runs exactly `max_new_tokens` times, also when every row
    has ended, and random numbers come from one seeded CPU generator: ranks given the same arguments answer the same.

    Args:
        tokens: prompts of any lengths; the model sees the last `max_positions` tokens of prompt and continuation.
        vocab_size: of the tokenizer; ids from there on only pad the vocabulary and are never chosen.
        temperature: 0: always the likeliest token.
        top_p: choose among the fewest likeliest tokens whose probabilities reach this sum; 1: no limit.
        top_k: choose among this many likeliest tokens; 0: no limit.
        eod: a row ends with this token; None: rows end at `max_new_tokens`.
        progress: as in `GPT.forward`; 1: the end of the training.
    Returns:
        The new tokens of each row, `eod` included where it ended the row.
    Raises:
        ValueError: an empty prompt, or a setting out of its range.
    """
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
    require(temperature >= 0, "temperature", temperature, "0 or more")
    require(0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")
    require(top_k >= 0, "top_k", top_k, "0 or more")
    generator = torch.Generator().manual_seed(seed)
    rows, running, was_training = (
        [list(row) for row in tokens],
        list(range(len(tokens))),
        model.training,
    )
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # When all rows have ended, one stays in the batch to keep the other ranks' exchanges going.
            logits_BV = _last_logits(
                model, [rows[i] for i in running] or [rows[0][:1]], progress
            )[:, :vocab_size]
            for i, token in zip(
                running, _choose(logits_BV, temperature, top_p, top_k, generator)
            ):
                rows[i].append(token)
            running = [i for i in running if rows[i][-1] != eod]
    finally:
        model.train(was_training)
    return [row[len(prompt) :] for row, prompt in zip(rows, tokens)]


def _last_logits(model: GPT, rows: list[list[int]], progress: float) -> Tensor:
    """Logits after the last token of each row, fp32 on the CPU [B, V]. Padding is on the right: nothing looks at it."""
    windows = [row[-model.config.max_positions :] for row in rows]
    longest = max(map(len, windows))
    device = model.embed_tokens.weight.device
    tokens_BS = torch.tensor(
        [row + [0] * (longest - len(row)) for row in windows], device=device
    )
    last_B = torch.tensor([len(row) - 1 for row in windows], device=device)
    logits_BSV = model(tokens_BS, progress=progress).logits
    return logits_BSV[torch.arange(len(rows), device=device), last_B].float().cpu()


def _choose(
    logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> list[int]:
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV, ids_BV = sorted_BV[:, :top_k], ids_BV[:, :top_k]
    probability_BV = (sorted_BV / temperature).softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    return (
        ids_BV.gather(1, torch.multinomial(probability_BV, 1, generator=generator))
        .squeeze(1)
        .tolist()
    )
