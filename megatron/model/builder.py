"""Builds the transformer of a run: dense layers, mixture layers with their gates, initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.gpt import GPT
from megatron.model.mlp import MLP
from megatron.model.parameter_count import count_parameters, parameter_table
from megatron.moe.experts import backends
from megatron.moe.experts.expert_init import ExpertInit, expert_output_std
from megatron.moe.experts.grouped_experts import GroupedExperts
from megatron.moe.gate import Gate, create_gate, gate_class
from megatron.moe.layer import MoELayer
from megatron.moe.peer import experts as peer_experts
from megatron.moe.peer.experts import PEERExperts, PEERTableConfig
from megatron.moe.peer.layer import PEERLayer
from megatron.parallel.groups import Groups


def build_model(
    model: ModelConfig,
    moe: MoEConfig,
    gate_options: dict[str, Any],
    *,
    vocab_size: int,
    seed: int,
    groups: Groups,
    recompute: bool = False,
) -> GPT:
    """The whole model in fp32 on the CPU (or on `meta` under `torch.device("meta")`), with its initial weights.

    Weights depend on the seed only, not on the number of ranks or how experts are sharded.

    Args:
        vocab_size: of the tokenizer; padded here to a multiple of `model.make_vocab_size_divisible_by`.
    Raises:
        ValueError: the gate is unknown or refuses its options.
    """
    moe_layers = [i for i in range(model.num_layers) if moe.is_moe_layer(i)]

    def make_ffn(layer: int) -> nn.Module:
        if layer not in moe_layers:
            return MLP(model.hidden_size, model.ffn_size, model.act)
        gate = create_gate(
            moe.gate,
            hidden_size=model.hidden_size,
            num_experts=moe.num_experts,
            layer=moe_layers.index(layer),
            num_moe_layers=len(moe_layers),
            vocab_size=vocab_size,
            seed=seed,
            init_std=model.init_method_std,
            **gate_options,
        )
        return make_moe_layer(gate, model, moe, layer=layer, seed=seed, groups=groups)

    gpt = GPT(model, model.padded_vocab(vocab_size), make_ffn=make_ffn, recompute=recompute)
    if not next(gpt.parameters()).is_meta:
        gpt.init_weights(seed)
    return gpt


def size_table(model: GPT, moe: MoEConfig, gate_options: dict[str, Any]) -> str:
    """The model's parameters by part, in all and active per token, as text."""
    gate = gate_class(moe.gate)
    return parameter_table(
        count_parameters(
            model, gate.experts_per_token(gate.Config(**gate_options), max(1, moe.num_experts))
        )
    )


def choose_moe_backend(
    model: ModelConfig, moe: MoEConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """(what multiplies the rows of a run's experts, why).

    Raises:
        ValueError: --moe-backend asks for one that is not possible here.
    """
    if gate_class(moe.gate).expert_kind == "peer":
        return peer_experts.choose_peer_backend(moe.moe_backend, device.type, dtype)
    features = (model.hidden_size, moe.moe_ffn_hidden_size or model.ffn_size)
    return backends.choose_expert_backend(moe.moe_backend, device.type, dtype, features)


def make_moe_layer(
    gate: Gate, model: ModelConfig, moe: MoEConfig, *, layer: int, seed: int, groups: Groups
) -> MoELayer:
    """This rank's part of one mixture layer."""
    local, width = moe.num_experts // groups.ep_size, moe.moe_ffn_hidden_size or model.ffn_size
    output_std = expert_output_std(model.init_method_std, model.num_layers)
    places = {
        "first": groups.ep_rank * local,
        "seed": seed,
        "layer": layer,
        "init_std": model.init_method_std,
    }
    shared = (
        MLP(model.hidden_size, moe.moe_shared_experts * width, model.act)
        if moe.moe_shared_experts
        else None
    )
    options = {
        "shared": shared,
        "train_capacity_factor": moe.moe_train_capacity_factor,
        "groups": groups,
        "eval_capacity_factor": moe.moe_eval_capacity_factor,
        "min_capacity": moe.moe_min_capacity,
    }
    if gate.expert_kind == "peer":
        tables = PEERTableConfig(
            moe.num_experts,
            local,
            model.hidden_size,
            width,
            model.act,
            **places,
            output_std=output_std * gate.output_gain(width),
        )
        peer = PEERExperts(tables, backend=moe.moe_backend)
        return PEERLayer(gate, peer, peer.num_blocks, **options)
    experts = GroupedExperts(
        local,
        model.hidden_size,
        width,
        model.act,
        init=ExpertInit(
            seed=seed,
            layer=layer,
            first_expert=groups.ep_rank * local,
            init_std=model.init_method_std,
            output_std=output_std,
        ),
        backend=moe.moe_backend,
    )
    return MoELayer(gate, experts, moe.num_experts, **options)
