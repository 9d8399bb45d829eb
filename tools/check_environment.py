"""Checks whether this Python can run the project, and names the packages to install if not."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


def project_table() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from setuptools.compat.py310 import tomllib
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def required_packages() -> list[str]:
    """Return the requirements of pyproject.toml with the test extra, which names other extras."""
    from packaging.requirements import Requirement

    project = project_table()
    required = list(project["dependencies"])
    for text in project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            required.append(text)
        for extra in sorted(requirement.extras):
            required += project["optional-dependencies"][extra]
    return required


def missing_packages() -> list[str]:
    """Return the required packages that are not installed, or in another version."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["everything: not even packaging is there"]
    missing = []
    for text in required_packages():
        requirement = Requirement(text)
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{text} (found {installed})")
    return missing


def main() -> int:
    """Check; return the exit code, 2 if packages are missing."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    missing = missing_packages()
    if missing:
        print(
            f"{sys.prefix} lacks {', '.join(missing)}; install with: {sys.executable} -m pip "
            "install -c constraints.txt '.[test]', or leave VENV out to get a fresh .venv",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
