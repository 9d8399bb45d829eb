"""Rules for keys of config.json that many families share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.family import ConfigRule, Settings
from megatron.moe.experts.expert_type import expert_config_class
from megatron.moe.gate import gate_config_class
from megatron.moe.released_routers import RELEASED_ROUTERS, ReleasedRouter

_LONGEST_SAMPLE = 4096
"""Largest sequence length that a configuration from config.json starts with"""


def get_setting(run: RunConfig, name: str) -> Any:
    """Return the value of a setting "section.field"; None if the gate has no such option.

    A width is the one that the model has, also where 0 in our configuration means a default.
    """
    if name == "model.ffn_hidden_size":
        return run.model.ffn_size
    if name == "moe.moe_ffn_hidden_size":
        return run.moe.expert_size(run.model.ffn_size)
    section, _, field_name = name.partition(".")
    if section == "expert":
        defaults = expert_config_class(run.moe.expert_type)
        return run.expert_options.get(field_name, getattr(defaults, field_name, None))
    if section == "gate":
        gate = run.moe.gate_layers.gates[0]
        default = getattr(gate_config_class(gate), field_name, None)
        return run.gate_options.get(gate, {}).get(field_name, default)
    return getattr(getattr(run, section), field_name)


@dataclass(frozen=True)
class Same:
    """A key with the value of one of our settings."""

    key: str
    ours: str
    zero_for_none: bool = False
    """Whether null means our 0, and the other way round; their 0 is refused"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        value = config[self.key]
        if self.zero_for_none:
            require(value != 0, f"config.json: {self.key}", value, "another number, or null")
            value = 0 if value is None else value
        return {self.ours: value}

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        value = get_setting(run, self.ours)
        if self.zero_for_none and not value:
            value = None
        return {self.key: value}


@dataclass(frozen=True)
class Fixed:
    """A key that must have one of some values, and what they mean.

    On export the key has the first value.
    """

    key: str
    allowed: tuple[Any, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Our settings that the value means"""
    reason: str = ""
    """What other values would need"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        value = config[self.key]
        allowed = " or ".join(map(_json_text, self.allowed))
        require(
            any(value == other and type(value) is type(other) for other in self.allowed),
            f"config.json: {self.key}",
            value,
            allowed,
            self.reason,
        )
        return dict(self.settings)

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return {self.key: self.allowed[0]}


def _json_text(value: Any) -> str:
    return json.dumps(value)


@dataclass(frozen=True)
class Ignored:
    """Keys without effect on the model."""

    keys: tuple[str, ...]

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        return {}

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Always:
    """Our settings that the family has, whatever its config.json says."""

    settings: Mapping[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        return ()

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        return dict(self.settings)

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Converted:
    """Keys and settings that belong together by two functions."""

    keys: tuple[str, ...]
    ours: Callable[[Mapping[str, Any]], Settings]
    """Our settings by the content of config.json"""
    theirs: Callable[[RunConfig], dict[str, Any]]
    """Keys of config.json by our configuration"""

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        return self.ours(config)

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return self.theirs(run)


@dataclass(frozen=True)
class Router:
    """The gate and its options, as `megatron.moe.released_routers` maps a router class."""

    router: str
    """Its "family/Class\""""
    loss_key: str = ""
    """Key of the coefficient of the balance loss, which transformers computes with the sum of
    the loads over a token's k choices: ours is k times as large"""

    @property
    def gate(self) -> str:
        """The gate that computes what this router does."""
        return self._released.gate

    @property
    def _released(self) -> ReleasedRouter:
        return RELEASED_ROUTERS[self.router]

    @property
    def _topk_key(self) -> str:
        return self._released.from_config["topk"]

    @property
    def keys(self) -> tuple[str, ...]:
        keys = [key.removeprefix("1/") for key in self._released.from_config.values()]
        if self.loss_key:
            keys.append(self.loss_key)
        return tuple(keys)

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        settings: Settings = {"moe.gate": self.gate}
        for option, key in self._released.from_config.items():
            key = key.removeprefix("1/")
            is_set = config[key] is not None or option in ("n_group", "topk_group")
            require(is_set, f"config.json: {key}", None, "a value")
        for option, value in self._released.options_of(SimpleNamespace(**config)).items():
            settings[f"gate.{option}"] = value
        if self.loss_key:
            settings["gate.loss_coeff"] = config[self._topk_key] * config[self.loss_key]
        return settings

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        theirs = {}
        for option, key in self._released.from_config.items():
            value = get_setting(run, f"gate.{option}")
            if key.startswith("1/"):
                value = 1 / value
            theirs[key.removeprefix("1/")] = value
        topk = get_setting(run, "gate.topk")
        coefficient = get_setting(run, "gate.loss_coeff")
        if self.loss_key and topk:
            theirs[self.loss_key] = coefficient / topk
        return theirs


def _position_settings(config: Mapping[str, Any]) -> Settings:
    positions = config["max_position_embeddings"]
    length = positions
    if isinstance(positions, int):
        length = min(positions, _LONGEST_SAMPLE)
    return {"model.max_position_embeddings": positions, "model.seq_length": length}


def _position_keys(run: RunConfig) -> dict[str, Any]:
    return {"max_position_embeddings": run.model.max_positions}


def _tied_settings(config: Mapping[str, Any]) -> Settings:
    is_tied = config["tie_word_embeddings"]
    allowed = "true or false"
    require(isinstance(is_tied, bool), "config.json: tie_word_embeddings", is_tied, allowed)
    return {"model.untie_embeddings_and_output_weights": not is_tied}


def _tied_keys(run: RunConfig) -> dict[str, Any]:
    return {"tie_word_embeddings": not run.model.untie_embeddings_and_output_weights}


def _head_settings(config: Mapping[str, Any]) -> Settings:
    heads = config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    if groups is None:
        groups = heads
    return {
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.kv_channels": config.get("head_dim") or 0,
    }


def _head_keys(run: RunConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": run.model.num_attention_heads,
        "num_key_value_heads": run.model.query_groups,
        "head_dim": run.model.head_size,
    }


MODEL_RULES: tuple[ConfigRule, ...] = (
    Same("num_hidden_layers", "model.num_layers"),
    Same("hidden_size", "model.hidden_size"),
    Same("vocab_size", "model.vocab_size"),
    Same("initializer_range", "model.init_method_std"),
    Same("rms_norm_eps", "model.norm_epsilon"),
    Converted(
        ("attention_dropout",),
        lambda config: {"model.attention_dropout": config["attention_dropout"] or 0.0},
        lambda run: {"attention_dropout": run.model.attention_dropout},
    ),
    Fixed("hidden_act", ("silu",), {"model.activation": "swiglu"}),
    Converted(("max_position_embeddings",), _position_settings, _position_keys),
    Converted(("tie_word_embeddings",), _tied_settings, _tied_keys),
    Always({"model.normalization": "RMSNorm", "model.make_vocab_size_divisible_by": 1}),
)
"""Keys of all families with RMSNorm and SwiGLU"""

HEAD_RULE = Converted(
    ("num_attention_heads", "num_key_value_heads", "head_dim"), _head_settings, _head_keys
)
"""Heads of grouped-query attention"""
