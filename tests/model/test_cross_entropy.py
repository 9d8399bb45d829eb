"""The fused output layer and cross-entropy against torch's two operations."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model import cross_entropy
from megatron.model.cross_entropy import linear_cross_entropy

D = 6
V = 11


@pytest.fixture(params=[(512, 64), (7, 3), (4, 4)])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_sizes", lambda device: request.param)


def inputs(num_tokens, dtype, scale=1.0):
    """Return hidden states, the output weight, labels and a mask."""
    g = torch.Generator().manual_seed(num_tokens)
    h = torch.randn(num_tokens, D, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (num_tokens,), generator=g)
    mask = torch.rand(num_tokens, generator=g)
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, mask


def reference(h, weight, labels, mask):
    """Return the loss in fp64, computed row by row, and its leaves."""
    h, weight = (t.detach().double().requires_grad_() for t in (h, weight))
    total = 0 * h.sum() + 0 * weight.sum()
    for x, y, m in zip(h, labels, mask, strict=True):
        total = total - m.double() * F.linear(x, weight).log_softmax(-1)[y]
    return total, h, weight


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 12, 15])
def test_loss_matches_torch_in_fp64(num_tokens, small_chunks):
    h, weight, labels, mask = inputs(num_tokens, torch.float64)
    loss = linear_cross_entropy(h, weight, labels, mask)
    expected, h64, weight64 = reference(h, weight, labels, mask)
    torch.testing.assert_close(loss, expected)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(h.grad, h64.grad)
    torch.testing.assert_close(weight.grad, weight64.grad)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_lower_precisions_sum_in_fp32(dtype, tolerance, small_chunks):
    h, weight, labels, mask = inputs(15, dtype)
    loss = linear_cross_entropy(h, weight, labels, mask)
    expected, h64, weight64 = reference(h, weight, labels, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    loss.backward()
    expected.backward()
    for ours, theirs in ((h, h64), (weight, weight64)):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance
        )


def test_loss_scale_may_overflow_fp16():
    h, weight, labels, mask = inputs(9, torch.float16)
    mask = torch.ones_like(mask) / 9
    expected, h64, weight64 = reference(h, weight, labels, mask)
    (linear_cross_entropy(h, weight, labels, mask * 1e-2) * 2.0**17).backward()
    (expected * 1e-2 * 2.0**17).backward()
    for ours, theirs in ((h, h64), (weight, weight64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1.0)


def test_logits_far_apart_are_finite():
    h, weight, labels, mask = inputs(8, torch.float32, scale=1000)
    loss = linear_cross_entropy(h, weight, labels, mask)
    expected = reference(h, weight, labels, mask)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert torch.isfinite(h.grad).all() and torch.isfinite(weight.grad).all() and h.grad.any()


def test_only_needed_gradients_are_saved():
    h, weight, labels, mask = inputs(15, torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(h, weight, labels, mask)
        assert sorted(saved) == [(V, D), (15, D)], "never [N, V]"
        saved.clear()
        linear_cross_entropy(h, weight.detach(), labels, mask)
        assert saved == [(15, D)]
        saved.clear()
        with torch.no_grad():
            loss = linear_cross_entropy(h, weight, labels, mask)
        assert saved == [] and not loss.requires_grad


def test_repeatable_and_backward_twice():
    h, weight, labels, mask = inputs(15, torch.bfloat16)
    first, second = (linear_cross_entropy(h, weight, labels, mask) for _ in range(2))
    assert torch.equal(first, second)
    expected = torch.autograd.grad(first, (h, weight), retain_graph=True)
    for loss in (first, second):
        grads = torch.autograd.grad(loss, (h, weight), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))
