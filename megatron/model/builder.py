"""Builds the transformer of a run: dense layers, MoE layers with their gates, initial weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron.config.attention import AttentionConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.rotary import RotaryConfig
from megatron.config.schema import RunConfig
from megatron.model.gpt import GPT
from megatron.model.mlp import MLP
from megatron.model.parameter_count import count_parameters, parameter_table
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.expert_init import ExpertInit, expert_output_std
from megatron.moe.experts.expert_type import ExpertContext, ExpertType, create_experts
from megatron.moe.gate import Gate, create_gate, gate_class
from megatron.moe.layer import MoELayer
from megatron.moe.peer.experts import PEERExperts, choose_peer_backend
from megatron.moe.peer.layer import PEERLayer
from megatron.parallel.groups import Groups


def build_model(
    model: ModelConfig,
    moe: MoEConfig,
    gate_options: Mapping[str, Mapping[str, Any]],
    *,
    vocab_size: int,
    seed: int,
    groups: Groups,
    expert_options: dict[str, Any] | None = None,
    recompute: bool = False,
    attention: AttentionConfig | None = None,
    rotary: RotaryConfig | None = None,
) -> GPT:
    """Build a rank's model with its initial weights.

    The weights are fp32 on the CPU, or without values on `meta` under
    `torch.device("meta")`. They depend on the seed only, and not on the number of ranks or
    on how experts are sharded.

    Args:
        gate_options: fields of each gate's Config by the name of the gate; those that are
            missing have their defaults.
        vocab_size: size of the vocabulary before padding; it is padded to a multiple of
            `model.make_vocab_size_divisible_by`.
        seed: seed of the initial weights.
        groups: ranks over which experts are sharded.
        expert_options: fields of the expert type's Config.
        recompute: activation recomputation.
        attention: options of the attention layers; None: the defaults.
        rotary: options of rotary positions; None: the defaults.
    Raises:
        ValueError: a gate is unknown or refuses its options.
    """
    gates = _gate_of_each_layer(model, moe, gate_options)

    def make_ffn(layer: int) -> nn.Module:
        name = gates[layer]
        if name is None:
            return MLP(model.hidden_size, model.ffn_size, model.act)
        options = {**_position(gates, layer), **gate_options.get(name, {})}
        gate = _create_gate(name, model, moe, vocab_size=vocab_size, seed=seed, options=options)
        return make_moe_layer(
            gate, model, moe, expert_options, layer=layer, seed=seed, groups=groups
        )

    gpt = GPT(
        model,
        model.padded_vocab(vocab_size),
        make_ffn=make_ffn,
        recompute=recompute,
        aux_loss_reduction=moe.moe_aux_loss_reduction,
        attention=attention,
        rotary=rotary,
    )
    if not next(gpt.parameters()).is_meta:
        gpt.init_weights(seed)
    return gpt


def build_run_config_model(
    config: RunConfig, vocab_size: int, groups: Groups | None = None
) -> GPT:
    """Build a rank's model of all sections of a configuration; see `build_model`.

    Args:
        vocab_size: vocabulary size before padding.
        groups: ranks over which experts are sharded; None: this process has all of them.
    """
    return build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=vocab_size,
        seed=config.train.seed,
        groups=groups or Groups(),
        expert_options=config.expert_options,
        recompute=config.train.recompute_activations,
        attention=config.attention,
        rotary=config.rotary,
    )


def _create_gate(
    name: str,
    model: ModelConfig,
    moe: MoEConfig,
    *,
    vocab_size: int,
    seed: int,
    options: dict[str, Any],
) -> Gate:
    return create_gate(
        name,
        hidden_size=model.hidden_size,
        num_experts=moe.num_experts,
        vocab_size=vocab_size,
        seed=seed,
        init_std=model.init_method_std,
        **options,
    )


def _gate_of_each_layer(
    model: ModelConfig, moe: MoEConfig, gate_options: Mapping[str, Any]
) -> list[str | None]:
    """Return the gate of each block; None: dense.

    Raises:
        AssertionError: options are not by gate, and would be ignored.
    """
    gates = moe.gate_layers.gates
    unknown = gate_options.keys() - gates
    assert not unknown, f"gate_options has {sorted(unknown)}; allowed: {' '.join(gates)}"
    return moe.gates(model.num_layers)


def _position(gates: Sequence[str | None], layer: int) -> dict[str, int]:
    """Return where block `layer` is among the MoE layers, as `create_gate` takes it.

    Args:
        gates: gate of each block; None: dense.
    """
    with_experts = [name is not None for name in gates]
    return {
        "layer": sum(with_experts[:layer]),
        "num_moe_layers": sum(with_experts),
        "gate_layer": gates[:layer].count(gates[layer]),
    }


def size_table(model: GPT) -> str:
    """Return a table of the model's parameters by part, in total and active per token."""
    return parameter_table(count_parameters(model))


