"""PEER's Triton kernels against a float64 loop; on CPU tensors in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

from helpers.reference_mlp import reference_activation  # noqa: E402
from megatron.config.schema import ACTIVATIONS  # noqa: E402
from megatron.moe.experts.expert_init import ExpertInit  # noqa: E402
from megatron.moe.peer.experts import PEERExperts  # noqa: E402
from megatron.moe.peer.triton_lookup import (  # noqa: E402
    BLOCK_COLUMNS,
    BLOCK_PAIRS,
    triton_dots,
)

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative to the largest number: only sums, or the two parts of a sum, are rounded to the
dtype."""


def make_experts(
    num_local, width, activation, hidden_size, dtype=torch.float32, sparse_gradients=False
):
    experts = PEERExperts(
        num_local,
        num_local,
        hidden_size,
        width,
        activation,
        init=ExpertInit(init_std=0.5, output_std=0.5),
        sparse_gradients=sparse_gradients,
        backend="triton",
    )
    return experts.to(DEVICE, dtype)


def make_inputs(tokens, assignments, experts, hidden_size, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_size, generator=g)
    token = torch.randint(0, max(1, tokens), (assignments,), generator=g)
    expert = torch.randint(0, experts, (assignments,), generator=g)
    weight = torch.randn(assignments, generator=g)
    return (
        x.to(DEVICE, dtype).requires_grad_(),
        token.to(DEVICE),
        expert.to(DEVICE),
        weight.to(DEVICE).requires_grad_(),
    )


def reference_output(experts, x, token, expert, weight, tables):
    """One assignment and one hidden unit at a time; tables by name, [N_local x W, D]."""
    y = [0 * row for row in x]
    for t, e, w in zip(token.tolist(), expert.tolist(), weight):
        for row in range(e * experts.width, (e + 1) * experts.width):
            up = tables["w3"][row] @ x[t] if "w3" in tables else None
            hidden = reference_activation(experts.activation, tables["w1"][row] @ x[t], up)
            y[t] = y[t] + w * hidden * tables["w2"][row]
    return torch.stack(y) if y else x * 0


def assert_close(got, want, tolerance, name):
    largest = want.detach().abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance * largest, msg=lambda m: f"{name}: {m}"
    )


def assert_equals_reference(experts, inputs, tolerance):
    """Compare values, and gradients by name, with the loop in float64 on the CPU."""
    x, token, expert, weight = inputs
    x64, weight64 = (t.detach().cpu().double().requires_grad_() for t in (x, weight))
    tables = {
        name: p.detach().cpu().double().flatten(0, 1).requires_grad_()
        for name, p in experts.named_parameters()
    }
    ours = experts(x, token, expert, weight)
    expected = reference_output(experts, x64, token, expert, weight64, tables)
    assert ours.dtype == x.dtype and ours.shape == x.shape
    assert_close(ours.cpu().double(), expected, tolerance, "y")
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    got = torch.autograd.grad(ours, (x, weight, *experts.parameters()), grad.to(DEVICE))
    want = torch.autograd.grad(
        expected, (x64, weight64, *tables.values()), grad.double(), allow_unused=True
    )
    for name, a, b in zip(("x", "weight", *tables), got, want, strict=True):
        a = a.to_dense().cpu().double()
        b = torch.zeros_like(a) if b is None else b.view(a.shape)
        assert_close(a, b, tolerance, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width, sparse", [(1, True), (2, False)])
def test_experts_equal_reference(activation, width, sparse):
    experts = make_experts(5, width, activation, 7, sparse_gradients=sparse)
    assert_equals_reference(experts, make_inputs(4, 14, 5, 7), 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_precision_of_each_dtype(dtype):
    experts = make_experts(6, 2, "swiglu", 33, dtype)
    assert_equals_reference(experts, make_inputs(5, 12, 6, 33, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pairs", [0, 1, BLOCK_PAIRS, 2 * BLOCK_PAIRS + 1])
@pytest.mark.parametrize("columns", [1, BLOCK_COLUMNS, BLOCK_COLUMNS + 3])
def test_dots_equal_float64_sums(dtype, pairs, columns):
    """Rows repeat, and pairs and columns fill a program's tile exactly, partly or several
    times. The results are fp32 sums of unrounded products."""
    g = torch.Generator().manual_seed(0)
    rows, table = (torch.randn(n, columns, generator=g).to(dtype) for n in (3, 5))
    token = torch.randint(0, 3, (pairs,), generator=g)
    row = torch.randint(0, 5, (pairs,), generator=g)
    got = triton_dots(*(t.to(DEVICE) for t in (rows, table, token, row)))
    assert got.dtype == torch.float32 and got.shape == (pairs,)
    torch.testing.assert_close(
        got.cpu().double(),
        (rows[token].double() * table[row].double()).sum(1),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tokens", [0, 3])
def test_empty_list_gives_zeros(tokens):
    experts = make_experts(4, 2, "geglu", 5)
    x, token, expert, weight = make_inputs(tokens, 0, 4, 5)
    y = experts(x, token, expert, weight)
    y.sum().backward()
    assert y.shape == (tokens, 5) and (y == 0).all()
    for t in (x, weight, *experts.parameters()):
        assert t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_single_busy_expert_equals_reference(sparse):
    x, token, expert, weight = make_inputs(3, 40, 9, 6)
    experts = make_experts(9, 1, "gelu", 6, sparse_gradients=sparse)
    assert_equals_reference(experts, (x, token, expert * 0 + 4, weight), 1e-5)


def test_repeated_runs_are_bit_identical():
    experts = make_experts(6, 2, "swiglu", 40)
    inputs = make_inputs(5, 30, 6, 40)
    differentiable = (inputs[0], inputs[3], *experts.parameters())
    runs = []
    for _ in range(2):
        y = experts(*inputs)
        runs.append([y, *torch.autograd.grad(y.square().sum(), differentiable)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_strided_rows_equal_reference():
    x, token, expert, weight = make_inputs(6, 12, 4, 6)
    transposed = x.detach().t().contiguous().t().requires_grad_()
    assert not transposed.is_contiguous()
    experts = make_experts(4, 1, "gelu", 6)
    assert_equals_reference(experts, (transposed, token, expert, weight), 1e-5)


@pytest.mark.parametrize("swap", [False, True])
def test_table_offsets_exceed_32_bits(swap):
    """The table has 4 GB, of which only two pages are touched on a CPU."""
    rows, hidden = 2**20 + 1, 2**11
    table = torch.empty(rows, hidden, dtype=torch.bfloat16, device=DEVICE)
    table[-1] = 0.5
    table[0] = -0.25
    x = torch.ones(1, hidden, dtype=torch.bfloat16, device=DEVICE)
    row = torch.tensor([rows - 1, 0], device=DEVICE)
    token = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = (table, x, row, token) if swap else (x, table, token, row)
    assert triton_dots(*arguments).tolist() == [1024, -512]


def test_float64_is_refused():
    """An explicit request for Triton fails, and backend auto chooses another one."""
    experts = make_experts(4, 1, "gelu", 5, torch.float64)
    with pytest.raises(
        ValueError,
        match="--moe-backend is .triton.; allowed: a backend that works here .no support for "
        "torch.float64",
    ):
        experts(*make_inputs(3, 5, 4, 5, torch.float64))
    table = torch.zeros(1, 5, dtype=torch.float64, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(
        ValueError,
        match="the dtype of Triton's kernels is torch.float64; allowed: torch.bfloat16",
    ):
        triton_dots(table, table, index, index)
    experts.backend = "auto"
    assert not experts._uses_triton() and experts.float()._uses_triton() == (DEVICE == "cuda")
