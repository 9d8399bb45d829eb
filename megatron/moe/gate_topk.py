"""What all gates that select a fixed number of experts by their scores have in common.

    x' = D^-0.5 * g * x / rms(x)      (router_norm, g learned [D]; else x' = x)
    z = logit_scale * (W x' + c)      (c: learned with router_bias, else 0)
    z = a tanh(z / a)                 (a = logit_softcap > 0)
    s = softmax(z), sigmoid(z) or sqrt(softplus(z))           (score_function)
    I = top-k of s + b in the topk_group best groups, or of z + b (bias_on logit)
        a group's score is its best s + b, or the sum of its two best
        b: see `megatron.moe.gate_bias`, 0 with bias_rule none
    w_i = scale * u_i * s_i / max(sum_{j in I} s_j, norm_floor)   with norm_topk_prob
    w_i = scale * u_i * s_i                                       without
        scale = routed_scaling_factor, u: learned [E] with expert_scale, else 1

With softmax, norm_topk_prob and no floor, the weights are softmax of the selected z.

Who uses what: router_bias gpt-oss; router_norm and expert_scale Gemma 4; logit_scale
Muse; logit_softcap Laguna; sqrtsoftplus DeepSeek-V4; norm_floor ERNIE 4.5; bias_on
logit Kolibri; groups of two best with softmax Mistral 4. `megatron.moe.released_routers`
has a table of models.

Shape suffixes: T tokens, D hidden, E experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.moe.gate import GateContext
from megatron.moe.gate_bias import BiasConfig, BiasedGate
from megatron.moe.gate_functional import (
    SCORE_FUNCTIONS,
    expert_scores,
    group_limited_scores,
    linear_fp32,
    normalized_scores,
    selected_weights,
)
from megatron.moe.gate_options import (
    GroupConfig,
    SimBalConfig,
    require_choice,
    require_field,
    setting,
)
from megatron.moe.losses import aux_losses, z_loss
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing, RoutingScores

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class RouterConfig(SimBalConfig):
    """Options of the linear layer that computes logits, and of its input and output."""

    router_bias: bool = False
    """add a learned vector to the logits, 0 at the start"""
    router_norm: bool = False
    """normalise the router's input by its root mean square, then multiply it by a
    learned vector and by hidden_size^-0.5"""
    logit_scale: float = 1.0
    """factor applied to the logits"""
    logit_softcap: float = 0.0
    """limit logits smoothly to this absolute value, as c tanh(z / c); 0: no limit"""

    def __post_init__(self):
        super().__post_init__()
        require_field(self, "logit_scale", self.logit_scale > 0, "a positive number")
        require_field(self, "logit_softcap", self.logit_softcap >= 0, "0 (no limit) or more")


@dataclass(frozen=True)
class TopKConfig(BiasConfig, RouterConfig, GroupConfig):
    """Options of gates that select the k best experts."""

    score_function: str = field(default="softmax", metadata={"choices": SCORE_FUNCTIONS})
    """function that turns an expert's logit into its score"""
    norm_floor: float = field(default=0.0, metadata={"needs": setting("norm_topk_prob")})
    """lower bound of the sum by which --norm-topk-prob divides"""
    expert_scale: bool = False
    """multiply the weights of each expert by a learned number, 1 at the start"""
    routed_scaling_factor: float = 1.0
    """factor applied to every weight"""

    def __post_init__(self):
        super().__post_init__()
        require_choice(self, "score_function", SCORE_FUNCTIONS)
        require_field(self, "norm_floor", self.norm_floor >= 0, "0 (no bound) or more")
        if self.bias_rule == "quantile" and self.n_group > 1:
            # The best biases depend on which groups a token keeps, and that on the biases.
            raise ValueError(
                f"--bias-rule is quantile with --n-group {self.n_group}; quantile balancing "
                "needs --n-group 1, groups need --bias-rule sign or none"
            )


@dataclass(frozen=True, slots=True)
class TopKSelection:
    """The experts that a gate selects."""

    logits_TE: Tensor
    normalized_TE: Tensor
    """scores of all experts divided by their sum"""
    token_A: Tensor
    """token of each of the flattened choices"""
    expert_Tk: Tensor
    weight_Tk: Tensor
    highest_Tk: Tensor
    """experts with the highest scores: without bias and groups"""
    step_sums: dict[str, Tensor]
    """what the rule of the bias counts"""
    ranked_TE: Tensor
    """detached scores by which the experts were selected, -inf in groups that were not"""


