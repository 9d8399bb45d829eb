"""Runs the tests with the newest torch, in an environment of its own, and reports what breaks.

TORCH is what pip installs (default: torch, the newest that its index has). On Linux that can be a
CUDA build of several gigabytes; for the CPU build set PIP_INDEX_URL to the index of such builds,
or TORCH to a wheel. The other packages have the versions of constraints.txt, except those that
torch itself requires in another version.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

_VERSION = "from importlib.metadata import version; print(version('torch'))"
_PYTEST = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-rfE")


def other_requirements(required: Iterable[str]) -> list[str]:
    """Return the requirements except torch."""
    from packaging.requirements import Requirement

    return [text for text in required if Requirement(text).name != "torch"]


def other_constraints(constraints: str, installed: Iterable[str]) -> list[str]:
    """Return the lines of constraints.txt without those of packages that are installed already.

    Args:
        installed: names of the packages that came with torch.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    names = {canonicalize_name(name) for name in installed}
    lines = [line for line in constraints.splitlines() if not line.startswith("#")]
    return [line for line in lines if canonicalize_name(Requirement(line).name) not in names]


def run(python: Path, *arguments: str) -> None:
    """Run the environment's Python; raise CalledProcessError if it fails."""
    print(f"$ {python} {' '.join(arguments)}", flush=True)
    subprocess.run([str(python), *arguments], cwd=REPO, check=True)


def output(python: Path, *arguments: str) -> str:
    """Return what the environment's Python prints."""
    done = subprocess.run(
        [str(python), *arguments], cwd=REPO, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def build_environment(folder: Path, torch: str) -> Path:
    """Create the environment, install everything, and return its Python."""
    from tools.check_environment import required_packages

    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(python, *pip, torch)
    listed = output(python, "-m", "pip", "list", "--format=freeze").splitlines()
    installed = [line.split("==")[0] for line in listed]
    constraints = other_constraints((REPO / "constraints.txt").read_text(), installed)
    file = folder / "constraints.txt"
    file.write_text("\n".join(constraints) + "\n")
    run(python, *pip, "-c", str(file), *other_requirements(required_packages()))
    run(python, *pip, "--no-deps", "--editable", ".")
    return python


def main() -> int:
    """Run the program, and return its exit code: that of pytest, or 2 if pip fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv",
        type=Path,
        default=REPO / ".venv-latest",
        help="folder of the environment, which is created again (default: .venv-latest)",
    )
    parser.add_argument("tests", nargs="*", default=["tests"], help="what pytest runs")
    args = parser.parse_args()
    torch = os.environ.get("TORCH") or "torch"
    try:
        python = build_environment(args.venv.absolute(), torch)
        version = output(python, "-c", _VERSION).strip()
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"test_latest.py: error: {command} failed; see above", file=sys.stderr)
        return 2
    # Programs that tests start belong to this environment.
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(args.venv.absolute())}
    code = subprocess.run(
        [str(python), "-m", "pytest", *_PYTEST, *args.tests], cwd=REPO, env=environment
    ).returncode
    verdict = "these tests fail, see above" if code else "the tests pass"
    print(f"torch {version}: {verdict}. pyproject.toml has the versions that are allowed")
    return code


if __name__ == "__main__":
    sys.exit(main())
