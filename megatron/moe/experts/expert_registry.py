"""The registry of expert types: built-in ones, and those that come with gates of one's own.

A type registers itself when its module is imported: from `megatron/moe/experts/types/`, or
from a file of --gate-path or an installed package, which `megatron.moe.gate_registry`
imports.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from megatron.config.flags import EXPERT_OPTIONS
from megatron.config.option_class import check_option_class
from megatron.moe.experts import types


class ExpertRegistry:
    """Classes of expert types by name."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def register(self, name: str, cls: type) -> None:
        """Add a class; a later definition of the same class replaces it.

        Raises:
            ValueError: another class has the name.
        """
        known = self.classes.get(name)
        if known is not None and qualified_name(known) != qualified_name(cls):
            raise ValueError(
                f"two expert types have the name {name!r}: {qualified_name(known)}, and "
                f"{qualified_name(cls)}; rename one"
            )
        self.classes[name] = cls

    def import_built_in(self) -> None:
        """Import every file of `megatron/moe/experts/types/`."""
        for module in pkgutil.iter_modules(types.__path__):
            importlib.import_module(f"{types.__name__}.{module.name}")

    def find(self, name: str) -> type:
        """Return the class of this name.

        Raises:
            ValueError: there is none, or its Config cannot be flags.
        """
        self.import_built_in()
        if name not in self.classes:
            raise ValueError(
                f"--expert-type is {name!r}; allowed: {' '.join(sorted(self.classes))}. A type "
                "outside the tree needs --gate-path FILE.py, or its package installed"
            )
        check_option_class(self.classes[name].Config, f"expert type {name!r}", EXPERT_OPTIONS)
        return self.classes[name]

    def make_config(self, name: str, options: dict[str, Any]) -> Any:
        """Return the Config of a class with these options.

        Raises:
            ValueError: the name or an option is unknown, or the Config refuses a value.
        """
        config_class = self.find(name).Config
        known = [f.name for f in dataclasses.fields(config_class)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            allowed = " ".join(known) or "no options"
            raise ValueError(
                f"expert type {name!r} has no option {unknown[0]!r}; allowed: {allowed}"
            )
        return config_class(**options)


EXPERT_TYPES = ExpertRegistry()
"""The expert types of this process"""


def qualified_name(cls: type) -> str:
    """Return the module and name of a class, which a later definition of it shares."""
    return f"{cls.__module__}.{cls.__qualname__}"
