"""Packages that only some flags need: extras in pyproject.toml, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_optional(module: str, extra: str, needed_by: str) -> ModuleType:
    """Import a module of a package that belongs to an extra.

    Args:
        extra: name of the extra in pyproject.toml.
        needed_by: the flag and its value, for the message.

    Raises:
        ValueError: the package is not installed, or its installation is damaged.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        problem = "is not installed"
        if not isinstance(error, ModuleNotFoundError):
            problem = f"cannot be imported ({str(error).splitlines()[0]})"
        raise ValueError(
            f"{needed_by} needs the package {package}, which {problem}. Install it: pip "
            f"install 'moe-megatron[{extra}]'"
        ) from None
