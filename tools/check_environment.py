"""Checks whether this Python can run the project, and names the packages to install if not."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


def missing_packages() -> list[str]:
    """Return the requirements of pyproject.toml (with the test extra) that are not installed,
    or in another version.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from setuptools.compat.py310 import tomllib
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["everything: not even packaging is there"]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    missing = []
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
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
