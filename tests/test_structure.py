"""The rules of the tree: layers, imports of DeepSpeed, sizes, density, names and words."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import density
import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron", "tools", "dataset", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.is_relative_to(REPO / "megatron")]
PROGRAMS = [path for path in SOURCES if not path.is_relative_to(REPO / "tests")]
LARGEST_FILE = 600
LONGEST_FUNCTION = 60
LONGEST_LINE = 100
MOST_CONSTRUCTOR_ARGUMENTS = 8

# A module imports lower layers or its own folder only. The longest prefix of its name counts.
LAYERS = {
    "megatron": 0,
    "megatron.io": 0,
    "megatron.first_order": 0,
    "megatron.host_allocator": 0,
    "megatron.log": 0,
    "megatron.optional_packages": 0,
    "megatron.config": 1,
    "megatron.parallel": 2,
    "megatron.tokenizer": 2,
    "megatron.data": 3,
    "megatron.moe": 4,
    "megatron.moe.layer": 5,
    "megatron.moe.layer_sums": 5,
    "megatron.moe.routing_record": 5,
    "megatron.moe.routing_trace": 5,
    "megatron.moe.routing_trace_file": 5,
    "megatron.moe.gate_update": 5,
    "megatron.moe.metrics": 5,
    "megatron.moe.peer.layer": 5,
    "megatron.model": 6,
    "megatron.engine": 7,
    "megatron.inference": 7,
    "megatron.checkpoint": 8,
    "megatron.interop": 9,
    "megatron.training": 9,
    "megatron.exit_codes": 9,
    "megatron.gate_checks": 10,
    "megatron.initialize": 10,
    "megatron.analysis": 11,
    "megatron.evaluation": 11,
    "megatron.pretrain": 12,
}
GATE_IMPORTS = {
    "megatron.moe",
    "megatron.moe.routing",
    "megatron.moe.losses",
    "megatron.moe.gate",
    "megatron.moe.gate_options",
    "megatron.moe.gate_functional",
    "megatron.moe.gate_controllers",
    "megatron.moe.neighbour_losses",
    "megatron.moe.quantile_histogram",
    "megatron.moe.gate_bias",
    "megatron.moe.gate_topk",
}
# Words of an earlier dialect of this code base; the terms of the field are clearer.
AVOIDED = re.compile(
    r"\b(beside|whole|anew|somebody|nobody|meanwhile|in vain|at once|dumb|hostile"
    r"|poison(s|ed)?|goes on|go on|mends?|mended|spoils?|spoilt|(is|are|was|were) (said|told)"
    r"|mixture layers?|up to now)\b",
    re.IGNORECASE,
)


def rel(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return rel(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of imported modules; `from megatron.moe import gates` is megatron.moe.gates."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{rel(path)}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                place = REPO / full.replace(".", "/")
                is_module = place.with_suffix(".py").exists() or place.is_dir()
                names.add(full if is_module else node.module)
    return frozenset(names)


def layer_of(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def folder_of(module: str) -> str:
    """The package right below megatron/ that a module belongs to."""
    return ".".join(module.split(".")[:2])


# Layers


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_imports_go_downward(path):
    module = module_name(path)
    for name in imports(path):
        if name.split(".")[0] != "megatron":
            continue
        lower = layer_of(name) < layer_of(module)
        sibling = layer_of(name) == layer_of(module) and (
            folder_of(name) == folder_of(module) or layer_of(module) == 0
        )
        assert lower or sibling, (
            f"{module} (layer {layer_of(module)}) imports {name} (layer {layer_of(name)})"
        )


def test_no_import_circles():
    graph = {module_name(path): imports(path) for path in PACKAGE}
    state: dict[str, str] = {}

    def visit(module: str, trail: list[str]) -> None:
        if state.get(module) == "done" or module not in graph:
            return
        assert state.get(module) != "open", f"import circle: {' -> '.join([*trail, module])}"
        state[module] = "open"
        for name in sorted(graph[module]):
            visit(name, [*trail, module])
        state[module] = "done"

    for module in sorted(graph):
        visit(module, [])


def test_deepspeed_is_imported_in_engine_only():
    users = {rel(p) for p in PACKAGE if any(n.split(".")[0] == "deepspeed" for n in imports(p))}
    assert all(user.startswith("megatron/engine/") for user in users), users


@pytest.mark.parametrize("path", sorted((REPO / "megatron/moe/gates").glob("*.py")), ids=rel)
def test_gates_import_only_the_contract(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top == "torch" or name in GATE_IMPORTS, name


def test_importing_the_package_does_nothing_else():
    code = (
        "import sys, megatron\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert out.stdout.strip() == "['megatron']"


# Sizes and density


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LARGEST_FILE, (
        f"{rel(path)} has {LARGEST_FILE} lines or more"
    )
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length < LONGEST_FUNCTION, (
                f"{rel(path)}:{node.lineno}: {node.name} has {length} lines"
            )


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_lines_fit_in_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not wide, f"{rel(path)}: lines {wide}"


def test_gate_forwards_and_files_are_short():
    for path in (REPO / "megatron/moe/gates").glob("*.py"):
        assert len(path.read_text().splitlines()) < 300, rel(path)
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                assert node.end_lineno - node.lineno < 50, rel(path)


def is_swap(node: ast.Assign) -> bool:
    """Whether an assignment only permutes values, as in `a, b = b, a`."""
    return sorted(map(ast.unparse, node.targets[0].elts)) == sorted(
        map(ast.unparse, node.value.elts)
    )


@pytest.mark.parametrize("path", PROGRAMS, ids=rel)
def test_one_statement_assigns_one_value(path):
    found = [
        node.lineno for node in density.tuple_assignments(parse(path)) if not is_swap(node)
    ]
    assert not found, (
        f"{rel(path)}: tuple assignments in lines {found}; write one assignment per line"
    )


def nested(tree: ast.AST, kinds: type | tuple[type, ...]) -> list[int]:
    """Lines of nodes of these kinds that lie inside another one of them."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            lines |= {
                n.lineno for n in ast.walk(node) if n is not node and isinstance(n, kinds)
            }
    return sorted(lines)


