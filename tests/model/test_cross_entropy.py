"""The output layer with its cross-entropy, against torch's two operations."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model import cross_entropy
from megatron.model.cross_entropy import linear_cross_entropy

D, V = 6, 11


@pytest.fixture(params=[(512, 64), (7, 3), (4, 4)])
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_sizes", lambda device: request.param)


def inputs(num_tokens, dtype, scale=1.0):
    g = torch.Generator().manual_seed(num_tokens)
    h = (
        (torch.randn(num_tokens, D, generator=g, dtype=torch.float64) * scale)
        .to(dtype)
        .requires_grad_()
    )
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (num_tokens,), generator=g)
    return h, weight, labels, torch.rand(num_tokens, generator=g)


def expected(h, weight, labels, mask):
    """In fp64, one row after the other."""
    h, weight = (t.detach().double().requires_grad_() for t in (h, weight))
    total = sum(
        (
            m.double() * -(F.linear(x, weight).log_softmax(-1)[y])
            for x, y, m in zip(h, labels, mask)
        ),
        0 * h.sum() + 0 * weight.sum(),
    )
    return total, h, weight


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 12, 15])
def test_against_torch_in_fp64(num_tokens, small_pieces):
    h, weight, labels, mask = inputs(num_tokens, torch.float64)
    ours, (theirs, h64, weight64) = (
        linear_cross_entropy(h, weight, labels, mask),
        expected(h, weight, labels, mask),
    )
    torch.testing.assert_close(ours, theirs)
    (ours * 3).backward()
    (theirs * 3).backward()
    torch.testing.assert_close(h.grad, h64.grad)
    torch.testing.assert_close(weight.grad, weight64.grad)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_lower_precisions_sum_in_fp32(dtype, tolerance, small_pieces):
    h, weight, labels, mask = inputs(15, dtype)
    ours, (theirs, h64, weight64) = (
        linear_cross_entropy(h, weight, labels, mask),
        expected(h, weight, labels, mask),
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=0)
    ours.backward()
    theirs.backward()
    for ours, theirs in ((h, h64), (weight, weight64)):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance
        )


def test_a_loss_scale_that_is_no_fp16_number():
    h, weight, labels, mask = inputs(9, torch.float16)
    mask = torch.ones_like(mask) / 9
    total, h64, weight64 = expected(h, weight, labels, mask)
    (linear_cross_entropy(h, weight, labels, mask * 1e-2) * 2.0**17).backward()
    (total * 1e-2 * 2.0**17).backward()
    for ours, theirs in ((h, h64), (weight, weight64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1.0)


def test_logits_that_are_far_apart():
    h, weight, labels, mask = inputs(8, torch.float32, scale=1000)
    value = linear_cross_entropy(h, weight, labels, mask)
    torch.testing.assert_close(
        value.double(), expected(h, weight, labels, mask)[0], rtol=1e-5, atol=0
    )
    value.backward()
    assert torch.isfinite(h.grad).all() and torch.isfinite(weight.grad).all() and h.grad.any()


def test_what_is_kept_and_what_is_computed_without_need():
    h, weight, labels, mask = inputs(15, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    ):
        linear_cross_entropy(h, weight, labels, mask)
        assert sorted(saved) == [(V, D), (15, D)], "never [N, V]"
        saved.clear()
        linear_cross_entropy(h, weight.detach(), labels, mask)
        assert saved == [(15, D)]
        saved.clear()
        with torch.no_grad():
            value = linear_cross_entropy(h, weight, labels, mask)
        assert saved == [] and not value.requires_grad


def test_repeatable_and_backward_twice():
    h, weight, labels, mask = inputs(15, torch.bfloat16)
    first, second = (linear_cross_entropy(h, weight, labels, mask) for _ in range(2))
    assert torch.equal(first, second)
    grads = [
        torch.autograd.grad(value, (h, weight), retain_graph=True)
        for value in (first, first, second)
    ]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))
