"""Records of which the table of a model family consists; the tables are in `families/`.

A family says how keys of config.json and our settings belong together, in both directions, and
which tensors of theirs hold which tensors of ours. Settings are named "section.field": a section
of the run's configuration, or "gate.OPTION" and "expert.OPTION" for the options of the gate and of
the expert type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron.config.schema import RunConfig
from megatron.interop.hf.transforms import (
    FIRST_HALF,
    SECOND_HALF,
    UNCHANGED,
    Transform,
)

Settings = dict[str, Any]
"""Values of our settings by "section.field\""""


@dataclass(frozen=True)
class TensorRule:
    """A tensor of ours and the tensor, or one tensor per expert, that holds it."""

    ours: str
    """Name of our tensor, with {layer} for the index of the block"""
    theirs: str
    """Name of theirs, with {layer}, and with {expert} if each expert has a tensor of its own"""
    transform: Transform = UNCHANGED
    """How each of their blocks holds ours"""
    stacked: bool = False
    """Whether their tensor stacks all experts, to each of which the transform applies"""


@dataclass(frozen=True)
class TensorLayout:
    """The tensors for which a family has several layouts on disk, in one of them."""

    name: str
    tensors: tuple[TensorRule, ...]


@dataclass(frozen=True)
class UnmappedTensors:
    """Tensors of a source that our model does not have."""

    pattern: str
    """Regular expression of their full names"""
    reason: str
    kept: bool = False
    """Whether they are kept aside and written back on export; otherwise they are dropped"""
    num_layers_key: str = ""
    """Key of config.json whose value is the least {layer} of the pattern's group "layer\""""
    num_further_key: str = ""
    """Key of config.json with the number of layers from there on; empty: any number"""

    def matches(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether a tensor of a source belongs to these."""
        found = re.fullmatch(self.pattern, name)
        if found is None or not self.num_layers_key:
            return found is not None
        further = int(found.group("layer")) - config[self.num_layers_key]
        if not self.num_further_key:
            return further >= 0
        return 0 <= further < config[self.num_further_key]


class ConfigRule(Protocol):
    """How some keys of config.json and some of our settings belong together."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of config.json that the rule understands."""
        ...

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        """Return our settings.

        Args:
            config: Content of config.json, completed by the family's defaults.

        Raises:
            ValueError: A value is refused.
        """
        ...

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        """Return keys of config.json for a configuration of ours, as far as they express it."""
        ...


@dataclass(frozen=True)
class Family:
    """A model family of transformers."""

    name: str
    """Its model_type in config.json"""
    architecture: str
    """Class of the causal language model in transformers"""
    config: tuple[ConfigRule, ...]
    tensors: tuple[TensorRule, ...]
    """Tensors that have the same names in all layouts"""
    layouts: tuple[TensorLayout, ...] = ()
    """Layouts on disk of the other tensors; the first is how the family is released"""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that config.json may leave out, as transformers defines them"""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys in config.json, which files may have, and the names that rules use"""
    unmapped: tuple[UnmappedTensors, ...] = ()
    note: str = ""
    """Remark for the table of families in the documentation"""
    adjust: Callable[[RunConfig], RunConfig] | None = None
    """Makes a configuration of ours comparable before it is exported, for settings that two
    spellings express"""
    default_rule: Callable[[str], TensorRule] | None = None
    """Returns the rule of a tensor of ours that no other rule has; None: there is none"""
    read_run: Callable[[Mapping[str, Any]], RunConfig] | None = None
    """Returns the configuration that a config.json holds, in place of the rules' `to_ours`"""
    fp32_tensors: str = ""
    """Regular expression of our tensors that are written in fp32, whatever the others are"""
    pads_vocabulary: bool = False
    """Whether config.json has the size of the vocabulary before padding"""

    @property
    def known_keys(self) -> frozenset[str]:
        """Keys of config.json that some rule understands, and their aliases."""
        keys: set[str] = set(self.aliases)
        for rule in self.config:
            keys.update(rule.keys)
        return frozenset(keys)


# Tables of tensors that many families share.

DECODER_TENSORS = (
    TensorRule("embed_tokens.weight", "model.embed_tokens.weight"),
    TensorRule("norm.weight", "model.norm.weight"),
    TensorRule("lm_head.weight", "lm_head.weight"),
    TensorRule(
        "layers.{layer}.input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight"
    ),
    TensorRule(
        "layers.{layer}.post_attention_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
    ),
)
"""Embeddings, output layer and norms of a decoder in Llama's layout"""


def same_names(part: str, *names: str) -> tuple[TensorRule, ...]:
    """Return the rules of a block's tensors that have equal names in both models.

    Args:
        part: Module of the block, such as "self_attn".
        names: Tensors in it, such as "q_proj.weight".
    """
    rules = []
    for name in names:
        tensor = f"layers.{{layer}}.{part}.{name}"
        rules.append(TensorRule(tensor, f"model.{tensor}"))
    return tuple(rules)


ATTENTION_TENSORS = same_names(
    "self_attn",
    *(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
)
ATTENTION_BIASES = same_names(
    "self_attn",
    *(f"{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
)
HEAD_NORMS = same_names("self_attn", "q_norm.weight", "k_norm.weight")
DENSE_TENSORS = same_names("mlp", "gate_proj.weight", "up_proj.weight", "down_proj.weight")

ROTARY_FREQUENCIES = UnmappedTensors(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    "frequencies of rotary positions, which are computed",
)


def expert_tensors(
    part: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[TensorRule, ...]:
    """Return the rules of experts with one tensor per expert and projection.

    Args:
        part: Module of the block in their names, such as "mlp".
        gate, up, down: Names of the projections.
    """
    rules = []
    for ours, theirs in (("w1", gate), ("w3", up), ("w2", down)):
        rules.append(
            TensorRule(
                f"layers.{{layer}}.mlp.experts.{ours}",
                f"model.layers.{{layer}}.{part}.experts.{{expert}}.{theirs}.weight",
            )
        )
    return tuple(rules)


def fused_expert_tensors(part: str = "mlp") -> tuple[TensorRule, ...]:
    """Return the rules of stacked experts: gate_up_proj [E, 2H, D] and down_proj [E, D, H]."""
    ours = "layers.{layer}.mlp.experts"
    theirs = f"model.layers.{{layer}}.{part}.experts"
    return (
        TensorRule(f"{ours}.w1", f"{theirs}.gate_up_proj", FIRST_HALF, stacked=True),
        TensorRule(f"{ours}.w3", f"{theirs}.gate_up_proj", SECOND_HALF, stacked=True),
        TensorRule(f"{ours}.w2", f"{theirs}.down_proj"),
    )


def router_tensors(theirs: str, **tensors: str) -> tuple[TensorRule, ...]:
    """Return the rules of a router.

    Args:
        theirs: Module of the block that has the weight, such as "mlp.gate".
        tensors: Further tensors: ours with "__" for dots, such as expert_bias, and theirs.
    """
    prefix = f"model.layers.{{layer}}.{theirs}"
    rules = [TensorRule("layers.{layer}.mlp.gate.router.weight", f"{prefix}.weight")]
    for ours, name in tensors.items():
        tensor = f"layers.{{layer}}.mlp.gate.{ours.replace('__', '.')}"
        rules.append(TensorRule(tensor, f"{prefix}.{name}"))
    return tuple(rules)


def shared_expert_tensors(theirs: str) -> tuple[TensorRule, ...]:
    """Return the rules of the MLP of all shared experts.

    Args:
        theirs: Module of the block that has it, such as "mlp.shared_experts".
    """
    rules = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules.append(
            TensorRule(
                f"layers.{{layer}}.mlp.shared.{name}.weight",
                f"model.layers.{{layer}}.{theirs}.{name}.weight",
            )
        )
    return tuple(rules)