@pytest.mark.parametrize("path", PROGRAMS, ids=rel)
def test_conditional_expressions_and_comprehensions_are_not_nested(path):
    tree = parse(path)
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert not (found := nested(tree, ast.IfExp)), (
        f"{rel(path)}: nested conditionals in {found}"
    )
    assert not (found := nested(tree, comprehensions)), (
        f"{rel(path)}: nested comprehensions in {found}"
    )


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_constructors_take_few_arguments(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            number = len(node.args.args) + len(node.args.kwonlyargs) - 1
            limit = MOST_CONSTRUCTOR_ARGUMENTS
            assert number <= limit, (
                f"{rel(path)}:{node.lineno}: {number} arguments; pass a record"
            )


def test_density_of_the_package():
    measured = density.measure(REPO / "megatron")
    over = {name: measured[name] for name, bar in density.BARS.items() if measured[name] > bar}
    assert not over, f"{over}; allowed: {density.BARS}"


# Names and words


def test_no_public_name_is_defined_in_two_modules():
    homes = defaultdict(list)
    for path in PACKAGE:
        for node in parse(path).body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                # FAMILIES is what each file of model families offers to their registry.
                if not name.startswith("_") and name != "FAMILIES":
                    homes[name].append(module_name(path))
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not twice, twice


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring and comment of a file."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(parse(path)):
        constant = node.value if isinstance(node, ast.Expr) else None
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            yield node.lineno, constant.value


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_docstrings_and_comments_use_the_words_of_the_field(path):
    found = [(line, match[0]) for line, text in prose(path) for match in AVOIDED.finditer(text)]
    assert not found, f"{rel(path)}: {found}"


def test_the_top_of_the_tree_is_as_agreed():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=REPO)
    if files.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in files.stdout.split() if not name.startswith(".")}
    allowed = {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
    }
    allowed |= {"CONTRIBUTING.md", "pretrain_gpt.py", "examples_deepspeed", "docs", *FOLDERS}
    assert top <= allowed
    assert not [name for name in files.stdout.split() if name.endswith("utils.py")]


# Tests


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a test checks something: by assert, pytest.raises, assert_close or a helper."""
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
    """Package sources are a setting of the machine, and paths of ours help no user."""
    needles = ["index" + "-url", "find" + "-links", f"{REPO}/", f"{Path.home()}/"]
    settings = [
        REPO / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt")
    ]
    for path in [*SOURCES, *settings]:
        text = path.read_text(encoding="utf-8")
        for needle in needles:
            assert needle not in text, f"{rel(path)} contains {needle}"
