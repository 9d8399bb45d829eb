"""Dependencies: declared where they are imported, explained, and optional where they can be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tools import check_environment, test_latest  # noqa: E402

SOURCES = [p for folder in ("megatron", "tools") for p in (REPO / folder).rglob("*.py")]
OWN = {"megatron", "tools"}
OF_DEEPSPEED = {"packaging"}  # a package that DeepSpeed requires
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "vl_convert": "vl-convert-python"}
"""Packages whose name is not that of their module"""


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """Return the packages that everybody gets, and those of each extra."""
    project = check_environment.project_table()
    extras = project["optional-dependencies"]
    return names(project["dependencies"]), {extra: names(extras[extra]) for extra in extras}


def imported() -> dict[str, set[str]]:
    """Return third-party packages that the code imports, and the lines that do at import time.

    The key is the package's name without its submodules.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            elif isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if called in ("import_optional", "_import_optional", "require_package"):
                    modules = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            for module in modules:
                name = module.split(".")[0]
                if name in sys.stdlib_module_names or name in OWN | OF_DEEPSPEED:
                    continue
                name = DISTRIBUTIONS.get(name, name)
                at_start = {f"{path}:{node.lineno}"} if node in tree.body else set()
                found[name] |= at_start
    return found


def test_imports_are_declared_and_used():
    """No package is installed that is not imported, except what DeepSpeed compiles with."""
    core, extras = declared()
    optional = set().union(*(extras[extra] for extra in extras if extra != "test"))
    found = set(imported())
    assert found <= core | optional, found - core - optional
    assert core - found == {"ninja"}
    assert optional - found == {"protobuf", "pillow"}  # sentencepiece's and wandb's modules do


def test_optional_packages_are_imported_at_use():
    core, _ = declared()
    early = {name: lines for name, lines in imported().items() if lines and name not in core}
    # The files of Triton kernels are imported only when the backend is chosen.
    early = {name: lines for name, lines in early.items() if name != "triton"}
    assert not early


NEED_TRANSFORMERS = {f"megatron.interop.{name}" for name in ("hf_config", "hf_model")}
"""Modules with subclasses of transformers' classes, which no other module imports"""


@pytest.mark.parametrize("module", sorted(NEED_TRANSFORMERS))
def test_missing_transformers_is_named(module):
    code = f"import sys; sys.modules['transformers'] = None; import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode != 0
    assert "needs the package transformers, which is not installed" in done.stderr


def test_program_starts_without_extras():
    """All modules but Triton kernels and classes of transformers import without the extras."""
    _, extras = declared()
    modules = {package: module for module, package in DISTRIBUTIONS.items()}
    modules["protobuf"] = "google.protobuf"
    blocked = sorted(modules.get(name, name) for name in set().union(*extras.values()))
    paths = [
        path.relative_to(REPO).with_suffix("") for path in (REPO / "megatron").rglob("*.py")
    ]
    wanted = sorted(".".join(path.parts) for path in paths if "triton" not in path.name)
    wanted = [name for name in wanted if name not in NEED_TRANSFORMERS]
    code = (
        "import importlib, sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {wanted}: importlib.import_module(name)\n"
        "from megatron.tokenizer.build import build_tokenizer\n"
        "from megatron.config.tokenizer import TokenizerConfig\n"
        "print(build_tokenizer(TokenizerConfig('ByteTokenizer')).encode('a').tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0 and done.stdout.endswith("[97]\n"), done.stderr


def test_tested_torch_is_the_newest_allowed():
    """The pin of constraints.txt is allowed, and the next minor version is not."""
    bounds = Requirement(next(t for t in check_environment.required_packages() if "torch" in t))
    pins = (REPO / "constraints.txt").read_text()
    tested = Version(re.search(r"^torch==(\S+)$", pins, re.MULTILINE)[1])
    assert bounds.specifier.contains(str(tested))
    assert not bounds.specifier.contains(f"{tested.major}.{tested.minor + 1}.0")


def test_constraints_are_of_required_packages():
    """Every package of the environment is pinned; wandb, which no test needs, is not in it."""
    pins = (REPO / "constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name.lower() for line in pins if not line.startswith("#")}
    _, extras = declared()
    for name in set().union(*extras.values()) - {"moe-megatron"}:
        assert name in pinned, name
    assert "wandb" in pinned


def test_every_dependency_is_explained():
    """docs/dependencies.md has a row for each package and no other."""
    text = (REPO / "docs/dependencies.md").read_text(encoding="utf-8")
    table, replaced = text.split("## ", maxsplit=2)[1:]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+)\|", table, re.MULTILINE)
    core, extras = declared()
    of_extra = {name: extra for extra in extras if extra != "test" for name in extras[extra]}
    assert len(rows) == len(core | set(of_extra))
    for name, place in rows:
        expected = "all" if name in core else f"`[{of_extra[name]}]`"
        assert place.strip() == expected, name
    for name in ("apex", "regex", "pybind11", "safetensors"):
        assert f"`{name}`" in replaced


def test_environment_check_names_missing_packages(monkeypatch):
    versions = {"torch": "2.4.0", "deepspeed": "0.19.7", "numpy": "2.0", "pydantic": "2.0"}

    def version(name: str) -> str:
        if name == "gigatoken":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name, "1.0")

    monkeypatch.setattr(metadata, "version", version)
    assert check_environment.missing_packages() == [
        "torch>=2.9,<2.14 (found 2.4.0)",
        "deepspeed==0.19.8 (found 0.19.7)",
        "gigatoken",
    ]
    versions.update(torch="2.13.0+cpu", deepspeed="0.19.8")
    assert check_environment.missing_packages() == ["gigatoken"]
    required = check_environment.required_packages()
    assert {"sentencepiece", "pyarrow", "pytest"} < names(required)
    assert "moe-megatron" not in names(required) and len(required) == len(set(required))


