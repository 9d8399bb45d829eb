"""PEER: retrieval of the top k among up to a million tiny experts by product keys.

Papers: "Mixture of A Million Experts" (He 2024); product keys: Lample et al. 2019. Each
head finds the best k of N = s_1 * ... * s_n experts by scoring only s_1 + ... + s_n
keys.

    q = norm(W_q x) per head, split into n parts;  S_i = q_i K_i^T
    score of expert (j_1, .., j_n) = sum_i S_i[j_i]
    I = top-k of the scores,  w = softmax over I (or sigmoid)
    y = sum over heads and I of w * v act(u . x)

Departures: BatchNorm of the queries, as in the paper, depends on how tokens are split
over ranks and micro-batches and sees future tokens. Here "batch" uses running
statistics of completed optimizer steps (mean 0 and variance 1 in the first step), in
evaluation too, and without gradient; "layer" is LayerNorm of each head's query without
scale and shift.

Shape suffixes: T tokens, D hidden, H heads, Q query width, k experts per head, E
experts, A assignments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.moe.gate import Gate
from megatron.moe.gate_functional import linear_fp32, make_linear, sum_and_square_sum
from megatron.moe.gate_options import require_field
from megatron.moe.routing import GateInput, Routing, StepTotals

_STATISTICS_RATE = 0.1
"""Weight of the newest step in the running statistics of queries."""


class PEERGate(Gate, name="peer"):
    """Select the k experts of each head whose product keys best match its query."""

    expert_kind = "peer"

    @dataclass(frozen=True)
    class Config:
        peer_num_experts: int = 0
        """number of experts; 0: --num-experts"""
        peer_product_key_dim: tuple[int, ...] = field(default=())
        """number of keys in each dimension; their product is the number of experts;
        empty: two numbers, as close to each other as possible"""
        peer_num_heads: int = 8
        """queries per token; all heads share the keys and the experts"""
        peer_topk: int = 16
        """experts per token and head; all experts where there are fewer"""
        peer_expert_hidden_size: int = 0
        """hidden units of one expert; 0: --moe-ffn-hidden-size, or 1"""
        peer_query_size: int = 128
        """width of one head's query, a multiple of the number of key dimensions"""
        peer_query_norm: str = field(
            default="batch", metadata={"choices": ("batch", "layer", "none")}
        )
        """normalisation of queries: by running statistics of past steps (batch), within
        each head (layer), or none"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """function that turns scores into weights: softmax over the head's k experts,
        or sigmoid"""
        peer_layers: tuple[int, ...] = field(default=())
        """blocks, counted from 0, that are PEER layers; empty: as the MoE layer flags
        say, or the middle block if none is set"""

        def __post_init__(self):
            for name in ("peer_num_heads", "peer_topk", "peer_query_size"):
                require_field(self, name, getattr(self, name) >= 1, "1 or more")
            width = self.peer_expert_hidden_size
            require_field(self, "peer_expert_hidden_size", width >= 0, "0 or more")
            sizes = self.peer_product_key_dim
            positive = all(size > 0 for size in sizes)
            require_field(self, "peer_product_key_dim", positive, "positive integers")
            parts = len(sizes) or 2
            divisible = self.peer_query_size % parts == 0
            allowed = f"a multiple of the {parts} dimensions"
            require_field(self, "peer_query_size", divisible, allowed)
            known = self.peer_query_norm in ("batch", "layer", "none")
            require_field(self, "peer_query_norm", known, "batch layer none")
            known = self.score_function in ("softmax", "sigmoid")
            require_field(self, "score_function", known, "softmax sigmoid")

        def key_sizes(self, num_experts: int) -> tuple[int, ...]:
            """Return the number of keys in each dimension."""
            if self.peer_product_key_dim:
                return self.peer_product_key_dim
            smaller = math.isqrt(num_experts)
            while num_experts % smaller:
                smaller -= 1
            return smaller, num_experts // smaller

        def check(self, num_experts: int) -> None:
            total = f"{num_experts}, the number of experts"
            same = self.peer_num_experts in (0, num_experts)
            require_field(self, "peer_num_experts", same, f"0 or {total}")
            product = math.prod(self.key_sizes(num_experts))
            require_field(
                self, "peer_product_key_dim", product == num_experts, f"product {total}"
            )

        def moe_overrides(self, moe: dict, num_layers: int) -> dict:
            """Return the fields of MoEConfig that these flags determine.

            Args:
                moe: fields of MoEConfig that were set explicitly.
                num_layers: number of transformer blocks.
            Raises:
                ValueError: no number of experts, or a block outside the model.
            """
            total = moe.get("num_experts") or self.peer_num_experts
            if not total and self.peer_product_key_dim:
                total = math.prod(self.peer_product_key_dim)
            allowed = "a positive integer without --num-experts"
            require_field(self, "peer_num_experts", total > 0, allowed)
            self.check(total)

            layers = self.peer_layers
            inside = all(0 <= layer < num_layers for layer in layers)
            allowed = f"numbers of blocks, 0 to {num_layers - 1}"
            require_field(self, "peer_layers", inside, allowed)
            layer_flags = ("moe_layers", "expert_interval", "moe_first_k_dense")
            if not layers and not any(moe.get(name) for name in layer_flags):
                layers = (num_layers // 2,)

            width = self.peer_expert_hidden_size or moe.get("moe_ffn_hidden_size") or 1
            overrides = {"num_experts": total, "moe_ffn_hidden_size": width}
            if layers:
                overrides["moe_layers"] = layers
            return overrides

    def __init__(self, config, context):
        super().__init__(config, context)
        sizes = config.key_sizes(context.num_experts)
        query_shape = (config.peer_num_heads, config.peer_query_size)
        part = config.peer_query_size // len(sizes)
        generator = context.generator()
        self.query = self.make_router(math.prod(query_shape), generator)
        keys = [make_linear(part, size, part**-0.5, generator) for size in sizes]
        self.keys = nn.ModuleList(keys)
        if config.peer_query_norm == "batch":
            # Mean and variance of past steps' queries, weighted by 0.9^age, and the sum
            # of those weights.
            self.register_buffer("query_mean", torch.zeros(query_shape))
            self.register_buffer("query_variance", torch.ones(query_shape))
            self.register_buffer("stat_weight", torch.zeros(()))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        most = config.peer_num_heads * config.peer_topk
        return min(config.peer_topk, num_experts), min(most, num_experts)

    def capacity_k(self) -> int:
        return self.config.peer_num_heads * min(self.config.peer_topk, self.num_experts)

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        query_THQ = linear_fp32(inp.x_TD, self.query)
        query_THQ = query_THQ.unflatten(-1, (c.peer_num_heads, c.peer_query_size))
        parts = self.normalise(query_THQ).chunk(len(self.keys), dim=-1)
        scores = [linear_fp32(part, key) for part, key in zip(parts, self.keys, strict=True)]
        score_THk, expert_THk = retrieve(scores, c.peer_topk)
        if c.score_function == "softmax":
            weight_A = score_THk.softmax(-1).flatten()
        else:
            weight_A = score_THk.sigmoid().flatten()

        expert_A = expert_THk.flatten()
        per_token = expert_THk.shape[1:].numel()
        all_T = torch.arange(len(query_THQ), device=weight_A.device)
        expert_weight_E = weight_A.new_zeros(self.num_experts)
        expert_weight_E.scatter_add_(0, expert_A, weight_A.detach())
        sums = {"expert_weight": expert_weight_E}
        if self.training and c.peer_query_norm == "batch":
            sums["query_sum"], sums["query_square"] = sum_and_square_sum(query_THQ.detach())
        return Routing(
            token_A=all_T.repeat_interleave(per_token),
            expert_A=expert_A,
            weight_A=weight_A,
            aux_loss=weight_A.new_zeros(()),
            token_major=True,
            metric_sums=sums,
        )

    def output_gain(self, width: int) -> float:
        """Return the factor on the initial std of output weights.

        With it the layer's initial output has the variance of a dense layer of width 4
        D.

        Args:
            width: hidden units of one expert.
        """
        c = self.config
        k = min(c.peer_topk, self.num_experts)
        # The inverse of the initial weights, which are about 1 / k or 1 / 2.
        scale = k if c.score_function == "softmax" else 2
        return scale * math.sqrt(4 * self.context.hidden_size / (c.peer_num_heads * k * width))

    def normalise(self, query_THQ: Tensor) -> Tensor:
        """Normalise queries as --peer-query-norm says."""
        kind = self.config.peer_query_norm
        if kind == "batch":
            scale_HQ = self.query_variance.clamp_min(1e-5).rsqrt()
            return (query_THQ - self.query_mean) * scale_HQ
        if kind == "layer":
            return torch.layer_norm(query_THQ, query_THQ.shape[-1:])
        return query_THQ

    def post_optimizer_step(self, step: StepTotals) -> None:
        """Update the running statistics of queries."""
        if self.config.peer_query_norm != "batch":
            return
        num_tokens = step.num_tokens.clamp_min(1)
        mean = step.metric_sums["query_sum"].double() / num_tokens
        square = step.metric_sums["query_square"].double() / num_tokens
        # A step without tokens, or whose queries overflowed, does not count.
        usable = (step.num_tokens > 0) & (square < 1e36).all()
        rate = _STATISTICS_RATE * usable
        self.stat_weight += rate * (1 - self.stat_weight)
        share = rate / self.stat_weight.clamp_min(_STATISTICS_RATE)
        # Variance within the step, and between this step and the earlier ones.
        between = (1 - share) * (mean - self.query_mean) ** 2
        variance = (square - mean**2).clamp_min(0) + between
        self.query_variance.lerp_(variance.nan_to_num(0, 0, 0).float(), share)
        self.query_mean.lerp_(mean.nan_to_num(0, 0, 0).float(), share)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        used, unevenness = usage(sums["expert_weight"])
        return {"expert_usage": used, "expert_unevenness_nats": unevenness}


def retrieve(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest sums that take one score from each dimension.

    The search is exact over all N combinations: a prefix of one of the k best is itself
    among the k best prefixes.

    Args:
        scores: one tensor [.., s_i] per dimension.
    Returns:
        (sum, index) [.., min(k, N)] in descending order; the last dimension varies
        fastest
        in the index.
    """
    best, index = scores[0].topk(min(k, scores[0].shape[-1]))
    for score in scores[1:]:
        size = score.shape[-1]
        added, column = score.topk(min(k, size))
        num_added = added.shape[-1]
        sums = (best[..., :, None] + added[..., None, :]).flatten(-2)
        best, pair = sums.topk(min(k, sums.shape[-1]))
        index = index.gather(-1, pair // num_added) * size + column.gather(-1, pair % num_added)
    return best, index


def usage(weight_E: Tensor) -> tuple[float, float]:
    """Return the fraction of experts used and the unevenness of their total weights.

    The unevenness is log N + sum z log z in nats, for weights z that sum to 1 (He
    2024).
    """
    total_E = weight_E.double()
    z_E = total_E / total_E.sum().clamp_min(1e-300)
    used = float((weight_E != 0).double().mean())
    return used, math.log(len(z_E)) + float(torch.special.xlogy(z_E, z_E).sum())
