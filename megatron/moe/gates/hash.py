"""Hash routing: a fixed table, not a router, says which expert a token id goes to.

Paper: Hash Layers For Large Sparse Models (Roller et al. 2021).

    expert = table[token id],  w = 1,  no parameters, no losses

The table is a random permutation of the ids dealt out to the experts in turn, drawn from (seed, layer): the numbers of
ids of two experts differ by at most 1, and different layers group the ids differently. It is saved with the model.

Departures: the paper's "balanced" table deals ids out by their frequency in the training data. A gate sees no data, so
this is its "random" table made even in ids: an expert that holds a frequent id has more tokens than others.

An id outside the table is an error and never some other id's expert: an IndexError on the CPU, a device-side assertion
of CUDA (which ends the process) on a GPU. Negative ids count as outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing


class HashGate(Gate, name="hash"):
    """One expert per token id."""

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config, context):
        super().__init__(config, context)
        if context.vocab_size is None:
            raise ValueError(
                "--gate is hash and vocab_size is None; allowed: the number of token ids; "
                "pass vocab_size= to gates.create, or choose a gate that needs no token ids"
            )
        table_V = (
            torch.randperm(context.vocab_size, generator=context.generator(), device="cpu")
            % context.num_experts
        )
        self.register_buffer("table_V", table_V.to(torch.empty(0).device))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, 1

    def forward(self, inp: GateInput) -> Routing:
        if inp.token_ids_T is None:
            raise ValueError(
                "--gate is hash and the layer was given no token ids; allowed: int64 ids of every token; "
                "pass FFNContext(token_ids_BS=...) to the layer or token_ids_T= to GateInput"
            )
        num_tokens, device = inp.x_TD.shape[0], inp.x_TD.device
        return Routing(
            token_A=torch.arange(num_tokens, device=device),
            token_major=True,
            expert_A=self.table_V.index_select(
                0, inp.token_ids_T
            ),  # unlike table_V[ids], refuses negative ids
            weight_A=torch.ones(num_tokens, device=device),
            aux_loss=torch.zeros((), device=device),
        )
