"""Run a model over texts and record the routing of all MoE layers.

Shape suffixes: B rows (1), S positions of a window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron.config.fields import require
from megatron.inference.text import TextDecoder
from megatron.model.gpt import GPT
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.routing_record import record_routing
from megatron.moe.routing_trace import (
    LayerTrace,
    RoutingTrace,
    concatenate_layers,
    trace_layers,
)
from megatron.parallel.groups import Groups, all_gather_objects
from megatron.tokenizer.base import Tokenizer


class CutTexts(NamedTuple):
    """Tokens of texts up to a limit on all of them."""

    documents: list[np.ndarray]
    """int64 token ids of each text that has any"""
    num_tokens: int
    """tokens of the texts before they were cut"""


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> CutTexts:
    """Encode texts and cut what exceeds a number of tokens.

    Raises:
        ValueError: the texts have no token.
    """
    documents = []
    num_tokens = 0
    for text in texts:
        tokens = tokenizer.encode(text).astype(np.int64)
        remaining = max(0, max_tokens - num_tokens)
        num_tokens += len(tokens)
        if len(tokens[:remaining]):
            documents.append(tokens[:remaining])
    require(num_tokens > 0, "the number of tokens of the texts", 0, "1 or more")
    return CutTexts(documents, num_tokens)


def record_texts(
    model: GPT,
    groups: Groups,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    window: int,
    identity: str,
) -> RoutingTrace:
    """Run a model over the tokens of texts and trace its routing. A collective.

    Each text is cut into windows, which see nothing of each other. Ranks take turns: a rank
    without a window runs one position of padding, because others may need its experts.

    Args:
        model: in evaluation mode. Capacity limits do not apply.
        documents: int64 tokens of each text, one or more.
        window: tokens that the model sees at most.
        identity: of the weights, see `megatron.interop.model_identity`.

    Returns:
        The trace of all texts, on all ranks.

    Raises:
        ValueError: the model has no MoE layers.
    """
    num_layers = len(find_moe_layers(model))
    require(
        num_layers > 0,
        "the number of MoE layers of the model",
        num_layers,
        "1 or more: a dense model has no routing",
    )
    windows = [
        tokens[start : start + window]
        for tokens in documents
        for start in range(0, len(tokens), window)
    ]
    own = {}
    for first in _rounds(len(windows), groups):
        number = first + groups.rank
        tokens_S = np.zeros(0, np.int64)
        if number < len(windows):
            tokens_S = windows[number]
        layers = _run_window(model, tokens_S, groups.device)
        if len(tokens_S):
            own[number] = layers
    found = {}
    for part in all_gather_objects(own, groups):
        found |= part
    tokens_T = torch.from_numpy(np.concatenate(documents))
    lengths = [len(tokens) for tokens in documents]
    texts = [text for tokens in documents for text in token_texts(tokenizer, tokens)]
    return RoutingTrace(
        concatenate_layers([found[number] for number in range(len(windows))]),
        identity,
        tokens_T,
        torch.tensor([0, *np.cumsum(lengths)[:-1].tolist()]),
        tuple(texts),
    )


def token_texts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """Return the text that each token adds to a document.

    It is empty for tokens without text, and for all but the last of the tokens that together
    are one character. Bytes that are no character are U+FFFD.
    """
    decoder = TextDecoder(tokenizer, [])
    texts = [decoder.add(int(token)) for token in tokens]
    if texts:
        texts[-1] += decoder.finish()
    return texts


@torch.no_grad()
def _run_window(
    model: GPT, tokens_S: np.ndarray, device: torch.device
) -> tuple[LayerTrace, ...]:
    """Run one window; without tokens, one position of padding."""
    padding_BS = None
    tokens_BS = torch.from_numpy(tokens_S)[None].to(device)
    if not len(tokens_S):
        tokens_BS = torch.zeros(1, 1, dtype=torch.int64, device=device)
        padding_BS = torch.ones(1, 1, dtype=torch.bool, device=device)
    with record_routing(model) as records:
        model(
            tokens_BS=tokens_BS,
            padding_BS=padding_BS,
            progress=1.0,
            independent_sequences=True,
            # The logits are not needed: those of one position are computed.
            logits_at_BK=torch.zeros(1, 1, dtype=torch.int64, device=device),
        )
    return trace_layers(model, records)


def _rounds(num_windows: int, groups: Groups) -> Iterable[int]:
    """Return the number of the first window of each round, with a progress bar on a terminal."""
    firsts = range(0, num_windows, groups.world_size)
    if not groups.is_rank0 or not sys.stderr.isatty():
        return firsts
    from tqdm import tqdm

    return tqdm(firsts, unit=" windows", leave=False)
