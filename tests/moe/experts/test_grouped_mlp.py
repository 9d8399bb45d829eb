"""`grouped_linear` and the experts' MLP in every backend against fp64 loops.

Compared are values and gradients by name, and repeated runs bit for bit.
"""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.reference_mlp import reference_mlp
from helpers.routings import make_routing
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.activations import available_activations, is_gated
from megatron.moe.experts.grouped_linear import grouped_linear
from megatron.moe.experts.grouped_mlp import grouped_mlp

BACKENDS = ("reference", "cpu", "grouped_mm")
WITH_TRITON = (*BACKENDS, "triton")
"""Backends of tests in which the interpreter is fast enough; kernels have their own tests."""
E, D, H = 5, 16, 24


def tolerance(dtype, rows=1):
    """Return bounds for an output that sums the MLPs of `rows` rows.

    bf16: hidden units are rounded r = 8 times on the way (gate, up, activation, their
    product, the weight and its product, output, sum), each by a relative error of
    standard deviation u / sqrt(3) with u = 2^-9. An output sums H = 24 of them with
    coefficients of 0.3, and a term's root mean square is 0.25 (a gate and an up
    projection of 1.2 each, a weight of 0.58). That is a standard deviation of
    sqrt(8) * u / sqrt(3) * sqrt(24) * 0.25 = 4e-3 per row, and the bound is ten of them.
    Errors of different rows are independent, so those of a sum grow with sqrt(rows).
    """
    bound = 1e-4 if dtype == torch.float32 else 4e-2
    return {"atol": bound * math.sqrt(max(1, rows)), "rtol": bound}


def make_stacks(dtype, gated, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"w1": (E, H, D), "w3": (E, H, D), "w2": (E, D, H)}
    return {
        name: (torch.randn(shape, generator=g) * 0.3).to(dtype).requires_grad_()
        for name, shape in shapes.items()
        if gated or name != "w3"
    }


def sorted_rows(assignments, num_tokens, weight=None, limit=None):
    """Sort assignments, a list of (token, expert), by expert."""
    tokens = [t for t, _ in assignments]
    experts = [e for _, e in assignments]
    routing = make_routing(tokens, experts, weight)
    return build_dispatch_plan(routing, num_tokens, E, capacity=limit).routed


