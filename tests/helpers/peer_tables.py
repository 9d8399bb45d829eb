"""Small PEER experts for tests, and a reference that takes one assignment at a time."""

from __future__ import annotations

from unittest import mock

import torch

from helpers.reference_mlp import reference_activation
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.peer import lookup
from megatron.moe.peer.experts import PEERExperts

D = 5
MKL = torch.backends.mkl.is_available()


def make_experts(
    num_local=4,
    width=1,
    activation="gelu",
    hidden_size=D,
    num_experts=None,
    sparse_gradients=False,
    backend="auto",
    **init,
):
    """PEER experts with weights large enough to tell the terms of a sum apart."""
    return PEERExperts(
        num_experts or num_local,
        num_local,
        hidden_size,
        width,
        activation,
        init=ExpertInit(**{"init_std": 0.7, "output_std": 0.5, **init}),
        sparse_gradients=sparse_gradients,
        backend=backend,
    )


def reuse_memory_from(size):
    """Patch the size in bytes from which sums are written to reused memory."""
    return mock.patch.object(lookup, "_REUSE_BYTES", size)


def make_inputs(tokens, assignments, experts, seed=0, dtype=torch.float64, hidden_size=D):
    """Random lists in random order, with repeats, idle experts and tokens without experts."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_size, generator=g, dtype=dtype).requires_grad_()
    assignments = assignments if tokens else 0
    token = torch.randint(0, max(1, tokens), (assignments,), generator=g)
    expert = torch.randint(0, experts, (assignments,), generator=g)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(assignments, generator=g, dtype=weight_dtype).requires_grad_()
    return x, token, expert, weight


def reference_output(experts, x, token, expert, weight):
    """One assignment and one hidden unit at a time."""
    y = [0 * row for row in x]
    for t, e, w in zip(token.tolist(), expert.tolist(), weight):
        for j in range(experts.width):
            up = experts.w_up[e, j] @ x[t] if is_gated(experts.activation) else None
            hidden = reference_activation(experts.activation, experts.w_in[e, j] @ x[t], up)
            y[t] = y[t] + w * hidden * experts.w_out[e, j]
    return torch.stack(y) if y else x * 0


def assert_equals_reference(experts, inputs, **tolerance):
    """Compare values, and gradients by name, with the reference on the same tables in float64."""
    x, token, expert, weight = inputs
    exact = make_experts(experts.num_local, experts.width, experts.activation).double()
    exact.load_state_dict(experts.state_dict())
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    ours = experts(x, token, expert, weight)
    expected = reference_output(exact, x64, token, expert, weight64)
    assert ours.dtype == x.dtype and ours.shape == x.shape
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, tables = zip(*experts.named_parameters())
    got = torch.autograd.grad(ours, (x, weight, *tables), grad.to(x.dtype))
    want = torch.autograd.grad(
        expected, (x64, weight64, *exact.parameters()), grad, allow_unused=True
    )
    for name, a, b in zip(("x", "weight", *names), got, want, strict=True):
        is_sparse = experts.sparse_gradients and name in names
        assert a.layout is (torch.sparse_coo if is_sparse else torch.strided), name
        a = a.to_dense().double()
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(
            a, b.double(), **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
