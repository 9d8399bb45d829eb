"""Rotary positions in config.json: rope_parameters, or rope_theta, rope_scaling and others.

transformers 5 writes one dict, rope_parameters; earlier versions wrote rope_theta and
partial_rotary_factor next to a dict rope_scaling, whose "type" is now "rope_type".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import require, shortened
from megatron.config.schema import RunConfig
from megatron.interop.hf.family import Settings

_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
_OPTIONS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_max_positions",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_max_positions",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "mscale": "yarn_mscale",
        "mscale_all_dim": "yarn_mscale_all_dim",
        "attention_factor": "yarn_attention_factor",
        "truncate": "yarn_truncate",
    },
}
"""Field of our section by parameter, for each rope_type that we have"""
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Parameters without a default by rope_type"""
_ZERO_MEANS_UNSET = ("mscale", "mscale_all_dim", "attention_factor")


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a family."""

    default_base: float = 10000.0
    """rope_theta of a config.json without one"""
    is_partial: bool = False
    """Whether transformers' code of the family reads partial_rotary_factor"""
    default_share: float = 1.0
    """partial_rotary_factor of a config.json without one"""
    size_key: str = ""
    """Key with the number of a head's dimensions that are rotated, which earlier files have
    instead of the share"""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*_KEYS, self.size_key) if self.size_key else _KEYS

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        parameters = rope_parameters(config, self.default_base)
        kind = parameters.pop("rope_type")
        known = " ".join(map(repr, _OPTIONS))
        is_known = isinstance(kind, str) and kind in _OPTIONS
        require(is_known, "config.json: rope_type", kind, known)
        settings: Settings = {
            "model.position_embedding_type": "rope",
            "model.rotary_base": parameters.pop("rope_theta"),
            "rotary.rotary_percent": self._share(
                parameters.pop("partial_rotary_factor", None), config
            ),
            "rotary.rope_scaling": "none" if kind == "default" else kind,
        }
        if kind in ("llama3", "yarn"):
            _complete_original(parameters, config)
        for name in _NEEDED.get(kind, ()):
            number = parameters.get(name)
            require(
                isinstance(number, int | float), f"config.json: rope {name}", number, "a number"
            )
        factor = parameters.get("attention_factor")
        require(
            factor is None or factor > 0,  # 0 of ours means that it is not set
            "config.json: rope attention_factor",
            factor,
            "a number above 0, or null",
        )
        for name, value in parameters.items():
            if name in _OPTIONS[kind] and value is not None:
                settings[f"rotary.{_OPTIONS[kind][name]}"] = value
            elif value is not None:
                _refuse(name, value, kind)
        return settings

    def _share(self, share: float | None, config: Mapping[str, Any]) -> float:
        """Return the share of a head's dimensions that is rotated.

        Args:
            share: partial_rotary_factor among the parameters; None: there is none.
        """
        share = share or config.get("partial_rotary_factor")
        require(
            self.is_partial or share in (None, 1.0),
            "config.json: partial_rotary_factor",
            share,
            "1.0 or no such key",
            "The family rotates all dimensions of a head.",
        )
        if not share and self.size_key and config.get(self.size_key):
            return config[self.size_key] / config["head_dim"]
        return share or self.default_share

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        rotary = run.rotary
        kind = "default" if rotary.rope_scaling == "none" else rotary.rope_scaling
        parameters = {"rope_type": kind, "rope_theta": run.model.rotary_base}
        if self.is_partial and rotary.rotary_percent != self.default_share:
            parameters["partial_rotary_factor"] = rotary.rotary_percent
        for name, field_name in _OPTIONS[kind].items():
            value = getattr(rotary, field_name)
            if name == "original_max_position_embeddings":
                value = value or run.model.max_positions
            if value or name not in _ZERO_MEANS_UNSET:
                parameters[name] = value
        return {"rope_parameters": parameters}


def rope_parameters(config: Mapping[str, Any], default_base: float) -> dict[str, Any]:
    """Return the parameters in config.json in the form of transformers 5.

    Returns:
        A new dict with at least rope_type and rope_theta.

    Raises:
        ValueError: The parameters are no JSON object.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(
        isinstance(parameters, dict), "config.json: rope_parameters", parameters, "an object"
    )
    parameters = dict(parameters)
    kind = parameters.pop("type", "default")
    parameters.setdefault("rope_type", kind)
    parameters.setdefault("rope_theta", config.get("rope_theta") or default_base)
    return parameters


def _complete_original(parameters: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Set the positions of the first training, and the factor that follows from them."""
    original = config.get("original_max_position_embeddings")
    if original is not None:  # has precedence in transformers
        parameters["original_max_position_embeddings"] = original
    positions = config["max_position_embeddings"]
    parameters.setdefault("original_max_position_embeddings", positions)
    if "factor" in parameters and parameters["factor"] is None:
        parameters["factor"] = positions / parameters["original_max_position_embeddings"]


def _refuse(name: str, value: Any, kind: str) -> None:
    known = " ".join(_OPTIONS[kind]) or "no parameters"
    require(
        False, f"config.json: rope parameter {shortened(name)}", value, f"{known}, for {kind}"
    )
