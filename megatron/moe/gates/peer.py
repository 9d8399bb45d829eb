"""PEER: each head finds the best k of N = s_1 * ... * s_n tiny experts by scoring only s_1 + ... + s_n product keys.

Papers: "Mixture of A Million Experts" (He 2024); product keys: Lample et al. 2019.

    q = norm(W_q x) per head, in n parts;  S_i = q_i K_i^T;  score of expert (j_1, .., j_n) = sum_i S_i[j_i]
    I = top-k of the scores, w = softmax over I (or sigmoid);  y = sum over heads and I of w * v act(u . x)

Departures: BatchNorm of the queries, as in the paper, depends on how tokens are split over ranks and micro-batches and
sees future ones. Here "batch" takes running statistics of the optimizer steps that are over (mean 0, variance 1 in the
first), in evaluation too, without gradient; "layer" is LayerNorm of each head's query without scale and shift.
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


class PEERGate(Gate, name="peer"):
    """The k experts of each head whose product keys match the head's query best."""

    expert_kind = "peer"

    @dataclass(frozen=True)
    class Config:
        peer_num_experts: int = 0
        """number of experts; 0: --num-experts"""
        peer_product_key_dim: tuple[int, ...] = field(default=())
        """keys per dimension, whose product is the number of experts; empty: two numbers, as close as they can be"""
        peer_num_heads: int = 8
        """queries per token; they share keys and experts"""
        peer_topk: int = 16
        """experts per token and head; all of them where there are fewer"""
        peer_expert_hidden_size: int = 0
        """hidden units of one expert; 0: --moe-ffn-hidden-size, or 1"""
        peer_query_size: int = 128
        """width of one head's query, a multiple of the number of dimensions"""
        peer_query_norm: str = field(
            default="batch", metadata={"choices": ("batch", "layer", "none")}
        )
        """normalise queries by running statistics of past steps, within each head, or not"""
        score_function: str = field(
            default="softmax", metadata={"choices": ("softmax", "sigmoid")}
        )
        """weight of an expert from its score: softmax over the head's k, or sigmoid"""
        peer_layers: tuple[int, ...] = field(default=())
        """the blocks, from 0, that are PEER layers; empty: what the mixture's own flags say, or the middle one"""

        def __post_init__(self):
            for name, least in (
                ("num_heads", 1),
                ("topk", 1),
                ("query_size", 1),
                ("expert_hidden_size", 0),
            ):
                require_field(
                    self,
                    f"peer_{name}",
                    getattr(self, f"peer_{name}") >= least,
                    f"{least} or more",
                )
            dims, size, parts = (
                self.peer_product_key_dim,
                self.peer_query_size,
                len(self.peer_product_key_dim) or 2,
            )
            require_field(
                self, "peer_product_key_dim", all(s > 0 for s in dims), "positive integers"
            )
            require_field(
                self,
                "peer_query_size",
                size % parts == 0,
                f"a multiple of the {parts} dimensions",
            )
            for name, allowed in (
                ("peer_query_norm", "batch layer none"),
                ("score_function", "softmax sigmoid"),
            ):
                require_field(self, name, getattr(self, name) in allowed.split(), allowed)

        def dims(self, num_experts: int) -> tuple[int, ...]:
            small = next(
                s for s in range(math.isqrt(num_experts), 0, -1) if num_experts % s == 0
            )
            return self.peer_product_key_dim or (small, num_experts // small)

        def check(self, num_experts: int) -> None:
            product, total = (
                math.prod(self.dims(num_experts)),
                f"{num_experts}, the number of experts",
            )
            require_field(
                self,
                "peer_num_experts",
                self.peer_num_experts in (0, num_experts),
                f"0 or {total}",
            )
            require_field(
                self, "peer_product_key_dim", product == num_experts, f"product {total}"
            )

        def moe_overrides(self, moe: dict, num_layers: int) -> dict:
            """What these flags say of the mixture: fields of MoEConfig, given those that were set."""
            total = (
                moe.get("num_experts")
                or self.peer_num_experts
                or math.prod(self.peer_product_key_dim or (0,))
            )
            require_field(
                self, "peer_num_experts", total > 0, "a positive integer without --num-experts"
            )
            self.check(total)
            layers, last = self.peer_layers, num_layers - 1
            require_field(
                self,
                "peer_layers",
                all(0 <= i <= last for i in layers),
                f"numbers of blocks, 0 to {last}",
            )
            elsewhere = any(
                moe.get(name) for name in ("moe_layers", "expert_interval", "moe_first_k_dense")
            )
            layers = layers or (() if elsewhere else (num_layers // 2,))
            width = self.peer_expert_hidden_size or moe.get("moe_ffn_hidden_size") or 1
            return {
                "num_experts": total,
                "moe_ffn_hidden_size": width,
                **({"moe_layers": layers} if layers else {}),
            }

    def __init__(self, config, context):
        super().__init__(config, context)
        dims, shape = (
            config.dims(context.num_experts),
            (config.peer_num_heads, config.peer_query_size),
        )
        part, generator = config.peer_query_size // len(dims), context.generator()
        self.query = self.make_router(math.prod(shape), generator)
        self.keys = nn.ModuleList(
            make_linear(part, size, part**-0.5, generator) for size in dims
        )
        if (
            config.peer_query_norm == "batch"
        ):  # of past steps' queries, weighted by 0.9^age, and the sum of the weights
            self.register_buffer("query_mean", torch.zeros(shape))
            self.register_buffer("query_variance", torch.ones(shape))
            self.register_buffer("stat_weight", torch.zeros(()))

    @classmethod
    def experts_per_token(cls, config, num_experts: int) -> tuple[int, int]:
        return min(config.peer_topk, num_experts), min(
            config.peer_num_heads * config.peer_topk, num_experts
        )

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        raw_THQ = linear_fp32(inp.x_TD, self.query).unflatten(
            -1, (c.peer_num_heads, c.peer_query_size)
        )
        parts = zip(
            self.normalise(raw_THQ).chunk(len(self.keys), dim=-1), self.keys, strict=True
        )
        score_THk, expert_THk = retrieve(
            [linear_fp32(part, table) for part, table in parts], c.peer_topk
        )
        weight_A = (
            score_THk.softmax(-1) if c.score_function == "softmax" else score_THk.sigmoid()
        ).flatten()
        expert_A = expert_THk.flatten()
        token_A = torch.arange(len(raw_THQ), device=weight_A.device).repeat_interleave(
            expert_THk.shape[1:].numel()
        )
        sums = {
            "expert_weight": weight_A.new_zeros(self.num_experts).scatter_add_(
                0, expert_A, weight_A.detach()
            )
        }
        if self.training and c.peer_query_norm == "batch":
            sums["query_sum"], sums["query_square"] = sum_and_square_sum(raw_THQ.detach())
        return Routing(
            token_A,
            expert_A,
            weight_A,
            aux_loss=weight_A.new_zeros(()),
            token_major=True,
            metric_sums=sums,
        )

    def output_gain(self, width: int) -> float:
        """What multiplies the std of outputs of `width` hidden units to start with a dense 4 D layer's variance."""
        c, k = self.config, min(self.config.peer_topk, self.num_experts)
        scale = (
            k if c.score_function == "softmax" else 2
        )  # over the weights, at first about 1 / k or 1 / 2
        return scale * math.sqrt(4 * self.context.hidden_size / (c.peer_num_heads * k * width))

    def normalise(self, raw_THQ: Tensor) -> Tensor:
        if self.config.peer_query_norm == "batch":
            return (raw_THQ - self.query_mean) * self.query_variance.clamp_min(1e-5).rsqrt()
        return (
            torch.layer_norm(raw_THQ, raw_THQ.shape[-1:])
            if self.config.peer_query_norm == "layer"
            else raw_THQ
        )

    def post_optimizer_step(self, step: StepTotals) -> None:
        if self.config.peer_query_norm == "batch":
            mean, square = (
                step.metric_sums[n].double() / step.num_tokens.clamp_min(1)
                for n in ("query_sum", "query_square")
            )
            rate = 0.1 * (
                (step.num_tokens > 0) & (square < 1e36).all()
            )  # a step that overflowed counts for nothing
            self.stat_weight += rate * (1 - self.stat_weight)
            share = rate / self.stat_weight.clamp_min(0.1)
            variance = (square - mean**2).clamp_min(0) + (1 - share) * (
                mean - self.query_mean
            ) ** 2  # in, between steps
            self.query_variance.lerp_(variance.nan_to_num(0, 0, 0).float(), share)
            self.query_mean.lerp_(mean.nan_to_num(0, 0, 0).float(), share)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, Tensor | float]:
        return dict(
            zip(
                ("expert_usage", "expert_unevenness_nats"),
                usage(sums["expert_weight"]),
                strict=True,
            )
        )


def retrieve(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums of one score [.., s_i] per dimension, as (sum, index) [.., min(k, N)], largest first; the last
    dimension counts fastest. Exact over all N: what begins one of the k best is among the k best itself."""
    best, index = scores[0].topk(min(k, scores[0].shape[-1]))
    for score in scores[1:]:
        more, column = score.topk(min(k, score.shape[-1]))
        sums = (best[..., :, None] + more[..., None, :]).flatten(-2)
        best, pair = sums.topk(min(k, sums.shape[-1]))
        index = index.gather(-1, pair // more.shape[-1]) * score.shape[-1] + column.gather(
            -1, pair % more.shape[-1]
        )
    return best, index


def usage(weight_E: Tensor) -> tuple[float, float]:
    """(share of experts with any weight, unevenness log N + sum z log z in nats for weights z that sum to 1)."""
    z = weight_E.double() / weight_E.double().sum().clamp_min(1e-300)
    return float((weight_E != 0).double().mean()), math.log(len(z)) + float(
        torch.special.xlogy(z, z).sum()
    )
