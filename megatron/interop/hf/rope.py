"""Rotary positions in config.json: rope_parameters, or rope_theta, rope_scaling and others.

transformers 5 writes one dict, rope_parameters; earlier versions wrote rope_theta and
partial_rotary_factor next to a dict rope_scaling, whose "type" is now "rope_type".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.family import Settings

_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a family."""

    default_base: float = 10000.0
    """rope_theta of a config.json without one"""

    @property
    def keys(self) -> tuple[str, ...]:
        return _KEYS

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        parameters = rope_parameters(config, self.default_base)
        kind = parameters.pop("rope_type")
        require(kind == "default", "config.json: rope_type", kind, "'default'")
        settings = {"model.position_embedding_type": "rope"}
        settings["model.rotary_base"] = parameters.pop("rope_theta")
        share = parameters.pop("partial_rotary_factor")
        settings["rotary.rotary_percent"] = share
        for name in parameters:
            raise ValueError(f"config.json: rope_parameters has an unknown key {name!r}")
        return settings

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        parameters = {"rope_theta": run.model.rotary_base, "rope_type": "default"}
        if run.rotary.rotary_percent != 1:
            parameters["partial_rotary_factor"] = run.rotary.rotary_percent
        return {"rope_parameters": parameters}


def rope_parameters(config: Mapping[str, Any], default_base: float) -> dict[str, Any]:
    """Return the parameters in config.json in the form of transformers 5.

    Returns:
        A new dict with at least rope_type, rope_theta and partial_rotary_factor.

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
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return parameters
