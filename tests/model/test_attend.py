"""Sliding windows and sinks against a softmax over all pairs, values and gradients."""

import pytest
import torch

from benchmarks import report
from megatron.model.attend import ScoreOptions, attend, window_mask
from megatron.model.document_attention import DocumentLayout, document_attention


def reference(q, k, v, mask, sinks=None, scale=None):
    """Attend with plain operations; a sink is one more column of scores."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*q.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def draw(length, groups=2, size=6, dtype=torch.float64, batch=2, keys=None):
    """Return queries, keys, values and sinks of four heads."""
    shapes = [(batch, 4, length, size)] + [(batch, groups, keys or length, size)] * 2
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.randn(4, dtype=dtype).mul(2).requires_grad_()]


def assert_equal_gradients(y, expected, inputs, exact_inputs=None):
    """Compare outputs and gradients of all inputs that are used."""
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    exact = torch.autograd.grad((expected * weight).sum(), exact_inputs or inputs)
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, exact_gradient)


def near(length, window):
    """Return the causal mask of a window by its definition."""
    query = torch.arange(length)[:, None]
    key = torch.arange(length)
    return (key <= query) & (query - key < (window or length))


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (7, 0),
        (7, 1),
        (7, 3),
        (7, 7),
        (64, 5),
        (65, 5),
        (130, 70),
        (129, 64),
        (200, 64),
        (256, 40),
    ],
)
def test_windows_and_sinks_equal_all_pairs(length, window, has_sinks):
    q, k, v, sinks = draw(length)
    options = ScoreOptions(window=window, sinks_H=sinks if has_sinks else None)
    y = attend(q, k, v, options)
    expected = reference(q, k, v, near(length, window), options.sinks_H)
    assert_equal_gradients(y, expected, (q, k, v, sinks) if has_sinks else (q, k, v))


@pytest.mark.parametrize("groups", [1, 4])
def test_masks_take_sinks_and_scales(groups):
    """As in decoding: fewer queries than keys."""
    q, k, v, sinks = draw(3, groups, keys=9)
    mask = torch.rand(2, 1, 3, 9) < 0.5
    mask[..., 0] = True
    y = attend(q, k, v, ScoreOptions(scale=0.7, sinks_H=sinks), mask)
    expected = reference(q, k, v, mask, sinks, 0.7)
    assert_equal_gradients(y, expected, (q, k, v, sinks))


@pytest.mark.parametrize("size", [6, 8, 64])
def test_sinks_are_precise_in_bf16(size):
    """The sink is not rounded to 16 bits, although queries hold it."""
    q, k, v, _ = draw(20, size=size, dtype=torch.bfloat16)
    sinks = torch.tensor([0.013, 3.1, -7.7, 9.3])
    y = attend(q, k, v, ScoreOptions(sinks_H=sinks))
    exact = [x.double() for x in (q, k, v)]
    expected = reference(*exact, near(20, 0), sinks.double())
    # Weights, values and outputs are rounded to 8 bits.
    bound = 3 * 2**-8 * exact[2].abs().max()
    assert (y.double() - expected).abs().max() < bound
    # Rounding the sink of 9.3 to 9.3125 would change a small weight by 1.2 %.
    share = (y[:, 3].double() / expected[:, 3]).median()
    assert abs(share - 1) < 2**-8


def test_dropout_leaves_the_sink():
    q, k, _, sinks = draw(5, groups=4, size=5)
    v = torch.eye(5, dtype=torch.float64).expand(2, 4, 5, 5)
    expected = reference(q, k, v, near(5, 0), sinks)
    weights = attend(q, k, v, ScoreOptions(0.5, sinks_H=sinks))
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * expected[kept])
    assert 0 < kept.sum() < (expected != 0).sum()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 1, 4, 20, 80])
def test_documents_have_windows_and_sinks(window, has_sinks, document_path):
    lengths = [[3, 90, 7], [50, 1, 49]]
    rows = [torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths]
    segments = torch.stack(rows)
    q, k, v, sinks = draw(100)
    options = ScoreOptions(window=window, sinks_H=sinks if has_sinks else None)
    y = document_attention(q, k, v, DocumentLayout(segments), options)
    same = segments[:, :, None] == segments[:, None]
    expected = reference(q, k, v, (same & near(100, window))[:, None], options.sinks_H)
    assert_equal_gradients(y, expected, (q, k, v, sinks) if has_sinks else (q, k, v))


def test_window_mask_aligns_last_queries():
    expected = [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert window_mask(2, 4, 2, torch.device("cpu")).int().tolist() == expected


def test_window_memory_is_linear(monkeypatch):
    """Eight times the tokens take eight times the memory, less than a byte for each pair."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # silences torch's profiler
    bytes_of = {}
    for times in (1, 8):
        *inputs, sinks = draw(512 * times, groups=4, size=8, dtype=torch.float32, batch=1)
        options = ScoreOptions(window=64, sinks_H=sinks)

        def step(inputs=inputs, options=options):
            torch.autograd.grad(attend(*inputs, options).sum(), inputs)

        bytes_of[times] = report.peak_bytes(step)
    assert 0 < bytes_of[8] <= 8.5 * bytes_of[1]
