"""The public names of megatron.moe: what they are, and that importing the package is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

import megatron.moe
from megatron.moe import gate, routing

REPO = Path(__file__).resolve().parents[2]


def run_python(code):
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    return result.stdout.strip()


def test_importing_package_leaves_torch_out():
    code = "import sys, megatron.moe; dir(megatron.moe); print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_public_names_import_on_use():
    code = (
        "from megatron.moe import Gate, GateInput, Routing, LoadBalancingLoss, create_gate, "
        "available_gates; gate = create_gate('topk', hidden_size=4, num_experts=2); "
        "print(isinstance(gate, Gate), 'topk' in available_gates())"
    )
    assert run_python(code) == "True True"


def test_public_names_are_the_originals():
    homes = dict.fromkeys(("GateInput", "Routing", "LoadBalancingLoss"), routing)
    homes |= dict.fromkeys(("Gate", "create_gate", "available_gates"), gate)
    assert set(megatron.moe.__all__) == set(homes)
    for name, module in homes.items():
        assert getattr(megatron.moe, name) is getattr(module, name)
    assert set(homes) <= set(dir(megatron.moe))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'megatron.moe' has no attribute 'Router'"):
        _ = megatron.moe.Router