class RouterNorm(nn.Module):
    """RMSNorm of the router's input with the factor D^-0.5 (Gemma 4)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.float()
        mean_square_T1 = x_TD.square().mean(-1, keepdim=True)
        x_TD = x_TD * (mean_square_T1 + _NORM_EPS).rsqrt()
        return x_TD * self.weight.float() * len(self.weight) ** -0.5


class TopKBaseGate(BiasedGate):
    """Base class of gates whose Config is a `TopKConfig`."""

    def __init__(self, config: Any, context: GateContext):
        super().__init__(config, context)
        self.router = self.make_router(bias=config.router_bias)
        if config.router_norm:
            self.router_norm = RouterNorm(context.hidden_size)
        if config.expert_scale:
            self.expert_scale_E = nn.Parameter(torch.ones(self.num_experts))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits z of all experts: fp32 [T, E]."""
        c = self.config
        if c.router_norm:
            x_TD = self.router_norm(x_TD)
        logits_TE = linear_fp32(x_TD, self.router)
        if c.logit_scale != 1:
            logits_TE = logits_TE * c.logit_scale
        if c.logit_softcap:
            logits_TE = c.logit_softcap * (logits_TE / c.logit_softcap).tanh()
        return logits_TE

    def select(self, logits_TE: Tensor) -> TopKSelection:
        """Select the experts of each token, and compute their weights."""
        c = self.config
        highest_Tk = logits_TE.detach().topk(c.topk, dim=-1).indices
        expert_Tk = highest_Tk
        ranked_TE = logits_TE.detach()
        step_sums = {}
        if c.n_group > 1 or self.bias_rule is not None:
            score_TE = expert_scores(logits_TE.detach(), c.score_function)
            ranked_TE = score_TE
            if self.bias_rule is not None:
                ranked_TE = self.biased_scores(logits_TE, score_TE)
                step_sums = self.bias_step_sums(logits_TE, score_TE)
            if c.n_group > 1:
                ranked_TE = group_limited_scores(
                    ranked_TE, c.n_group, c.topk_group, best=c.group_score_best
                )
            expert_Tk = ranked_TE.topk(c.topk, dim=-1).indices
        normalized_TE = normalized_scores(logits_TE, c.score_function)
        weight_Tk = selected_weights(
            logits_TE,
            expert_Tk,
            c.score_function,
            c.norm_topk_prob,
            c.norm_floor,
            normalized_TE,
        )
        if c.expert_scale:
            weight_Tk = weight_Tk * self.expert_scale_E.float()[expert_Tk]
        token_T = torch.arange(len(expert_Tk), device=expert_Tk.device)
        return TopKSelection(
            logits_TE=logits_TE,
            normalized_TE=normalized_TE,
            token_A=token_T.repeat_interleave(c.topk),
            expert_Tk=expert_Tk,
            weight_Tk=weight_Tk * c.routed_scaling_factor,
            highest_Tk=highest_Tk,
            step_sums=step_sums,
            ranked_TE=ranked_TE,
        )

    def balance_loss(
        self, inp: GateInput, selection: TopKSelection, expert_Tk: Tensor
    ) -> LoadBalancingLoss:
        """Return the balance loss for given choices of each token.

        Args:
            expert_Tk: those that count, the selected or the highest ones.
        """
        c = self.config
        return LoadBalancingLoss.of(
            inp,
            selection.normalized_TE,
            selection.token_A,
            expert_Tk.flatten(),
            coeff=c.loss_coeff,
            scope=c.balance_scope,
        )

    def make_routing(
        self,
        selection: TopKSelection,
        *balance: LoadBalancingLoss,
        metric_means: dict[str, Tensor] | None = None,
    ) -> Routing:
        """Return the routing with these balance losses and the z-loss.

        Args:
            metric_means: the gate's own metrics, added to the common ones.
        """
        c = self.config
        num_tokens = max(1, len(selection.expert_Tk))
        z_term = 0.0
        if c.z_loss_coeff:
            z_term = c.z_loss_coeff * z_loss(selection.logits_TE)
        top1_T = selection.normalized_TE.detach().amax(-1)
        means = {"top1_probability": top1_T.sum() / num_tokens, **(metric_means or {})}
        if self.bias_rule is not None:
            means |= self.bias_metric_means(selection.expert_Tk, selection.highest_Tk)
        return Routing(
            token_A=selection.token_A,
            token_major=True,
            expert_A=selection.expert_Tk.flatten(),
            weight_A=selection.weight_Tk.flatten(),
            **aux_losses(*balance, extra=z_term),
            metric_means=means,
            step_sums=selection.step_sums,
            router_logits_TC=selection.logits_TE,
            scores=RoutingScores(
                ranked_TC=selection.ranked_TE, share_TC=selection.normalized_TE.detach()
            ),
        )
