"""Rules for keys of config.json about blocks: which have experts, windows and shared experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.config_rules import Converted
from megatron.interop.hf.family import Settings, UnmappedTensors

Config = Mapping[str, Any]

_SPARSE = "sparse"
_DENSE = "dense"
_SLIDING = "sliding_attention"
_FULL = "full_attention"


# Which blocks have an MoE layer.


def moe_layer_settings(is_moe: Sequence[bool], key: str) -> Settings:
    """Return our settings for the blocks that have an MoE layer.

    Args:
        is_moe: One value per block.
        key: Key of config.json that decides, for the message.

    Raises:
        ValueError: No block has one.
    """
    layers = [layer for layer, has_experts in enumerate(is_moe) if has_experts]
    require(
        bool(layers),
        f"config.json: {key}",
        "no layer with experts",
        "at least one",
        "Use a dense family.",
    )
    if layers == list(range(layers[0], len(is_moe))):
        return {"moe.moe_first_k_dense": layers[0]}
    return {"moe.moe_layers": tuple(layers)}


def has_moe_layer(run: RunConfig) -> list[bool]:
    """Return for each block whether it has an MoE layer."""
    return [gate is not None for gate in run.moe.gates(run.model.num_layers)]


def _num_first_dense(run: RunConfig) -> int:
    """Return the number of blocks before the first MoE layer."""
    is_moe = has_moe_layer(run)
    return is_moe.index(True) if True in is_moe else len(is_moe)


def flag_of(config: Config, key: str) -> bool:
    """Return the value of a key that is true or false.

    Raises:
        ValueError: It is neither.
    """
    value = config[key]
    require(isinstance(value, bool), f"config.json: {key}", value, "true or false")
    return value


def number_of(config: Config, key: str, low: int, high: int) -> int:
    """Return an integer between two limits.

    Raises:
        ValueError: It is none.
    """
    value = config[key]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    require(
        is_number and low <= value <= high,
        f"config.json: {key}",
        value,
        f"an integer from {low} to {high}",
    )
    return value


def _first_dense_settings(config: Config) -> Settings:
    first = number_of(config, "first_k_dense_replace", 0, config["num_hidden_layers"] - 1)
    return {"moe.moe_first_k_dense": first}


FIRST_DENSE = Converted(
    ("first_k_dense_replace",),
    _first_dense_settings,
    lambda run: {"first_k_dense_replace": _num_first_dense(run)},
)
"""The first blocks are dense"""


def _sparse_step_settings(config: Config) -> Settings:
    num_layers = config["num_hidden_layers"]
    step = number_of(config, "decoder_sparse_step", 1, num_layers)
    dense = config["mlp_only_layers"] or []
    require(
        isinstance(dense, list) and all(layer in range(num_layers) for layer in dense),
        "config.json: mlp_only_layers",
        dense,
        f"a list of layers from 0 to {num_layers - 1}",
    )
    is_moe = []
    for layer in range(num_layers):
        is_moe.append((layer + 1) % step == 0 and layer not in dense)
    return moe_layer_settings(is_moe, "mlp_only_layers")


def _sparse_step_keys(run: RunConfig) -> dict[str, Any]:
    dense = [layer for layer, is_moe in enumerate(has_moe_layer(run)) if not is_moe]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


SPARSE_STEP = Converted(
    ("decoder_sparse_step", "mlp_only_layers"), _sparse_step_settings, _sparse_step_keys
)
"""Every n-th block has experts, except those of a list"""


def _layer_types(config: Config, key: str, names: tuple[str, str]) -> list[str]:
    """Return a list with one of two names for each block.

    Raises:
        ValueError: It is none.
    """
    types = config[key]
    num_layers = config["num_hidden_layers"]
    require(
        isinstance(types, list)
        and len(types) == num_layers
        and all(isinstance(name, str) and name in names for name in types),
        f"config.json: {key}",
        types,
        f"a list of {num_layers} of the names {' '.join(names)}",
    )
    return types


def _mlp_type_settings(config: Config) -> Settings:
    if config["mlp_layer_types"] is None:
        return moe_layer_settings(
            [layer > 0 for layer in range(config["num_hidden_layers"])], "num_hidden_layers"
        )
    types = _layer_types(config, "mlp_layer_types", (_DENSE, _SPARSE))
    return moe_layer_settings([name == _SPARSE for name in types], "mlp_layer_types")


def _mlp_type_keys(run: RunConfig) -> dict[str, Any]:
    return {"mlp_layer_types": [_SPARSE if is_moe else _DENSE for is_moe in has_moe_layer(run)]}


MLP_LAYER_TYPES = Converted(("mlp_layer_types",), _mlp_type_settings, _mlp_type_keys)
"""A name for each block; without them, all but the first have experts"""


# Layers that predict further tokens (multi-token prediction), after those of the model.


def _check_further_layers(config: Config) -> Settings:
    number_of(config, "num_nextn_predict_layers", 0, 1000)
    return {}


FURTHER_LAYERS = Converted(
    ("num_nextn_predict_layers",),
    _check_further_layers,
    lambda run: {"num_nextn_predict_layers": 0},
)
"""Their number; our models have none"""
FURTHER_TOKENS = UnmappedTensors(
    r"model\.layers\.(?P<layer>\d+)\..+",
    "layers that predict further tokens",
    kept=True,
    num_layers_key="num_hidden_layers",
    num_further_key="num_nextn_predict_layers",
)
"""Their tensors"""


# Shared experts.


@dataclass(frozen=True)
class SharedExperts:
    """Shared experts by their number, each as wide as a routed expert."""

    key: str
    may_be_none: bool = False
    """Whether 0 is allowed"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def to_ours(self, config: Config) -> Settings:
        least = 0 if self.may_be_none else 1
        return {"moe.moe_shared_experts": number_of(config, self.key, least, 1 << 20)}

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        moe = run.moe
        width = moe.expert_size(run.model.ffn_size)
        total = moe.shared_size(run.model.ffn_size)
        # A width that is no multiple is found when the keys are mapped back.
        return {self.key: total // width if moe.moe_shared_experts else 0}


# Sliding windows.


@dataclass(frozen=True)
class LayerWindows:
    """Sliding windows of the blocks that `layer_types` names."""

    is_sliding: Callable[[Config, int], bool]
    """Whether a block has a window if config.json has no `layer_types`"""
    switch: str = ""
    """Key that must be true for any window"""
    other_keys: tuple[str, ...] = ()
    """Further keys that `is_sliding` reads"""

    @property
    def keys(self) -> tuple[str, ...]:
        switch = (self.switch,) if self.switch else ()
        return ("sliding_window", "layer_types", *switch, *self.other_keys)

    def to_ours(self, config: Config) -> Settings:
        num_layers = config["num_hidden_layers"]
        if config["layer_types"] is None:
            sliding = [layer for layer in range(num_layers) if self.is_sliding(config, layer)]
        else:
            types = _layer_types(config, "layer_types", (_FULL, _SLIDING))
            sliding = [layer for layer, name in enumerate(types) if name == _SLIDING]
        is_on = not self.switch or flag_of(config, self.switch)
        require(
            is_on or not sliding,
            "config.json: layer_types",
            f"{_SLIDING} without a window",
            f"{_FULL} while {self.switch} is false",
        )
        return window_settings(config, sliding)

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        size = run.attention.window_size
        content: dict[str, Any] = {"sliding_window": size or None}
        content["layer_types"] = [
            _SLIDING if run.attention.window_of(layer) else _FULL
            for layer in range(run.model.num_layers)
        ]
        if self.switch:
            content[self.switch] = bool(size)
        return content


@dataclass(frozen=True)
class EveryWindow:
    """A sliding window of all blocks."""

    switch: str = ""
    """Key that must be true for the window"""

    @property
    def keys(self) -> tuple[str, ...]:
        return ("sliding_window", self.switch) if self.switch else ("sliding_window",)

    def to_ours(self, config: Config) -> Settings:
        is_on = not self.switch or flag_of(config, self.switch)
        if not is_on or not config["sliding_window"]:
            return {}
        return window_settings(config, range(config["num_hidden_layers"]))

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        size = run.attention.window_size
        content: dict[str, Any] = {"sliding_window": size or None}
        if self.switch:
            content[self.switch] = bool(size)
        return content


def window_settings(config: Config, sliding: Sequence[int]) -> Settings:
    """Return our settings for blocks with a window of `sliding_window` tokens.

    Args:
        sliding: Indices of the blocks.

    Raises:
        ValueError: The window has no valid size.
    """
    if not sliding:
        return {}
    settings: Settings = {
        "attention.window_size": number_of(config, "sliding_window", 1, 1 << 40)
    }
    if len(sliding) < config["num_hidden_layers"]:
        settings["attention.window_layers"] = tuple(sliding)
    return settings


# Biases of attention.


def _all_bias_settings(config: Config) -> Settings:
    value = config["attention_bias"]
    return {"attention.add_qkv_bias": value, "attention.attention_output_bias": value}


ATTENTION_BIAS = Converted(
    ("attention_bias",),
    _all_bias_settings,
    lambda run: {"attention_bias": run.attention.add_qkv_bias},
)
"""Biases of all four projections, or of none"""


# Keys of released files that transformers does not read.


@dataclass(frozen=True)
class Accepted:
    """A key that transformers does not read, and whose value must agree with the family."""

    key: str
    allowed: tuple[Any, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def to_ours(self, config: Config) -> Settings:
        value = config.get(self.key, self.allowed[0])
        allowed = " or ".join(map(repr, self.allowed))
        require(value in self.allowed, f"config.json: {self.key}", value, allowed)
        return {}

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return {}