def choose_moe_backend(
    model: ModelConfig, moe: MoEConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Choose the implementation of the expert computation.

    Args:
        device: device of the model.
        dtype: compute dtype.
    Returns:
        The name of the backend, and the reason for the choice.
    Raises:
        ValueError: --moe-backend names a backend that cannot be used here.
    """
    kinds = {gate_class(name).expert_kind for name in moe.gate_layers.gates}
    if kinds == {"peer"}:
        return choose_peer_backend(moe.moe_backend, device.type, dtype)
    features = (moe.moe_latent_size or model.hidden_size, moe.expert_size(model.ffn_size))
    return choose_expert_backend(moe.moe_backend, device.type, dtype, features)


def make_moe_layer(
    gate: Gate,
    model: ModelConfig,
    moe: MoEConfig,
    expert_options: dict[str, Any] | None = None,
    *,
    layer: int,
    seed: int,
    groups: Groups,
) -> MoELayer:
    """Build this rank's part of one MoE layer.

    Args:
        expert_options: fields of the expert type's Config.
        layer: index of the block, which with `seed` determines the initial weights.
        groups: ranks over which the experts are sharded.
    Raises:
        ValueError: a parameter of the gate has no dimension.
    """
    _check_parameters(gate)
    num_local = moe.num_experts // groups.ep_size
    init = ExpertInit(
        seed=seed,
        layer=layer,
        first_expert=groups.ep_rank * num_local,
        init_std=model.init_method_std,
        output_std=expert_output_std(model.init_method_std, model.num_layers),
    )
    layer_class = PEERLayer if gate.expert_kind == "peer" else MoELayer
    experts, num_stacks = _make_experts(gate, model, moe, expert_options or {}, num_local, init)
    shared = None
    if moe.moe_shared_experts:
        shared = MLP(model.hidden_size, moe.shared_size(model.ffn_size), model.act)
    moe_layer = layer_class(
        gate,
        experts,
        num_stacks,
        shared=shared,
        train_capacity_factor=moe.moe_train_capacity_factor,
        eval_capacity_factor=moe.moe_eval_capacity_factor,
        min_capacity=moe.moe_min_capacity,
        groups=groups,
    )
    moe_layer.check_routing = moe.check_routing
    if moe.moe_shared_expert_gate:
        moe_layer.gate_shared_experts(model.hidden_size)
    if moe.moe_latent_size is not None:
        moe_layer.run_experts_in_latent_space(model.hidden_size, moe.moe_latent_size)
    return moe_layer


def _check_parameters(gate: Gate) -> None:
    """Raise ValueError for a 0-d parameter: ranges of it cannot be stored or sharded."""
    for name, parameter in gate.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(
                f"parameter {name} of {type(gate).__name__} has shape (); allowed: one dimension "
                "or more. Use nn.Parameter(torch.full((1,), value))"
            )


def _make_experts(
    gate: Gate,
    model: ModelConfig,
    moe: MoEConfig,
    expert_options: dict[str, Any],
    num_local: int,
    init: ExpertInit,
) -> tuple[ExpertType | PEERExperts, int]:
    """Build this rank's experts of one layer.

    Returns:
        The experts, and the number of stacked weights over all ranks.
    """
    width = moe.expert_size(model.ffn_size)
    if gate.expert_kind == "peer":
        tables = PEERExperts(
            moe.num_experts,
            num_local,
            model.hidden_size,
            width,
            model.act,
            init=replace(init, output_std=init.output_std * gate.output_gain(width)),
            backend=moe.moe_backend,
        )
        return tables, tables.num_blocks
    context = ExpertContext(
        num_local,
        moe.moe_latent_size or model.hidden_size,
        width,
        model.act,
        init=init,
        backend=moe.moe_backend,
        weight_on_input=moe.moe_weight_on_input,
    )
    return create_experts(moe.expert_type, context, **expert_options), moe.num_experts
