"""`grouped_linear` and the experts' MLP in every backend, against dumb loops: values, gradients by name, repeatable."""

import importlib.util
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.reference_mlp import reference_mlp
from helpers.routings import make_routing
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.grouped_linear import grouped_linear
from megatron.moe.experts.grouped_mlp import grouped_mlp

BACKENDS = ("reference", "cpu", "grouped_mm")
WITH_TRITON = (*BACKENDS, "triton")
"""where the interpreter is fast enough; the kernels have tests of their own"""
ACTIVATIONS = ("gelu", "relu", "silu", "swiglu", "geglu")
E, D, H = 5, 16, 24


def tolerance(dtype):
    return (
        {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    )


def make_stacks(dtype, gated, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"w1": (E, H, D), "w3": (E, H, D), "w2": (E, D, H)}
    return {
        name: (torch.randn(shape, generator=g) * 0.3).to(dtype).requires_grad_()
        for name, shape in shapes.items()
        if gated or name != "w3"
    }


def check_mlp(backend, dtype, activation, assignments, num_tokens, limit=None):
    g = torch.Generator().manual_seed(len(assignments))
    x = torch.randn(num_tokens, D, generator=g).to(dtype).requires_grad_()
    weight = torch.rand(len(assignments), generator=g).requires_grad_()
    stacks = make_stacks(dtype, activation in ("swiglu", "geglu"))
    plan = build_dispatch_plan(
        make_routing([t for t, _ in assignments], [e for _, e in assignments], weight),
        num_tokens,
        E,
        capacity=limit,
    )
    rows = plan.routed
    kept = rows.source_index_S[: sum(rows.counts())].tolist()
    y = grouped_mlp(
        x,
        GatherWeights.apply(weight, rows),
        stacks["w1"],
        stacks.get("w3"),
        stacks["w2"],
        rows,
        activation,
        backend,
    )
    assert y.dtype == dtype and y.shape == x.shape
    exact = {n: w.detach().double().requires_grad_() for n, w in stacks.items()}
    x64, weight64 = (
        x.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
    )
    expected = reference_mlp(
        x64, weight64[kept], exact, [assignments[a] for a in kept], activation
    )
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
    grad = torch.randn(y.shape, generator=g)
    names = ("x", "weight", *stacks)
    ours = torch.autograd.grad(
        y, (x, weight, *stacks.values()), grad.to(dtype), retain_graph=True
    )
    theirs = torch.autograd.grad(
        expected,
        (x64, weight64, *exact.values()),
        grad.to(dtype).double(),
        allow_unused=True,
        materialize_grads=True,
    )
    for name, a, b in zip(names, ours, theirs):
        scale = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(
            a.double() / scale,
            b / scale,
            **tolerance(dtype),
            msg=lambda m, name=name: f"{name}: {m}",
        )
    again = torch.autograd.grad(y, (x, weight, *stacks.values()), grad.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, E - 1)), max_size=30)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    assignments=lists,
    limit=st.sampled_from([None, None, 1, 3]),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_mlp_of_every_backend_against_a_loop(
    backend, assignments, limit, activation, dtype
):
    """Any lists: repeats, experts and tokens without rows, none at all, capacity."""
    check_mlp(backend, dtype, activation, assignments, 6, limit)


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_one_expert_with_everything(backend, activation):
    check_mlp(backend, torch.float32, activation, [(t, 3) for t in range(12)], 12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_by_finite_differences(backend, activation):
    plan = build_dispatch_plan(
        make_routing([0, 0, 1, 2, 2], [0, 1, 1, 3, 1], torch.rand(5)), 3, 4
    )
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, generator=g, dtype=torch.float64, requires_grad=True)
    w1, w3 = (
        torch.randn(4, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    w2 = torch.randn(4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    if activation in ("swiglu", "geglu"):
        assert torch.autograd.gradcheck(
            lambda *a: grouped_mlp(*a, plan.routed, activation, backend),
            (x, weight, w1, w3, w2),
        )
    else:
        assert torch.autograd.gradcheck(
            lambda x, weight, w1, w2: grouped_mlp(
                x, weight, w1, None, w2, plan.routed, activation, backend
            ),
            (x, weight, w1, w2),
        )


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_only_what_needs_a_gradient_gets_one(backend):
    """Each input alone, and the same gradient as with all of them."""
    assignments = [(t % 6, (t * t) % E) for t in range(20)]
    rows = build_dispatch_plan(
        make_routing([t for t, _ in assignments], [e for _, e in assignments]), 6, E
    ).routed
    stacks = make_stacks(torch.float32, True)
    tensors = {
        "x": torch.randn(6, D),
        "weight": torch.rand(20),
        **{n: w.detach() for n, w in stacks.items()},
    }

    def run(**given):
        t = {**tensors, **given}
        return (
            grouped_mlp(t["x"], t["weight"], t["w1"], t["w3"], t["w2"], rows, "swiglu", backend)
            .square()
            .sum()
        )

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    whole = dict(zip(leaves, torch.autograd.grad(run(**leaves), tuple(leaves.values()))))
    for name, leaf in leaves.items():
        (alone,) = torch.autograd.grad(run(**{name: leaf}), leaf)
        torch.testing.assert_close(alone, whole[name], rtol=1e-6, atol=1e-6)
    assert not run().requires_grad


def test_the_cpu_backend_saves_no_row_of_a_token():
    """What lives between forward and backward: inputs and pre-activations, never [S, D]."""
    assignments = [(t, e) for t in range(6) for e in range(E)]
    rows = build_dispatch_plan(
        make_routing([t for t, _ in assignments], [e for _, e in assignments]), 6, E
    ).routed
    x, weight, saved = (
        torch.randn(6, D, requires_grad=True),
        torch.rand(30, requires_grad=True),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        stacks = make_stacks(torch.float32, True)
        grouped_mlp(x, weight, stacks["w1"], stacks["w3"], stacks["w2"], rows, "swiglu", "cpu")
    assert sorted(saved) == sorted(
        [(6, D), (30,), (E, H, D), (E, H, D), (E, D, H), (30, H), (30, H)]
    )


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0], [0, 0, 0, 0], [6, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_against_a_loop(backend, counts, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), D, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(4, H, D, generator=g) * 0.3).to(dtype).requires_grad_()
    y = grouped_linear(x, weight, torch.tensor(counts).cumsum(0), backend)
    x64, weight64 = (
        x.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
    )
    experts = [e for e, n in enumerate(counts) for _ in range(n)]
    pieces = [weight64[e] @ row for e, row in zip(experts, x64)]
    expected = torch.stack(pieces) if pieces else x64 @ weight64[0].T
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
    grad = torch.randn(y.shape, generator=g).to(dtype)
    # An expanded gradient, as of a sum: not contiguous.
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
        for name, a, b in zip(("x", "weight"), ours, theirs):
            torch.testing.assert_close(
                a.double(), b, **tolerance(dtype), msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_grouped_linear_by_finite_differences(backend):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 5])
    assert torch.autograd.gradcheck(
        lambda x, w: grouped_linear(x, w, ends, backend), (x, weight)
    )
    if backend == "reference":
        assert torch.autograd.gradgradcheck(
            lambda x, w: grouped_linear(x, w, ends, backend), (x, weight)
        )


def test_which_backend_and_why(monkeypatch):
    installed, no_triton = importlib.util.find_spec, lambda name: None
    assert choose_expert_backend("auto", "cpu", torch.bfloat16)[0] == "cpu"
    for name in ("reference", "cpu", "grouped_mm"):
        assert choose_expert_backend(name, "cpu", torch.bfloat16) == (
            name,
            "--moe-backend says so",
        )
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: name)
        choose_expert_backend.cache_clear()
        assert choose_expert_backend("auto", "cuda", torch.bfloat16) == (
            "triton",
            "a CUDA device, and triton is installed",
        )
        m.setattr(importlib.util, "find_spec", no_triton)
        choose_expert_backend.cache_clear()
        name, why = choose_expert_backend("auto", "cuda", torch.bfloat16)
        assert name == "grouped_mm" and "triton is not installed" in why
        name, why = choose_expert_backend("auto", "cuda", torch.float64)
        assert (
            name == "reference"
            and "triton is not installed" in why
            and "no torch.float64" in why
        )
    choose_expert_backend.cache_clear()
    assert importlib.util.find_spec is installed


@pytest.mark.parametrize(
    "requested, device, dtype, what",
    [
        ("fast", "cpu", torch.float32, "allowed: auto reference cpu grouped_mm triton"),
        ("cpu", "cuda", torch.float32, "the tensors are on cuda"),
        ("grouped_mm", "cpu", torch.float64, "no torch.float64 on cpu"),
        ("grouped_mm", "cuda", torch.float32, "no torch.float32 on cuda"),
        (
            "grouped_mm",
            "cpu",
            torch.float32,
            "a row of 18 numbers of torch.float32 is no multiple of 16 bytes",
        ),
        ("triton", "cuda", torch.float64, "no torch.float64"),
    ],
)
def test_backends_that_are_not_possible(requested, device, dtype, what):
    with pytest.raises(ValueError, match=f"--moe-backend is '{requested}'.*{what}"):
        choose_expert_backend(requested, device, dtype, (16, 18))


def test_sizes_that_grouped_mm_cannot_do(monkeypatch):
    """auto takes another one, and the one that was asked for says so before torch does."""
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: None)
        choose_expert_backend.cache_clear()
        assert choose_expert_backend("auto", "cuda", torch.bfloat16, (64, 8))[0] == "grouped_mm"
        name, why = choose_expert_backend("auto", "cuda", torch.bfloat16, (64, 20))
        assert name == "reference" and "a row of 20 numbers" in why
    choose_expert_backend.cache_clear()
    with pytest.raises(ValueError, match="a row of 3 numbers"):
        grouped_linear(torch.randn(2, 3), torch.randn(1, 4, 3), torch.tensor([2]), "grouped_mm")


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    choose_expert_backend.cache_clear()
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose_expert_backend("triton", "cpu", torch.float32)
    choose_expert_backend.cache_clear()


def test_grouped_mm_of_an_older_torch(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    choose_expert_backend.cache_clear()
    with pytest.raises(ValueError, match="has no F.grouped_mm"):
        choose_expert_backend("grouped_mm", "cpu", torch.float32)
    choose_expert_backend.cache_clear()
