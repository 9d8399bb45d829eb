"""Generation of tokens, with a cache of attention states.

The first forward pass runs the model on the prompts, and each later one on the last token of each
row. Without the cache every new token runs the model over the full window, with the same result
up to rounding. It is not used

- while a row is longer than the model has positions: the window slides, and with it the
  positions of all its tokens;
- for gates that look at other tokens, and under a capacity: the experts of earlier tokens may
  change with each new token.

The tokens for a prompt do not depend on the other prompts of the batch, up to rounding of
the logits: matrix products of other sizes may differ in the last bit, which matters where
two tokens, or a token's experts, are almost equally likely.

Ranks that share experts run in lockstep: a rank whose rows have ended runs the model without
tokens until those of the others have. Each row has a CPU generator of its own: ranks with the
same arguments generate the same tokens.

Shape suffixes: B rows, S positions of the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.fields import require
from megatron.inference.kv_cache import KVCache
from megatron.inference.sampling import Sampling, row_generators
from megatron.log import get_logger
from megatron.model.gpt import GPT
from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import find_moe_layers

OnToken = Callable[[int, int], bool | None]
"""Called with the number of a row and its new token; True ends the row"""


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[list[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    sampling: Sampling | None = None,
    eod: int | Collection[int] | None = None,
    seed: int = 0,
    progress: float = 1.0,
    independent_prompts: bool = True,
    use_cache: bool = True,
    batch_size: int = 0,
    on_token: OnToken | None = None,
    fixed_steps: bool = False,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        tokens: prompts of any lengths; the model sees the last `max_positions` tokens of
            prompt and continuation.
        max_new_tokens: the same on ranks that share experts.
        vocab_size: of the tokenizer; larger ids are padding and are never chosen.
        sampling: how tokens are chosen; None: from the probabilities of the model.
        eod: a row ends with this token, or with one of several; None: rows end after
            `max_new_tokens`.
        progress: see `GPT.forward`; 1: the end of the training.
        independent_prompts: no capacity limit, and gates that look at other tokens see one
            prompt at a time. False: the layers' capacity factors of evaluation apply.
        use_cache: False: run the model over the full window for every token.
        batch_size: most prompts that run together; 0: all. Ranks that share experts need the
            same number of batches.
        on_token: called for each new token, also for one of `eod`.
        fixed_steps: run the model `max_new_tokens` times for each batch, even when every row has
            ended: for models whose other weights are sharded as well (ZeRO 3).
    Returns:
        The new tokens of each row, including the one that ended it.
    Raises:
        ValueError: a prompt is empty, or a setting is out of its range.
    """
    _check_sizes(model, tokens, max_new_tokens, vocab_size, batch_size)
    rows = [list(row) for row in tokens]
    run = _Generation(
        runner=_Runner(model, progress, independent_prompts, use_cache),
        rows=rows,
        generators=row_generators(tokens, seed),
        sampling=sampling or Sampling(),
        vocab_size=vocab_size,
        end_tokens=token_set(eod),
        on_token=on_token,
    )
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(len(rows), batch_size):
            run.continue_rows(batch, max_new_tokens, fixed_steps)
    finally:
        model.train(was_training)
    return [row[len(prompt) :] for row, prompt in zip(rows, tokens, strict=True)]


@dataclass
class _Generation:
    """Rows of tokens that grow; see `generate`."""

    runner: _Runner
    rows: list[list[int]]
    generators: list[torch.Generator]
    sampling: Sampling
    vocab_size: int
    end_tokens: frozenset[int]
    on_token: OnToken | None

    def continue_rows(self, batch: list[int], max_new_tokens: int, fixed_steps: bool) -> None:
        """Add tokens to the rows with these numbers until they end."""
        longest = max(len(self.rows[i]) for i in batch)
        self.runner.start_batch(longest + max_new_tokens)
        running = batch
        for _ in range(max_new_tokens):
            if not fixed_steps and not self.runner.has_rows_anywhere(len(running)):
                break
            rows = {i: self.rows[i] for i in running}
            logits_BV = self.runner.last_logits(rows)[:, : self.vocab_size]
            generators = [self.generators[i] for i in running]
            chosen = self.sampling.choose(logits_BV, generators, list(rows.values()))
            running = [
                i for i, token in zip(running, chosen, strict=True) if not self._add(i, token)
            ]

    def _add(self, row: int, token: int) -> bool:
        """Add a token to a row; return whether it ends the row."""
        self.rows[row].append(token)
        ends = self.on_token is not None and self.on_token(row, token)
        return bool(ends) or token in self.end_tokens


