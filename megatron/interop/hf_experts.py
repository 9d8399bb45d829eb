"""Our grouped experts inside models of transformers, as one of its experts implementations.

    register_experts()
    model.set_experts_implementation("moe_megatron")

The model keeps its parameters and their names. Its experts are then computed as in an MoE layer
of ours: one expert at a time on rows that stay in the cache on a CPU, Triton kernels on a GPU.

Shape suffixes: T tokens, k experts per token, A = T x k assignments, S = A rows sorted by expert,
E experts, D hidden, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import PermutedTokens, build_dispatch_plan
from megatron.moe.experts.grouped_mlp import grouped_mlp
from megatron.moe.routing import Routing
from megatron.optional_packages import import_optional

EXPERTS_IMPLEMENTATION = "moe_megatron"
"""Name of the implementation in transformers"""
_ACTIVATIONS = {"SiLUActivation": "swiglu", "SiLU": "swiglu", "GELUActivation": "geglu"}
"""Gated activation by the class of transformers' activation function"""


def register_experts() -> None:
    """Add our experts to the implementations that transformers knows.

    Raises:
        ValueError: transformers is not installed.
    """
    moe = import_optional("transformers.integrations.moe", "hf", "register_experts")
    moe.ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of a model of transformers; transformers calls this.

    Args:
        experts: module with gate_up_proj [E, 2 H, D] and down_proj [E, D, H].
        hidden_states: [T, D].
        top_k_index: experts of each token, int64 [T, k].
        top_k_weights: their weights [T, k].
    Returns:
        [T, D] in the dtype of the hidden states.
    Raises:
        ValueError: the experts are of another form than the above.
    """
    activation = _activation_of(experts)
    w1_EHD, w3_EHD = experts.gate_up_proj.chunk(2, dim=1)
    # Under autocast the hidden states may be wider than the weights.
    x_TD = hidden_states.to(w1_EHD.dtype)
    weight_A = top_k_weights.flatten().to(torch.promote_types(x_TD.dtype, torch.float32))
    rows = _sort_by_expert(top_k_index, weight_A, experts.num_experts)
    weight_S = GatherWeights.apply(weight_A, rows)
    y_TD = grouped_mlp(x_TD, weight_S, w1_EHD, w3_EHD, experts.down_proj, rows, activation)
    return y_TD.to(hidden_states.dtype)


def _sort_by_expert(top_k_index: Tensor, weight_A: Tensor, num_experts: int) -> PermutedTokens:
    """Return all assignments as rows sorted by expert."""
    num_tokens, topk = top_k_index.shape
    token_T = torch.arange(num_tokens, device=top_k_index.device)
    routing = Routing(
        token_T.repeat_interleave(topk),
        top_k_index.flatten(),
        weight_A,
        weight_A.new_zeros(()),
        token_major=True,
    )
    return build_dispatch_plan(routing, num_tokens, num_experts).routed


def _activation_of(experts: nn.Module) -> str:
    """Return our name of the experts' activation.

    Raises:
        ValueError: the experts have another form than two matrices with a gated activation.
    """
    name = type(experts).__name__
    form = {
        "gate and up projections one after the other": experts.has_gate
        and experts.is_concatenated,
        "the usual gating": type(experts)._apply_gate is _usual_gating(),
        "no biases": not experts.has_bias,
        "matrices [outputs, inputs]": not experts.is_transposed,
        "no norm after the experts": not experts.has_post_expert_norm,
        "all experts on this rank": not experts._is_expert_parallel,
    }
    is_known = all(form.values())
    advice = 'Use set_experts_implementation("grouped_mm").'
    what = "the experts implementation moe_megatron computes experts whose class"
    require(is_known, what, name, f"experts with {', '.join(form)}", advice)
    act = type(experts.act_fn).__name__
    require(
        act in _ACTIVATIONS, f"the activation of {name}", act, " ".join(_ACTIVATIONS), advice
    )
    return _ACTIVATIONS[act]


def _usual_gating() -> Callable[[nn.Module, Tensor], Tensor]:
    """Return transformers' function act(gate) * up, which most experts have."""
    from transformers.integrations.moe import _default_apply_gate

    return _default_apply_gate
