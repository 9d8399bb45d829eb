"""Routing of each sequence by itself, for gates that look at other tokens.

Generation uses it: the text for a prompt must not depend on the other prompts.

Shape suffixes: T tokens on this rank, R those that are not padding, A assignments, N
sequences.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing


@torch.no_grad()
def route_each_sequence(gate: Gate, inp: GateInput) -> Routing:
    """Call the gate once per sequence and combine the results.

    A carry must have one row per token. Losses are means over the sequences that have
    tokens, and means of metrics are means over tokens. For inference: there is no
    gradient, and the numbers of tokens are read from the device.
    """
    unpadded = inp.without_padding()
    rows = _rows_by_sequence(unpadded)
    parts = [gate(_select(unpadded, rows_n)) for rows_n in rows]
    routing = _combine(parts, rows)
    if inp.padding_T is None:
        return routing
    return routing.with_padding(unpadded.unpadded_R)


def _rows_by_sequence(inp: GateInput) -> list[Tensor]:
    """Return the rows of each sequence that has any; without any, one empty sequence."""
    if inp.sequence_T is None or len(inp.x_TD) == 0:
        return [torch.arange(len(inp.x_TD), device=inp.x_TD.device)]
    order_R = inp.sequence_T.argsort(stable=True)
    counts = torch.unique(inp.sequence_T, return_counts=True)[1]
    return list(order_R.split(counts.tolist()))


def _select(inp: GateInput, rows: Tensor) -> GateInput:
    """Return the input of some rows, as one sequence."""
    per_token = {"token_ids_T": inp.token_ids_T, "carry": inp.carry}
    selected = {name: t if t is None else t[rows] for name, t in per_token.items()}
    return replace(
        inp, x_TD=inp.x_TD[rows], sequence_T=None, num_sequences=1, unpadded_R=None, **selected
    )


def _combine(parts: list[Routing], rows: list[Tensor]) -> Routing:
    """Concatenate the routings of sequences, whose tokens are these rows."""
    token_A = torch.cat([n[part.token_A] for n, part in zip(rows, parts, strict=True)])
    aux_losses = []
    for part in parts:
        aux_losses.append(sum((term.loss() for term in part.balance), part.aux_loss))
    num_tokens = sum(map(len, rows))
    shares = [len(n) / max(1, num_tokens) for n in rows]
    means = {}
    sums = {}
    for share, part in zip(shares, parts, strict=True):
        for name, value in part.metric_means.items():
            means[name] = means.get(name, 0.0) + share * value
        for name, value in part.metric_sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return Routing(
        token_A=token_A,
        expert_A=torch.cat([part.expert_A for part in parts]),
        weight_A=torch.cat([part.weight_A for part in parts]),
        aux_loss=torch.stack(aux_losses).mean(),
        priority_A=_cat([part.priority_A for part in parts]),
        carry=_in_row_order(_cat([part.carry for part in parts]), rows),
        metric_means=means,
        metric_sums=sums,
        router_logits_TC=_in_row_order(_cat([p.router_logits_TC for p in parts]), rows),
    )


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    if tensors[0] is None:
        return None
    return torch.cat(tensors)


def _in_row_order(values: Tensor | None, rows: list[Tensor]) -> Tensor | None:
    """Return a carry or logits that are sorted by sequence in the order of the tokens."""
    if values is None:
        return None
    return values[torch.cat(rows).argsort()]
