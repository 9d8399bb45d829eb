"""MoE layers of all gates on a GPU against the same layers on the CPU, and over NCCL.

Without a GPU both are on the CPU, which tests the tests.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helpers.moe_layers import make_carry, make_input, make_layer
from helpers.spawn import groups_for
from helpers.triton_kernels import (
    CHOICES,
    DEVICE,
    assert_close,
    mlp_inputs,
    reference_rows_mlp,
    routed,
)
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.grouped_mlp import grouped_mlp
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.gate import available_gates

ALL = available_gates()
TOKENS = 24
CLOSE = {"atol": 1e-4, "rtol": 1e-3}

pytestmark = pytest.mark.gpu


def run_layer(layer, device, seed=0, padding=False):
    """Run forward and backward on a device.

    Returns:
        Output, auxiliary loss, and gradients of the input and of the parameters, on the CPU.
    """
    layer = layer.to(device)
    x, ids = make_input(TOKENS, seed)
    carry = make_carry(layer.gate, TOKENS, seed)
    layout = None
    if padding:
        padding_BS = (torch.arange(TOKENS) % 5 == 0)[None]
        carry = carry[~padding_BS[0]]
        layout = TokenLayout(padding_BS.to(device))
    x = x.to(device).requires_grad_()
    out = layer(x, FFNContext(ids.to(device), carry.to(device), layout=layout))
    (out.y.square().sum() + out.aux_loss).backward()
    results = {"y": out.y, "aux_loss": out.aux_loss, "grad of x": x.grad}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        results[name] = torch.zeros_like(parameter) if grad is None else grad
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def assert_all_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "factor, padding", [(0.0, False), (1.0, True)], ids=["dropless", "capacity and padding"]
)
def test_layer_equals_cpu(name, backend, factor, padding):
    """Values and all gradients in fp32: choices, capacity, kernels, combination."""
    options = {"moe_train_capacity_factor": factor, "moe_min_capacity": 1, "layer": 1}
    on_cpu = make_layer(name, moe_backend="reference", **options)
    on_gpu = make_layer(name, moe_backend=backend, **options)
    expected = run_layer(on_cpu, "cpu", padding=padding)
    assert_all_close(run_layer(on_gpu, DEVICE, padding=padding), expected)


@pytest.mark.parametrize("name", ALL)
def test_layer_repeats_bit_for_bit(name):
    """Rows are summed in a fixed order, without atomic additions."""
    first, second = (run_layer(make_layer(name, layer=1), DEVICE) for _ in range(2))
    for key in ("y", "grad of x"):
        assert torch.equal(first[key], second[key]), key


def _sharded_and_complete(name):
    """Run one rank's tokens through a sharded layer, and through one that is not."""
    world_size = dist.get_world_size()
    rank = dist.get_rank()
    device = f"cuda:{rank}" if dist.get_backend() == "nccl" else "cpu"
    num_experts = 2 * world_size
    options = {"num_experts": num_experts, "layer": 1}
    sharded = run_layer(make_layer(name, groups_for(world_size), **options), device, seed=rank)
    complete = run_layer(make_layer(name, **options), device, seed=rank)
    return sharded, complete


@pytest.mark.parametrize("name", ALL)
def test_exchange_between_gpus(name, gpu_ranks_all):
    """Sharded over all GPUs: outputs and input gradients of every rank, and the gradients of
    the gate; those of experts, which see the tokens of all ranks, add up."""
    results = gpu_ranks_all.run(_sharded_and_complete, name)
    for sharded, complete in results:
        for key, value in complete.items():
            if not key.startswith("experts."):
                torch.testing.assert_close(
                    sharded[key], value, msg=lambda m, k=key: f"{k}: {m}", **CLOSE
                )
    for key in results[0][0]:
        if key.startswith("experts."):
            both = torch.cat([sharded[key] for sharded, _ in results])
            expected = sum(complete[key] for _, complete in results)
            torch.testing.assert_close(both, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["triton", "grouped_mm", "reference"])
def test_backends_equal_rows_one_by_one(backend, dtype):
    """Every backend that this device has for the dtype, against one row at a time in fp64."""
    names = ("x", "weight", "w1", "w3", "w2")
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 32, 16, dtype)
    if backend != "reference":
        try:
            choose_expert_backend(backend, DEVICE, dtype, (16, 32))
        except ValueError as error:
            pytest.skip(str(error))
    y = grouped_mlp(*(inputs[name] for name in names), rows, "swiglu", backend)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = reference_rows_mlp(wide, rows, "swiglu")
    assert y.dtype == dtype and y.device.type == DEVICE
    assert_close("y", y.detach(), expected.detach(), roundings=6)
    actual = torch.autograd.grad(y.sum(), list(inputs.values()))
    reference = torch.autograd.grad(expected.sum(), list(wide.values()))
    for name, a, b in zip(inputs, actual, reference, strict=True):
        assert_close(f"grad of {name}", a, b, roundings=24, dtype=dtype)
