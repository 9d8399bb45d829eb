"""Packages that only some flags need: extras in pyproject.toml, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

_DISTRIBUTIONS = {"google": "protobuf", "yaml": "pyyaml"}
"""packages whose name is not that of their module"""


def require_package(package: str, extra: str, needed_by: str) -> None:
    """Check that a package of an extra is installed, without importing it.

    Args:
        extra: name of the extra in pyproject.toml.
        needed_by: the flag and its value, for the message.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise _missing_error(package, extra, needed_by, "is not installed")


def import_optional(module: str, extra: str, needed_by: str) -> ModuleType:
    """Import a module of a package that belongs to an extra; arguments as above.

    Raises:
        ValueError: the package is not installed, or its installation is damaged.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        package = _DISTRIBUTIONS.get(missing, missing)
        raise _missing_error(package, extra, needed_by, "is not installed") from None
    except ImportError as error:
        problem = f"cannot be imported ({str(error).splitlines()[0]})"
        raise _missing_error(module.split(".")[0], extra, needed_by, problem) from None


def _missing_error(package: str, extra: str, needed_by: str, problem: str) -> ValueError:
    return ValueError(
        f"{needed_by} needs the package {package}, which {problem}. Install it: pip install "
        f"'moe-megatron[{extra}]'"
    )