def assert_gradients_close(names, ours, theirs, dtype):
    """Compare gradients relative to the largest value of each, which grows with their sums."""
    for name, a, b in zip(names, ours, theirs, strict=True):
        scale = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(
            a.double() / scale,
            b / scale,
            **tolerance(dtype),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def check_mlp(backend, dtype, activation, assignments, num_tokens, limit=None):
    g = torch.Generator().manual_seed(len(assignments))
    x = torch.randn(num_tokens, D, generator=g).to(dtype).requires_grad_()
    weight = torch.rand(len(assignments), generator=g).requires_grad_()
    stacks = make_stacks(dtype, is_gated(activation))
    inputs = (x, weight, *stacks.values())
    rows = sorted_rows(assignments, num_tokens, weight, limit)
    dispatched = rows.source_index_S[: sum(rows.counts())].tolist()
    weight_S = GatherWeights.apply(weight, rows)
    w3 = stacks.get("w3")
    y = grouped_mlp(x, weight_S, stacks["w1"], w3, stacks["w2"], rows, activation, backend)
    assert y.dtype == dtype and y.shape == x.shape

    x64, weight64, *exact = (t.detach().double().requires_grad_() for t in inputs)
    expected = reference_mlp(
        x64,
        weight64[dispatched],
        dict(zip(stacks, exact, strict=True)),
        [assignments[a] for a in dispatched],
        activation,
    )
    per_token = Counter(assignments[a][0] for a in dispatched)
    most_rows = max(per_token.values(), default=0)
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype, most_rows))

    grad = torch.randn(y.shape, generator=g).to(dtype)
    ours = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    theirs = torch.autograd.grad(
        expected,
        (x64, weight64, *exact),
        grad.double(),
        allow_unused=True,
        materialize_grads=True,
    )
    assert_gradients_close(("x", "weight", *stacks), ours, theirs, dtype)
    again = torch.autograd.grad(y, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, E - 1)), max_size=30)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    assignments=lists,
    limit=st.sampled_from([None, None, 1, 3]),
    activation=st.sampled_from(available_activations()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_mlp_matches_loop(backend, assignments, limit, activation, dtype):
    """Any lists: repeats, experts and tokens without rows, no rows at all, capacity."""
    check_mlp(backend, dtype, activation, assignments, 6, limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_on_one_token(backend):
    """The case in which bf16 errors of an output add up most."""
    assignments = [(0, i % 2) for i in range(30)]
    check_mlp(backend, torch.bfloat16, "swiglu", assignments, 6)


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("activation", available_activations())
def test_all_rows_on_one_expert(backend, activation):
    check_mlp(backend, torch.float32, activation, [(t, 3) for t in range(12)], 12)


@pytest.mark.parametrize("activation", available_activations())
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_mlp_gradients_match_finite_differences(backend, activation):
    routing = make_routing([0, 0, 1, 2, 2], [0, 1, 1, 3, 1], torch.rand(5))
    rows = build_dispatch_plan(routing, 3, 4).routed
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, generator=g, dtype=torch.float64, requires_grad=True)
    w1, w3 = (
        torch.randn(4, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    w2 = torch.randn(4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight, w1, w3, w2) if is_gated(activation) else (x, weight, w1, w2)

    def mlp(x, weight, w1, *rest):
        w3 = rest[0] if is_gated(activation) else None
        return grouped_mlp(x, weight, w1, w3, rest[-1], rows, activation, backend)

    assert torch.autograd.gradcheck(mlp, inputs)


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_only_needed_gradients_are_computed(backend):
    """Each input alone gets the same gradient as with all of them."""
    rows = sorted_rows([(t % 6, (t * t) % E) for t in range(20)], 6)
    stacks = make_stacks(torch.float32, True)
    tensors = {
        "x": torch.randn(6, D),
        "weight": torch.rand(20),
        **{n: w.detach() for n, w in stacks.items()},
    }

    def loss(**given):
        t = {**tensors, **given}
        arguments = (t["x"], t["weight"], t["w1"], t["w3"], t["w2"])
        return grouped_mlp(*arguments, rows, "swiglu", backend).square().sum()

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    together = torch.autograd.grad(loss(**leaves), tuple(leaves.values()))
    for (name, leaf), expected in zip(leaves.items(), together, strict=True):
        (alone,) = torch.autograd.grad(loss(**{name: leaf}), leaf)
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)
    assert not loss().requires_grad


def test_cpu_backend_saves_no_token_rows():
    """Inputs and pre-activations are saved for backward, never rows [S, D]."""
    rows = sorted_rows([(t, e) for t in range(6) for e in range(E)], 6)
    x = torch.randn(6, D, requires_grad=True)
    weight = torch.rand(30, requires_grad=True)
    stacks = make_stacks(torch.float32, True)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        grouped_mlp(x, weight, stacks["w1"], stacks["w3"], stacks["w2"], rows, "swiglu", "cpu")
    inputs = [(6, D), (30,), (E, H, D), (E, H, D), (E, D, H)]
    assert sorted(saved) == sorted([*inputs, (30, H), (30, H)])


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0], [0, 0, 0, 0], [6, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_matches_loop(backend, counts, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), D, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(4, H, D, generator=g) * 0.3).to(dtype).requires_grad_()
    y = grouped_linear(x, weight, torch.tensor(counts).cumsum(0), backend)
    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    outputs = [weight64[e] @ row for e, row in zip(experts, x64, strict=True)]
    expected = torch.stack(outputs) if outputs else x64 @ weight64[0].T
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
    grad = torch.randn(y.shape, generator=g).to(dtype)
    # The second gradient is expanded, as that of a sum: not contiguous.
    for upstream in (grad, torch.ones((), dtype=dtype).expand(y.shape)):
        ours = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
        theirs = torch.autograd.grad(
            expected,
            (x64, weight64),
            upstream.double(),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, a, b in zip(("x", "weight"), ours, theirs, strict=True):
            torch.testing.assert_close(
                a.double(), b, **tolerance(dtype), msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_grouped_linear_matches_finite_differences(backend):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 5])

    def linear(x, weight):
        return grouped_linear(x, weight, offsets, backend)

    assert torch.autograd.gradcheck(linear, (x, weight))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(linear, (x, weight))
