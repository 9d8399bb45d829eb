"""The model families by model_type: every file of `families/` that has FAMILIES."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from megatron.config.fields import require, shortened
from megatron.config.schema import RunConfig
from megatron.interop.hf import families
from megatron.interop.hf.config_map import first_difference
from megatron.interop.hf.family import Family
from megatron.interop.hf.unsupported import unsupported_reason
from megatron.log import get_logger

EXPORT_ORDER = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "llama", "qwen3", "qwen2")
"""Families that are tried first for a model that came from none"""
FALLBACK = "moe_megatron"
"""Family that expresses every model, which transformers knows by importing a module of ours"""


@functools.cache
def all_families() -> Mapping[str, Family]:
    """Return every family by its model_type."""
    found: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(families.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        for family in module.FAMILIES:
            assert family.name not in found, f"two families have the name {family.name}"
            found[family.name] = family
    return found


def find_family(name: str, what: str = "config.json: model_type") -> Family:
    """Return the family of a name.

    Args:
        what: What was set to the name, for the message.

    Raises:
        ValueError: There is none.
    """
    known = all_families()
    is_name = isinstance(name, str)
    reason = unsupported_reason(name) if is_name else ""
    if reason:
        raise ValueError(f"{what} is {name!r}, which is not supported: {reason}")
    require(is_name and name in known, what, name, " ".join(sorted(known)))
    return known[name]


def family_of(content: Mapping[str, Any]) -> Family:
    """Return the family of the content of a config.json.

    Raises:
        ValueError: It names none that is known.
    """
    require(
        "model_type" in content,
        "config.json",
        shortened(sorted(content)),
        "an object with the key model_type",
    )
    return find_family(content["model_type"])


def family_for_export(run: RunConfig) -> tuple[Family | None, str]:
    """Choose a family of transformers that can express a model.

    Returns:
        The family, or None if there is none, and why the first one that was tried cannot.
    """
    known = all_families()
    names = [name for name in EXPORT_ORDER if name in known]
    names += [name for name in known if name not in (*names, FALLBACK)]
    reason = ""
    for name in names:
        problem = first_difference(known[name], run)
        if not problem:
            return known[name], ""
        reason = reason or problem
    return None, reason


def choose_family(name: str, run: RunConfig, origin: str = "") -> Family:
    """Return the family as which a model is exported.

    Args:
        name: Value of --family.
        origin: Family from which the model came; empty: none.

    Raises:
        ValueError: The family is unknown.
    """
    if name != "auto":
        return find_family(name, "--family")
    if origin in all_families():
        problem = first_difference(all_families()[origin], run)
        if not problem:
            return all_families()[origin]
        get_logger().info("%s", problem)
    family, reason = family_for_export(run)
    if family is None:
        get_logger().info(
            "the family is %s, which transformers knows after `import megatron.interop.hf_model`; "
            "%s",
            FALLBACK,
            reason.partition(". Use --family")[0],
        )
        return all_families()[FALLBACK]
    return family
