"""docs/: gates.md names every gate and its example works; what the pages name exists."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron.config.schema import SECTIONS
from megatron.moe.gate import _registry, available_gates, create_gate, gate_config_class
from megatron.moe.routing import GateInput

REPO = Path(__file__).resolve().parents[1]
TEXT = (REPO / "docs/gates.md").read_text()


CHECKPOINTS = (REPO / "docs/checkpoints.md").read_text()


def test_the_page_on_checkpoints_names_what_exists(finished):
    """Files of this repository, flags, and the files of a checkpoint."""
    for name in re.findall(r"`((?:megatron|tests)/[\w./]+)`", CHECKPOINTS):
        assert (REPO / name).exists(), name
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]+)", CHECKPOINTS)}
    known = {"config"}
    for section in SECTIONS.values():
        known |= {f.name for f in dataclasses.fields(section)}
    assert flags <= known
    folder = finished / "checkpoints/iter_0000020"
    named = set(re.findall(r"^    (\w+\.\w+)", CHECKPOINTS, re.MULTILINE))
    assert named | {"rank_00001.safetensors"} == {p.name for p in folder.iterdir()}


@pytest.fixture
def example(tmp_path):
    """The document's example as a module, registered as long as the test runs."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "above_mean.py").write_text(code)
    spec = importlib.util.spec_from_file_location("above_mean", tmp_path / "above_mean.py")
    module = sys.modules["above_mean"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del _registry["above_mean"], sys.modules["above_mean"]


def test_the_table_has_every_gate():
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == available_gates()
    assert all(
        line.count("|") == 8 for line in TEXT.splitlines() if re.match(r"\| `\w+` \|", line)
    )


def test_what_it_names_exists():
    for name in re.findall(
        r"`((?:megatron|tests|benchmarks|examples_deepspeed)/[\w./]+)`", TEXT
    ):
        assert (REPO / name.replace("NAME", "topk")).exists(), name
    flags = set(re.findall(r"`--([a-z0-9-]+)`", TEXT))
    fields = {
        f.replace("_", "-")
        for name in available_gates()
        for f in gate_config_class(name).__dataclass_fields__
    }
    known = fields | {
        "gate",
        "seed",
        "margin",
        "moe-loss-coeff",
        "moe-z-loss-coeff",
        "moe-balance-scope",
    }
    assert flags <= known, flags - known


def test_the_example_is_a_gate(example):
    from megatron.config.cli import parse

    assert (
        parse(["--gate", "above_mean", "--margin", "0.5"], gate_config_class).gate_options[
            "margin"
        ]
        == 0.5
    )
    gate = create_gate(
        "above_mean", hidden_size=8, num_experts=4, init_std=1.0, margin=0.9, loss_coeff=0.1
    )
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    out = gate(GateInput(x))
    out.check(20, 4)
    probs = (x @ gate.router.weight.t()).softmax(-1)
    expected = [(t, e) for t in range(20) for e in range(4) if probs[t, e] >= 0.9 / 4]
    assert list(zip(out.token_A.tolist(), out.expert_A.tolist())) == expected
    load = [sum(e == i for _, e in expected) / len(expected) for i in range(4)]
    aux = 0.1 * 4 * sum(load[e] * probs[:, e].mean().item() for e in range(4))
    assert out.aux_loss.item() == pytest.approx(aux, rel=1e-5)
    (out.weight_A.sum() + out.aux_loss).backward()
    assert gate.router.weight.grad.abs().sum() > 0