# `make test-latest`


def test_latest_replaces_torch_only():
    required = ["torch>=2.9,<2.14", "numpy", "triton", "deepspeed==0.19.8"]
    expected = ["numpy", "triton", "deepspeed==0.19.8"]
    assert test_latest.other_requirements(required) == expected
    pins = "# comment\nJinja2==3\nnumpy==1 ; python_version < '3.11'\ntorch==2\ntriton==3\n"
    kept = test_latest.other_constraints(pins, ["torch", "jinja2", "triton"])
    assert kept == ["numpy==1 ; python_version < '3.11'"]


class FakeRun:
    """Replaces subprocess.run: records commands; those that contain `failing` fail."""

    def __init__(self, failing: str = ""):
        self.failing = failing
        self.commands: list[str] = []

    def __call__(self, command, check=False, **_):
        text = " ".join(command)
        self.commands.append(text)
        code = int(bool(self.failing) and self.failing in text)
        if code and check:
            raise subprocess.CalledProcessError(code, command)
        stdout = "torch==2.99.1\nfilelock==3.0\n" if "pip list" in text else "2.99.1\n"
        return subprocess.CompletedProcess(command, code, stdout)


@pytest.mark.parametrize(
    ("failing", "code", "shown"),
    [
        ("", 0, "torch 2.99.1: the tests pass. "),
        ("pytest -n", 1, "torch 2.99.1: these tests fail, see above. "),
        ("install --quiet --disable-pip-version-check torch==2.99.*", 2, "2.99.* failed; see"),
    ],
)
def test_latest_reports_what_breaks(tmp_path, monkeypatch, capsys, failing, code, shown):
    fake = FakeRun(failing)
    (tmp_path / "v").mkdir()
    (tmp_path / "v/old").touch()
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(test_latest.shutil, "rmtree", lambda path, **_: None)
    monkeypatch.setenv("TORCH", "torch==2.99.*")
    monkeypatch.setattr(
        sys, "argv", ["test_latest.py", "--venv", str(tmp_path / "v"), "tests/io"]
    )
    assert test_latest.main() == code
    printed = capsys.readouterr()
    assert shown in printed.out + printed.err
    if code < 2:
        pins = (tmp_path / "v/constraints.txt").read_text()
        assert "torch==" not in pins and "filelock==" not in pins and "numpy==" in pins
        assert fake.commands[-1].endswith("-rfE tests/io")
        assert any("deepspeed==0.19.8" in command for command in fake.commands)
