"""Modules without values: shapes as on the CPU, and torch's compiler is not imported for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from megatron.model.meta_device import meta_device


def test_modules_have_shapes_and_no_values():
    with meta_device():
        linear = nn.Linear(3, 4)
        embedding = nn.Embedding(5, 6)
        drawn = torch.empty(7).normal_(generator=torch.Generator())
    assert linear.weight.is_meta and linear.weight.shape == (4, 3)
    assert embedding.weight.is_meta and embedding.weight.shape == (5, 6)
    assert drawn.is_meta and drawn.shape == (7,)


def test_tensors_of_other_devices_are_initialized():
    with meta_device():
        values = torch.full((8,), 3.0, device="cpu").uniform_(0, 1)
    assert (values < 1).all()
    with meta_device():
        weight = nn.init.constant_(torch.empty(2, device="cpu"), 5.0)
    assert weight.tolist() == [5.0, 5.0]


def test_initialization_outside_is_as_before():
    torch.manual_seed(3)
    expected = torch.empty(4).normal_()
    with meta_device():
        nn.Linear(2, 2)
    torch.manual_seed(3)
    assert torch.equal(torch.empty(4).normal_(), expected)


@pytest.mark.parametrize("gate", ["topk", "peer"])
def test_costs_import_no_compiler(gate):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['analyze_model.py', '--model-only', '--num-experts', '4', '--gate', "
        f"{gate!r}]\n"
        "try:\n"
        "    runpy.run_path('tools/analyze_model.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