def _batches(num_rows: int, batch_size: int) -> list[list[int]]:
    """Split the numbers of rows into batches; 0: one batch."""
    rows = list(range(num_rows))
    size = batch_size or num_rows
    return [rows[first : first + size] for first in range(0, num_rows, size)]


def token_set(eod: int | Collection[int] | None) -> frozenset[int]:
    """Return end-of-document tokens as a set."""
    if eod is None:
        return frozenset()
    if isinstance(eod, int):
        return frozenset([eod])
    return frozenset(eod)


def _check_sizes(
    model: GPT,
    tokens: list[list[int]],
    max_new_tokens: int,
    vocab_size: int,
    batch_size: int,
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
    require(batch_size >= 0, "batch_size", batch_size, "1 or more, or 0 for all prompts")


class _Runner:
    """Runs the model on the rows of a batch, and holds the cache of their attention states.

    Args:
        model: in evaluation mode.
        progress: see `GPT.forward`.
        independent_sequences: see `FFNContext`.
        use_cache: whether to use a cache if the model allows it.
    """

    def __init__(
        self, model: GPT, progress: float, independent_sequences: bool, use_cache: bool
    ):
        self.model = model
        self.progress = progress
        self.independent_sequences = independent_sequences
        self.device = model.embed_tokens.weight.device
        self.max_positions = model.config.max_positions
        moe_layers = find_moe_layers(model)
        groups = {layer.groups.ep_group for layer in moe_layers}
        self.ep_group = groups.pop() if groups else None
        self.use_cache = use_cache
        if use_cache and moe_layers:
            reason = _why_not_cached(moe_layers, independent_sequences)
            self.use_cache = reason is None
            if reason:
                _log_missing_cache(reason)
        self.start_batch(0)

    def start_batch(self, max_slots: int) -> None:
        """Forget the rows of the last batch.

        Args:
            max_slots: most tokens that a row of the next batch may have.
        """
        self.max_slots = min(max_slots, self.max_positions)
        self.cache: KVCache | None = None
        self.cached_rows: list[int] = []

    def has_rows_anywhere(self, num_rows: int) -> bool:
        """Whether a rank that shares experts with this one has rows that have not ended."""
        if self.ep_group is None:
            return num_rows > 0
        total = torch.tensor(num_rows, device=self.device)
        dist.all_reduce(total, group=self.ep_group)
        return total.item() > 0

    def last_logits(self, rows: dict[int, list[int]]) -> Tensor:
        """Return the logits after the last token of each row, fp32 on the CPU [B, V].

        Args:
            rows: all tokens of the rows that have not ended, by number. Without rows the model
                runs on one position of padding: the other ranks still need this one for their
                all-to-all exchanges.
        """
        longest = max(map(len, rows.values()), default=0)
        if not rows or not self.use_cache or longest > self.max_positions:
            self.cache = None
            return self._forward([row[-self.max_positions :] for row in rows.values()])
        if self.cache is None:
            num_layers = len(self.model.layers)
            self.cache = KVCache(num_layers, len(rows), self.max_slots, self.device)
            new = list(rows.values())
        else:
            self.cache.keep_rows([i for i, row in enumerate(self.cached_rows) if row in rows])
            new = [row[-1:] for row in rows.values()]
        self.cached_rows = list(rows)
        self.cache.announce([len(row) for row in new])
        return self._forward(new)

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Run the model on tokens of each row, and on the cache if there is one.

        Rows are padded on the right, where causal attention does not see the padding and no gate
        routes it.
        """
        lengths = [len(row) for row in rows] or [0]
        longest = max(1, *lengths)
        padded = [row + [0] * (longest - len(row)) for row in rows] or [[0]]
        lengths_B = torch.tensor(lengths, device=self.device)
        padding_BS = None
        if min(lengths) < longest:
            padding_BS = torch.arange(longest, device=self.device) >= lengths_B[:, None]
        logits_B1V = self.model(
            torch.tensor(padded, device=self.device),
            padding_BS=padding_BS,
            progress=self.progress,
            independent_sequences=self.independent_sequences,
            cache=self.cache,
            logits_at_BK=(lengths_B - 1).clamp_min(0)[:, None],
        ).logits
        return logits_B1V[: len(rows), 0].float().cpu()


@cache
def _log_missing_cache(reason: str) -> None:
    """Log once why there is no cache: a conversation generates after each line."""
    get_logger().info("generation without a cache of keys and values: %s", reason)


def _why_not_cached(moe_layers: list[MoELayer], independent_sequences: bool) -> str | None:
    """Return why the experts of earlier tokens change with new tokens; None: they do not."""
    if not independent_sequences:
        return "the capacity of experts depends on all tokens"
    for layer in moe_layers:
        if layer.gate.sees_other_tokens:
            return f"the gate {layer.gate.name} looks at other tokens"
    return None
