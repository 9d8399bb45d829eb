"""The rules of the tree: sizes, layers, gates' imports, who may import DeepSpeed, tests that assert."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p
    for d in ("megatron", "tools", "dataset", "benchmarks", "tests")
    for p in (REPO / d).rglob("*.py")
)
PACKAGE = [p for p in SOURCES if p.is_relative_to(REPO / "megatron")]
# A module imports lower layers or its own folder only.
LAYERS = {
    "megatron": 0,
    "megatron.config": 0,
    "megatron.log": 0,
    "megatron.buffers": 0,
    "megatron.parallel": 1,
    "megatron.data": 1,
    "megatron.moe.routing": 2,
    "megatron.moe.gates": 2,
    "megatron.moe.dispatch.permute": 2,
    "megatron.moe.experts": 2,
    "megatron.moe.neurons": 2,
    "megatron.moe.plan": 2,
    "megatron.moe.experts.activations": 2,
    "megatron.moe.grouped": 2,
    "megatron.moe.experts.grouped_mlp": 2,
    "megatron.moe.kernels": 2,
    "megatron.moe.layer": 3,
    "megatron.moe.metrics": 3,
    "megatron.engine.moe_adapter": 3,
    "megatron.moe": 3,
    "megatron.model": 4,
    "megatron.training": 5,
    "megatron.pretrain": 6,
}
DEEPSPEED = {
    "megatron/parallel/groups.py",
    "megatron/moe/deepspeed.py",
    "megatron/engine/engine.py",
}


def rel(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of all imported modules; `from megatron.moe import gates` counts as megatron.moe.gates."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{rel(path)}:{node.lineno}: relative import"
            for a in node.names:
                full = f"{node.module}.{a.name}"
                names.add(
                    full
                    if (REPO / (full.replace(".", "/") + ".py")).exists()
                    or (REPO / full.replace(".", "/")).is_dir()
                    else node.module
                )
    return names


def layer_of(module: str) -> tuple[str, int]:
    """(key in LAYERS, layer): the longest prefix that is listed."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return module, LAYERS[module]


def module_name(path: Path) -> str:
    return rel(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_files_and_functions_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 500, (
        f"{rel(path)} has 500 lines or more"
    )
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length < 60, f"{rel(path)}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_imports_go_downward(path):
    own_key, own_layer = layer_of(module_name(path))
    for name in imports(path):
        if name.split(".")[0] != "megatron":
            continue
        key, layer = layer_of(name)
        assert (
            layer < own_layer
            or layer == own_layer
            and (
                own_layer == 0
                or Path(REPO / name.replace(".", "/")).parent == path.parent
                or key == own_key
                or key.rpartition(".")[0] == own_key.rpartition(".")[0]
            )
        ), f"{rel(path)} (layer {own_layer}) imports {name} (layer {layer})"


@pytest.mark.parametrize("path", sorted((REPO / "megatron/moe/gates").glob("*.py")), ids=rel)
def test_gates_import_only_torch_the_standard_library_and_the_contract(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert (
            top in sys.stdlib_module_names
            or top == "torch"
            or name in ("megatron.moe.routing", "megatron.moe.gates")
        ), name


def test_gate_forwards_and_files_are_short():
    for path in (REPO / "megatron/moe/gates").glob("*.py"):
        if path.name == "__init__.py":
            continue
        assert len(path.read_text().splitlines()) < 150, rel(path)
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                assert node.end_lineno - node.lineno < 40, rel(path)


def test_deepspeed_is_imported_in_three_files_only():
    users = {rel(p) for p in PACKAGE if any(n.split(".")[0] == "deepspeed" for n in imports(p))}
    assert users <= DEEPSPEED


def test_importing_the_package_does_nothing_else():
    import subprocess

    code = "import sys, megatron; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron')))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert out.stdout.strip() == "['megatron']"


def test_the_top_of_the_tree_is_as_agreed():
    import subprocess

    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=REPO)
    if files.returncode:
        pytest.skip("not a git checkout")
    top = {f.split("/")[0] for f in files.stdout.split() if not f.startswith(".")}
    assert top <= {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
        "pretrain_gpt.py",
        "megatron",
        "tools",
        "examples_deepspeed",
        "dataset",
        "tests",
        "benchmarks",
        "docs",
    }
    assert not [f for f in files.stdout.split() if f.endswith("utils.py")]


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a test states something: assert, pytest.raises/fail, assert_close, gradcheck, or a helper that does."""
    for n in ast.walk(node):
        if isinstance(n, ast.Assert):
            return True
        if isinstance(n, ast.Call):
            name = (
                n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
            )
            if (
                name in ("raises", "fail", "warns")
                or name.startswith("assert_")
                or name in helpers
            ):
                return True
    return False


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name.startswith("test_")], ids=rel)
def test_no_test_without_an_assertion(path):
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)]
    helpers: set[str] = set()
    for _ in range(3):  # helpers that call helpers
        helpers = {
            f.name for f in functions if not f.name.startswith("test_") and asserts(f, helpers)
        }
    silent = [
        f.name for f in functions if f.name.startswith("test_") and not asserts(f, helpers)
    ]
    assert not silent, f"{rel(path)}: {silent}"


def test_no_package_index_and_no_path_of_this_machine_is_written_down():
    """Where packages come from is the machine's setting, and a path of the author's machine helps nobody."""
    needles = ["index" + "-url", "find" + "-links", f"{REPO}/", f"{Path.home()}/"]
    for path in [
        *SOURCES,
        REPO / "README.md",
        REPO / "Makefile",
        REPO / "pyproject.toml",
        REPO / "constraints.txt",
    ]:
        text = path.read_text(encoding="utf-8")
        for needle in needles:
            assert needle not in text, f"{rel(path)} contains {needle}"
