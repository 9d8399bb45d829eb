"""Hash routing: a fixed table maps each token id to an expert; there is no router.

Paper: Hash Layers For Large Sparse Models (Roller et al. 2021).

    expert = table[token id],  w = 1,  no parameters, no losses

The table deals out a random permutation of the ids to the experts in turn, drawn from
(seed, layer): the numbers of ids of any two experts differ by at most 1, and different
layers group the ids differently. It is saved with the model.

Departures: the paper's "balanced" table deals out ids by their frequency in the
training data. A gate sees no data, so this is the paper's "random" table with equal
numbers of ids: an expert that owns a frequent id has more tokens than others.

An id outside the table is an error and is never mapped to another id's expert: it
raises an IndexError on the CPU and a device-side assertion (which ends the process) on
a GPU. Negative ids are outside the table.

Shape suffixes: T tokens, D hidden, V vocabulary, A assignments (one per token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing


class HashGate(Gate, name="hash"):
    """Assign one fixed expert to each token id."""

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config, context):
        super().__init__(config, context)
        if context.vocab_size is None:
            raise ValueError(
                "--gate is hash and vocab_size is None; allowed: the number of token ids; "
                "pass vocab_size= to create_gate, or choose a gate that needs no token ids"
            )
        generator = context.generator()
        order_V = torch.randperm(context.vocab_size, generator=generator, device="cpu")
        table_V = order_V % context.num_experts
        self.register_buffer("table_V", table_V.to(torch.empty(0).device))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return 1, 1

    def forward(self, inp: GateInput) -> Routing:
        if inp.token_ids_T is None:
            raise ValueError(
                "--gate is hash and the layer received no token ids; allowed: the int64 id of "
                "every token; pass FFNContext(token_ids_BS=...) to the layer or token_ids_T= "
                "to GateInput"
            )
        num_tokens = len(inp.x_TD)
        device = inp.x_TD.device
        return Routing(
            token_A=torch.arange(num_tokens, device=device),
            token_major=True,
            # index_select, unlike table_V[ids], refuses negative ids.
            expert_A=self.table_V.index_select(0, inp.token_ids_T),
            weight_A=torch.ones(num_tokens, device=device),
            aux_loss=torch.zeros((), device=device),
        )
