"""Hash routing: a fixed table maps each token id to its experts; nothing is selected.

Paper: Hash Layers For Large Sparse Models (Roller et al. 2021), with one expert and
without parameters. DeepSeek-V4's first layers have k experts and learned weights.

    I = table[token id], k experts
    w_i = 1 / k                                           without learned_weights
    w_i = scale * s_i  (divided by sum_{j in I} s_j with norm_topk_prob)      with
        z = W x, s = softmax(z), sigmoid(z) or sqrt(softplus(z))
    no losses

The table deals out a random permutation of the ids to the experts in turn, drawn from
(seed, layer): the numbers of ids of any two experts differ by at most k, and different
layers group the ids differently. Each E consecutive ids of the permutation draw k - 1
distances to their other experts, so that many different sets of experts occur. The
table is saved with the model.

Departures: the paper's "balanced" table deals out ids by their frequency in the
training data. A gate sees no data, so this is the paper's "random" table with equal
numbers of ids: an expert that owns a frequent id has more tokens than others.

An id outside the table is an error and is never mapped to another id's expert: it
raises an IndexError on the CPU and a device-side assertion (which ends the process) on
a GPU. Negative ids are outside the table.

Shape suffixes: T tokens, E experts, V vocabulary, k experts per token, A assignments, B
blocks of E ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import SCORE_FUNCTIONS, linear_fp32, selected_weights
from megatron.moe.gate_options import (
    GateOptions,
    check_topk,
    require_choice,
    require_field,
    setting,
)
from megatron.moe.routing import GateInput, Routing

_LEARNED = setting("learned_weights")


class HashGate(Gate, name="hash"):
    """Assign fixed experts to each token id."""

    @dataclass(frozen=True)
    class Config(GateOptions):
        topk: int = 1
        """experts per token"""
        learned_weights: bool = False
        """weigh the experts by the scores of a learned router, instead of equally"""
        score_function: str = field(
            default="sqrtsoftplus", metadata={"choices": SCORE_FUNCTIONS, "needs": _LEARNED}
        )
        """function that turns an expert's logit into its score"""
        norm_topk_prob: bool = field(
            default=False, metadata={"needs": (_LEARNED, setting("topk", above=1))}
        )
        """divide the scores of a token's experts by their sum; a single score stays as it
        is"""
        routed_scaling_factor: float = field(default=1.0, metadata={"needs": _LEARNED})
        """factor applied to every weight"""

        def __post_init__(self):
            super().__post_init__()
            require_field(self, "topk", self.topk >= 1, "1 to the number of experts")
            require_choice(self, "score_function", SCORE_FUNCTIONS)

        def check(self, num_experts: int) -> None:
            check_topk(self.topk, num_experts)

    table_V: Tensor
    """expert of each token id: int64 [V], or [V, k] with several experts"""

    def __init__(self, config, context):
        super().__init__(config, context)
        if context.vocab_size is None:
            raise ValueError(
                "--gate is hash and vocab_size is None; allowed: the number of token ids; "
                "pass vocab_size= to create_gate, or choose a gate that needs no token ids"
            )
        generator = context.generator()
        table_Vk = _draw_table(context.vocab_size, self.num_experts, config.topk, generator)
        self.register_buffer("table_V", table_Vk.squeeze(-1).to(torch.empty(0).device))
        if config.learned_weights:
            self.router = self.make_router(generator=generator)

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        if inp.token_ids_T is None:
            raise ValueError(
                "--gate is hash and the layer received no token ids; allowed: the int64 id of "
                "every token; pass FFNContext(token_ids_BS=...) to the layer or token_ids_T= "
                "to GateInput"
            )
        num_tokens = len(inp.x_TD)
        device = inp.x_TD.device
        # index_select, unlike table_V[ids], refuses negative ids.
        expert_Tk = self.table_V.index_select(0, inp.token_ids_T).view(num_tokens, c.topk)
        if c.learned_weights:
            weight_Tk = c.routed_scaling_factor * selected_weights(
                linear_fp32(inp.x_TD, self.router),
                expert_Tk,
                c.score_function,
                c.norm_topk_prob and c.topk > 1,
            )
        else:
            weight_Tk = torch.full((num_tokens, c.topk), 1 / c.topk, device=device)
        return Routing(
            token_A=torch.arange(num_tokens, device=device).repeat_interleave(c.topk),
            token_major=True,
            expert_A=expert_Tk.flatten(),
            weight_A=weight_Tk.flatten(),
            aux_loss=torch.zeros((), device=device),
        )


def _draw_table(
    vocab_size: int, num_experts: int, topk: int, generator: torch.Generator
) -> Tensor:
    """Draw the experts of each id: int64 [V, k] on the CPU, distinct in a row."""
    order_V = torch.randperm(vocab_size, generator=generator, device="cpu")
    num_blocks = -(-vocab_size // num_experts)
    key_BE = torch.rand(num_blocks, num_experts, generator=generator, device="cpu")
    # The first expert is at distance 0, as it is with one expert per id.
    key_BE[:, 0] = -1
    distance_Bk = key_BE.argsort(-1)[:, :topk]
    block_V = order_V // num_experts
    return (order_V[:, None] + distance_Bk[block_V]) % num_experts
