"""Registry of classes that register themselves by name, such as expert types."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any


class Registry:
    """Classes by name. The modules of a package are imported when a name is needed.

    Args:
        kind: what is registered, for messages: "expert type".
        flag: the flag that selects one.
        package: package whose modules register classes when they are imported.
    """

    def __init__(self, kind: str, flag: str, package: ModuleType):
        self._kind = kind
        self._flag = flag
        self._package = package
        self._classes: dict[str, type] = {}

    def add(self, name: str, cls: type) -> None:
        """Register a class. A reloaded module replaces its own classes.

        Raises:
            ValueError: another class has the name.
        """
        known = self._classes.get(name)
        if known is not None and _qualified_name(known) != _qualified_name(cls):
            raise ValueError(
                f"{self._kind} name {name!r} is taken by {_qualified_name(known)}; "
                f"rename the one in {cls.__module__}"
            )
        self._classes[name] = cls

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._import_package()
        return sorted(self._classes)

    def get(self, name: str) -> type:
        """Return the class of this name.

        Raises:
            ValueError: there is none; the message lists the known ones.
        """
        self._import_package()
        if name not in self._classes:
            raise ValueError(
                f"{self._flag} is {name!r}; allowed: {' '.join(sorted(self._classes))}"
            )
        return self._classes[name]

    def make_config(self, name: str, options: dict[str, Any]) -> Any:
        """Return the Config of a class with these options.

        Raises:
            ValueError: the name or an option is unknown, or the Config refuses a value.
        """
        config_class = self.get(name).Config
        known = [f.name for f in dataclasses.fields(config_class)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            allowed = " ".join(known) or "no options"
            raise ValueError(
                f"{self._kind} {name!r} has no option {unknown[0]!r}; allowed: {allowed}"
            )
        return config_class(**options)

    def _import_package(self) -> None:
        for module in pkgutil.iter_modules(self._package.__path__):
            importlib.import_module(f"{self._package.__name__}.{module.name}")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
