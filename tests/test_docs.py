"""The documentation names commands, flags and files that exist, and its gate works.

Checks docs/, CONTRIBUTING.md and benchmarks/README.md; tests/test_readme.py checks the rest.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import settings
from test_structure import AVOIDED, LAYERS

from helpers import markdown, runs
from megatron.moe.gate import available_gates, create_gate, gate_config_class
from megatron.moe.gate_registry import REGISTRY
from megatron.moe.routing import GateInput

REPO = markdown.REPO
PAGES = sorted(
    [*REPO.glob("docs/*.md"), REPO / "CONTRIBUTING.md", REPO / "benchmarks/README.md"]
)
GUIDES = [REPO / "README.md", REPO / "dataset/README.md", *PAGES]
COMMANDS = [
    (page.relative_to(REPO).as_posix(), command)
    for page in PAGES
    for command in markdown.commands(page.read_text(encoding="utf-8"))
]
GATES = (REPO / "docs/gates.md").read_text(encoding="utf-8")
GATE, PROGRAM = re.findall(r"```python\n(.*?)```", GATES, re.DOTALL)
ARCHITECTURE = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
CHECKPOINTS = (REPO / "docs/checkpoints.md").read_text(encoding="utf-8")


def page_name(page) -> str:
    return page.relative_to(REPO).as_posix()


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_docs_commands_are_valid(page, command, tmp_path):
    markdown.assert_command_is_valid(command, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_docs_name_what_exists(page):
    """Paths, flags, links and examples of tools in inline code are valid."""
    text = page.read_text(encoding="utf-8")
    assert not markdown.missing_paths(text)
    assert not markdown.unknown_flags(text)
    assert not markdown.broken_links(page)
    markdown.assert_tool_examples_parse(text)


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_docs_use_the_fields_words(page):
    """Prose avoids the words that tests/test_structure.py forbids; code blocks may use them."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not sorted({match[0] for match in AVOIDED.finditer(prose)})


def test_readme_links_every_page():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for page in REPO.glob("docs/*.md"):
        assert f"(docs/{page.name})" in readme, page.name


def test_contributing_names_existing_code():
    """Classes, functions and constants in CONTRIBUTING.md are defined in the package."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text() for path in (REPO / "megatron").rglob("*.py"))
    names = set(re.findall(r"`(_?[A-Z][A-Z_]+|[A-Z]\w+Config|build_\w+|metric_\w+)`", text))
    assert len(names) >= 7
    for name in names:
        assert re.search(rf"^\s*(class |def )?{name}\b", source, re.MULTILINE), name


def test_contributing_layers_are_enforced_layers():
    """The table has every package, with the layer that tests/test_structure.py enforces."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `megatron/(\w+)/` \|", text, re.MULTILINE)
    packages = {path.parent.name for path in (REPO / "megatron").glob("*/__init__.py")}
    assert {name for _, name in rows} == packages
    for layer, name in rows:
        assert LAYERS[f"megatron.{name}"] == int(layer), name


def test_property_tests_repeat_their_examples():
    """CONTRIBUTING.md promises it for `make test`; no test may choose for itself."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "derandomized")
    assert settings(max_examples=7).derandomize == (profile == "derandomized")
    tests = [
        path for path in (REPO / "tests").rglob("test_*.py") if path.name != "test_docs.py"
    ]
    assert not [path for path in tests if "derandomize" in path.read_text(encoding="utf-8")]


def test_checkpoint_page_lists_the_files(finished):
    """The page lists the files that the training run `finished` wrote."""
    folder = finished / "checkpoints/iter_0000020"
    named = set(re.findall(r"^    (\w+\.\w+)", CHECKPOINTS, re.MULTILINE))
    assert named | {"rank_00001.safetensors"} == {path.name for path in folder.iterdir()}


def test_gate_table_has_every_gate():
    table = GATES.partition("## Adding a gate")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| `\w+` \|", line)]
    names = [re.match(r"\| `(\w+)` \|", row)[1] for row in rows]
    assert sorted(names) == available_gates()
    assert all(row.count("|") == 8 for row in rows)


def test_architecture_page_names_what_the_files_define():
    """Every `file.py`: `Name` or `Class.method` of the page is defined in that file."""
    named = re.findall(
        r"`([\w/]+\.py)`: (`[A-Za-z_.]+`(?:(?:, | and )`[A-Za-z_.]+`)*)", ARCHITECTURE
    )
    assert len(named) > 50
    missing = []
    for file, symbols in named:
        defined = definitions(ast.parse((REPO / file).read_text(encoding="utf-8")))
        wanted = re.findall(r"`([^`]+)`", symbols)
        missing += [(file, symbol) for symbol in wanted if symbol not in defined]
    assert not missing


def definitions(module: ast.Module) -> set[str]:
    """Return the names that a module defines, and the methods of its classes as `Class.method`."""
    defined = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            defined.update(f"{node.name}.{method.name}" for method in methods)
        if isinstance(node, ast.AnnAssign):
            defined.add(node.target.id)
    return defined


@pytest.fixture
def example_gate(tmp_path):
    """Import the gate that docs/gates.md shows, and unregister it afterwards."""
    (tmp_path / "above_mean.py").write_text(GATE)
    spec = importlib.util.spec_from_file_location("above_mean", tmp_path / "above_mean.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["above_mean"] = module
    spec.loader.exec_module(module)
    yield module
    REGISTRY.remove("above_mean")
    del sys.modules["above_mean"]


def test_example_gate_becomes_flags(example_gate):
    from megatron.config.cli import parse

    config = parse(
        ["--num-experts", "4", "--gate", "above_mean", "--margin", "0.5"], gate_config_class
    )
    assert config.gate_options["above_mean"]["margin"] == 0.5


def test_example_gate_follows_its_formula(example_gate):
    """Assignments and balance loss equal plain Python, and the router gets a gradient."""
    gate = create_gate(
        "above_mean", hidden_size=8, num_experts=4, init_std=1.0, margin=0.9, loss_coeff=0.1
    )
    x_TD = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    routing = gate(GateInput(x_TD))
    routing.check(20, 4)
    probs_TE = (x_TD @ gate.router.weight.t()).softmax(-1)
    expected = [(t, e) for t in range(20) for e in range(4) if probs_TE[t, e] >= 0.9 / 4]
    assert list(zip(routing.token_A.tolist(), routing.expert_A.tolist())) == expected
    chosen = [expert for _, expert in expected]
    load = [chosen.count(e) / len(chosen) for e in range(4)]
    balance = 0.1 * 4 * sum(load[e] * probs_TE[:, e].mean().item() for e in range(4))
    assert routing.aux_loss.item() == pytest.approx(balance, rel=1e-5)
    (routing.weight_A.sum() + routing.aux_loss).backward()
    assert gate.router.weight.grad.abs().sum() > 0


def test_example_gate_trains_outside_the_tree(data, tmp_path):
    """The program of the page imports the gate from its own folder and trains with it."""
    (tmp_path / "above_mean.py").write_text(GATE)
    (tmp_path / "pretrain_above_mean.py").write_text(PROGRAM)
    flags = runs.with_gate(
        runs.flags(data, tmp_path, 2), "--gate", "above_mean", "--margin", "1.2"
    )
    done = subprocess.run(
        [sys.executable, "pretrain_above_mean.py", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    experts = [row["experts_per_token"] for row in runs.metrics(tmp_path)]
    assert len(experts) == 2
    assert all(0 < mean < 1.5 for mean in experts), "the first is 1.8 with the default margin"
