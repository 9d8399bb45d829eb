"""Selection of the backend that computes experts: availability, and the reported reason."""

import importlib.util
import os

import pytest
import torch

from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.grouped_linear import grouped_linear


@pytest.fixture(autouse=True)
def fresh_choices():
    """Forget cached choices, because tests change what is installed."""
    choose_expert_backend.cache_clear()
    yield
    choose_expert_backend.cache_clear()


def test_auto_selects_cpu_on_cpu():
    assert choose_expert_backend("auto", "cpu", torch.bfloat16)[0] == "cpu"


@pytest.mark.parametrize("name", ["reference", "cpu", "grouped_mm"])
def test_requested_backend_is_used(name):
    chosen = choose_expert_backend(name, "cpu", torch.bfloat16)
    assert chosen == (name, f"--moe-backend is {name}")


def test_auto_selects_triton_on_cuda(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    chosen = choose_expert_backend("auto", "cuda", torch.bfloat16)
    assert chosen == ("triton", "a CUDA device, and triton is installed")


def test_auto_without_triton_gives_reasons(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name, reason = choose_expert_backend("auto", "cuda", torch.bfloat16)
    assert name == "grouped_mm" and "triton is not installed" in reason
    name, reason = choose_expert_backend("auto", "cuda", torch.float64)
    assert name == "reference"
    assert "triton is not installed" in reason
    assert "no support for torch.float64" in reason


@pytest.mark.parametrize(
    "requested, device, dtype, what",
    [
        ("fast", "cpu", torch.float32, "allowed: auto reference cpu grouped_mm triton"),
        ("cpu", "cuda", torch.float32, "the tensors are on cuda"),
        ("grouped_mm", "cpu", torch.float64, "no support for torch.float64 on cpu"),
        ("grouped_mm", "cuda", torch.float32, "no support for torch.float32 on cuda"),
        (
            "grouped_mm",
            "cpu",
            torch.float32,
            "a row of 18 numbers of torch.float32 is not a multiple of 16 bytes",
        ),
        ("triton", "cuda", torch.float64, "no support for torch.float64"),
    ],
)
def test_unavailable_backend_is_refused(requested, device, dtype, what):
    with pytest.raises(ValueError, match=f"--moe-backend is '{requested}'.*{what}"):
        choose_expert_backend(requested, device, dtype, (16, 18))


def test_auto_avoids_grouped_mm_for_unaligned_rows(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aligned = choose_expert_backend("auto", "cuda", torch.bfloat16, (64, 8))
    assert aligned[0] == "grouped_mm"
    name, reason = choose_expert_backend("auto", "cuda", torch.bfloat16, (64, 20))
    assert name == "reference" and "a row of 20 numbers" in reason


def test_grouped_mm_refuses_unaligned_rows():
    """Our message comes before torch's."""
    with pytest.raises(ValueError, match="a row of 3 numbers"):
        grouped_linear(torch.randn(2, 3), torch.randn(1, 4, 3), torch.tensor([2]), "grouped_mm")


def test_triton_on_cpu_needs_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose_expert_backend("triton", "cpu", torch.float32)


def test_grouped_mm_needs_recent_torch(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(ValueError, match="has no F.grouped_mm"):
        choose_expert_backend("grouped_mm", "cpu", torch.float32)
