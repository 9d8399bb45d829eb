"""Triton's way through tiny experts against a float64 loop; without a GPU on CPU tensors, in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

from megatron.config.schema import ACTIVATIONS  # noqa: E402
from megatron.moe.peer.experts import PEERExperts  # noqa: E402
from megatron.moe.peer.triton_lookup import COLUMNS, PAIRS, triton_dots  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""relative to the largest number: what is rounded to the dtype is sums, or the two halves of one, alone"""


def make(num_local, width, activation, hidden_size, dtype=torch.float32, **options):
    experts = PEERExperts(
        num_local,
        num_local,
        hidden_size,
        width,
        activation,
        init_std=0.5,
        output_std=0.5,
        backend="triton",
        **options,
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


def act(name, gate, up):
    f = torch.nn.functional
    kinds = {"gelu": f.gelu, "relu": f.relu, "silu": f.silu, "swiglu": f.silu, "geglu": f.gelu}
    return kinds[name](gate) * up


def dumb(experts, x, token, expert, weight, tables):
    """One assignment and one hidden unit at a time; tables by name, [N_local x W, D]."""
    y = [0 * row for row in x]
    for t, e, w in zip(token.tolist(), expert.tolist(), weight):
        for row in range(e * experts.width, (e + 1) * experts.width):
            up = tables["w3"][row] @ x[t] if "w3" in tables else 1.0
            y[t] = (
                y[t]
                + w * act(experts.activation, tables["w1"][row] @ x[t], up) * tables["w2"][row]
            )
    return torch.stack(y) if y else x * 0


def close(got, want, tolerance, name):
    largest = want.detach().abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance * largest, msg=lambda m: f"{name}: {m}"
    )


def compare(experts, inputs, tolerance):
    """Values, and gradients by name, against the loop in float64 on the CPU."""
    x, token, expert, weight = inputs
    x64, weight64 = (t.detach().cpu().double().requires_grad_() for t in (x, weight))
    tables = {
        name: p.detach().cpu().double().flatten(0, 1).requires_grad_()
        for name, p in experts.named_parameters()
    }
    ours, expected = (
        experts(x, token, expert, weight),
        dumb(experts, x64, token, expert, weight64, tables),
    )
    assert ours.dtype == x.dtype and ours.shape == x.shape
    close(ours.cpu().double(), expected, tolerance, "y")
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    got = torch.autograd.grad(ours, (x, weight, *experts.parameters()), grad.to(DEVICE))
    want = torch.autograd.grad(
        expected, (x64, weight64, *tables.values()), grad.double(), allow_unused=True
    )
    for name, a, b in zip(("x", "weight", *tables), got, want, strict=True):
        a = a.to_dense().cpu().double()
        b = torch.zeros_like(a) if b is None else b.view(a.shape)
        close(a, b, tolerance, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width, sparse", [(1, True), (2, False)])
def test_against_a_loop(activation, width, sparse):
    compare(
        make(5, width, activation, 7, sparse_gradients=sparse), make_inputs(4, 14, 5, 7), 1e-5
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_precisions(dtype):
    compare(make(6, 2, "swiglu", 33, dtype), make_inputs(5, 12, 6, 33, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pairs", [0, 1, PAIRS, 2 * PAIRS + 1])
@pytest.mark.parametrize("columns", [1, COLUMNS, COLUMNS + 3])
def test_dots(dtype, pairs, columns):
    """Repeated rows, numbers of pairs and columns on both sides of a program's: fp32 sums of unrounded products."""
    g = torch.Generator().manual_seed(0)
    rows, table = (torch.randn(n, columns, generator=g).to(dtype) for n in (3, 5))
    token, row = (
        torch.randint(0, 3, (pairs,), generator=g),
        torch.randint(0, 5, (pairs,), generator=g),
    )
    got = triton_dots(*(t.to(DEVICE) for t in (rows, table, token, row)))
    assert got.dtype == torch.float32 and got.shape == (pairs,)
    torch.testing.assert_close(
        got.cpu().double(),
        (rows[token].double() * table[row].double()).sum(1),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_empty_list(tokens):
    experts = make(4, 2, "geglu", 5)
    x, token, expert, weight = make_inputs(tokens, 0, 4, 5)
    y = experts(x, token, expert, weight)
    y.sum().backward()
    assert y.shape == (tokens, 5) and (y == 0).all()
    for t in (x, weight, *experts.parameters()):
        assert t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_one_expert_with_everything(sparse):
    x, token, expert, weight = make_inputs(3, 40, 9, 6)
    compare(
        make(9, 1, "gelu", 6, sparse_gradients=sparse), (x, token, expert * 0 + 4, weight), 1e-5
    )


def test_repeatable_bit_for_bit():
    experts, inputs = make(6, 2, "swiglu", 40), make_inputs(5, 30, 6, 40)
    wanted, runs = (inputs[0], inputs[3], *experts.parameters()), []
    for _ in range(2):
        y = experts(*inputs)
        runs.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_rows_that_do_not_lie_side_by_side():
    x, token, expert, weight = make_inputs(6, 12, 4, 6)
    turned = x.detach().t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    compare(make(4, 1, "gelu", 6), (turned, token, expert, weight), 1e-5)


@pytest.mark.parametrize("swap", [False, True])
def test_rows_beyond_two_to_the_31_numbers(swap):
    """Of a table of 4 GB of which two pages are ever touched on a CPU."""
    rows, hidden = 2**20 + 1, 2**11
    table = torch.empty(rows, hidden, dtype=torch.bfloat16, device=DEVICE)
    table[-1], table[0] = 0.5, -0.25
    x = torch.ones(1, hidden, dtype=torch.bfloat16, device=DEVICE)
    row, token = (
        torch.tensor([rows - 1, 0], device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    assert triton_dots(
        *((table, x, row, token) if swap else (x, table, token, row))
    ).tolist() == [
        1024,
        -512,
    ]


def test_float64_is_refused_by_triton_and_not_sent_there():
    experts = make(4, 1, "gelu", 5, torch.float64)
    with pytest.raises(
        ValueError,
        match="--moe-backend is 'triton'; allowed: not here .it has no torch.float64",
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
    assert not experts._on_triton() and experts.float()._on_triton() == (DEVICE == "cuda")
