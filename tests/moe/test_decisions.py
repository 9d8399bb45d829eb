"""Decisions repeated on other values: indices are the recorded ones, values are new."""

import pytest
import torch
from torch import nn

from megatron.moe.decisions import DecisionRecorder, DecisionRepeater

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 0.1
NOISE = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * 0.1


def repeat(function, x, other):
    """Record a function at x and repeat it at `other`."""
    with DecisionRecorder() as recorder:
        first = function(x)
    with DecisionRepeater(recorder.entries, "the function"):
        return first, function(other)


INDICES = {
    "topk": lambda x: x.topk(2).indices,
    "topk of columns": lambda x: torch.topk(x, 3, dim=0, largest=False).indices,
    "sort": lambda x: x.sort(descending=True).indices,
    "stable sort": lambda x: x.sort(dim=0, stable=True).indices,
    "argsort": lambda x: x.argsort(),
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1).indices,
    "min keepdim": lambda x: x.min(0, keepdim=True).indices,
    "kthvalue": lambda x: x.kthvalue(2, dim=-1).indices,
    "median": lambda x: x.median(0).indices,
    "cummax": lambda x: x.cummax(1).indices,
    "greater": lambda x: x > 0,
    "less than a tensor": lambda x: x < x.mean(),
    "greater in place": lambda x: x.clone().gt_(0),
    "nonzero": lambda x: x.relu().nonzero(),
    "where": lambda x: torch.stack(torch.where(x > 0.05)),
    "mask that is changed later": lambda x: (x > 0).index_fill_(1, torch.tensor([2]), True),
    "sign": lambda x: x.sign(),
    "round": lambda x: (x * 30).round_(),
    "cast": lambda x: (x * 30).to(torch.int32),
    "cast in place": lambda x: torch.zeros(40, 6, dtype=torch.int64).copy_(x * 30),
    "searchsorted": lambda x: torch.searchsorted(torch.linspace(-0.3, 0.3, 9), x),
    "number": lambda x: torch.tensor(int(x.sum() * 1000)),
    "branch": lambda x: (
        x.new_ones(2) if x.sum() > X.sum() + NOISE.sum() / 2 else x.new_zeros(1)
    ),
    "indices of many columns": lambda x: x.flatten().argsort().view(-1).topk(3).indices,
}


@pytest.mark.parametrize("name", INDICES)
def test_discrete_outputs_are_repeated(name):
    """The same at x + noise as at x, where the function itself gives others."""
    function = INDICES[name]
    first, second = repeat(function, X, X + NOISE)
    assert second.dtype == first.dtype and torch.equal(first, second)
    other = function(X + NOISE)
    assert other.shape != first.shape or not torch.equal(other, first), "noise has no effect"


def chosen(x, index):
    """Values at these columns of each row, one by one."""
    return torch.stack([x[t, e] for t, row in enumerate(index.tolist()) for e in row])


def rows(index):
    return index if index.dim() == 2 else index[:, None]


VALUES = {
    "topk": (lambda x: x.topk(2), lambda x, i: chosen(x, i)),
    "sort": (lambda x: x.sort(), lambda x, i: chosen(x, i)),
    "max": (lambda x: x.max(-1), lambda x, i: chosen(x, rows(i))),
    "min": (lambda x: x.min(1, keepdim=True), lambda x, i: chosen(x, i)),
    "kthvalue": (lambda x: x.kthvalue(3), lambda x, i: chosen(x, rows(i))),
    "cummax": (lambda x: x.cummax(1), lambda x, i: chosen(x, i)),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_and_gradients_at_recorded_indices(name):
    function, reference = VALUES[name]
    x = (X + NOISE).requires_grad_()
    first, second = repeat(function, X, x)
    values = reference(x, first.indices)
    weight = torch.arange(1.0, len(values) + 1)
    torch.testing.assert_close(second[0].flatten(), values)
    (grad,) = torch.autograd.grad((second[0].flatten() * weight).sum(), x)
    (expected,) = torch.autograd.grad((values * weight).sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("relu", [torch.relu, nn.ReLU(), lambda x: (x * 1).relu_()])
def test_relu_keeps_its_side(relu):
    """Where the input was positive the derivative stays 1, elsewhere 0; values are relu's."""
    x = (X + NOISE).requires_grad_()
    first, second = repeat(relu, X, x)
    (grad,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(grad, (X > 0).float())
    assert ((first > 0) != (x > 0)).sum() > 20
    expected = torch.where(X > 0, x.detach().clamp_min(0), 0)
    torch.testing.assert_close(second.detach(), expected, rtol=0, atol=1e-37)


def test_nan_stays_visible():
    bad = X.clone()
    bad[0, 0] = float("nan")
    _, second = repeat(torch.relu, bad, bad)
    assert second[0, 0].isnan() and second.isnan().sum() == 1


def test_indices_are_stored_compactly():
    """8 bits for 6 columns, 16 for 300, and not the values."""
    with DecisionRecorder() as recorder:
        X.topk(2)
        torch.zeros(2, 300).sort()
        torch.zeros(100_000).argsort()
        X.softmax(-1).sum()
        torch.zeros_like(X, dtype=torch.int64)
        X.new_zeros(3, dtype=torch.bool)
    stored = [[t.dtype for t in outputs] for _, outputs in recorder.entries]
    assert stored == [[torch.uint8], [torch.int16], [torch.int32]]


def test_entries_are_repeated_twice():
    """A retained graph is recomputed more than once."""
    with DecisionRecorder() as recorder:
        first = X.argsort()
    for _ in range(2):
        with DecisionRepeater(recorder.entries, "the function"):
            assert torch.equal((X + NOISE).argsort(), first)


def test_function_is_decided_once():
    """Its outputs are one decision, and it is not called again."""
    calls = []

    def choose(x):
        calls.append(x)
        return x.argsort(), len(calls)

    recorder = DecisionRecorder()
    with recorder:
        index, count = recorder.decide(choose, X.clone().requires_grad_())
        first = index.clone()
        index.zero_()
        single = recorder.decide(torch.argmax, X)
    assert len(recorder.entries) == 2
    repeater = DecisionRepeater(recorder.entries, "the function")
    with repeater:
        again, count_again = repeater.decide(choose, X + NOISE)
        assert torch.equal(repeater.decide(torch.argmax, X + NOISE), single)
    assert torch.equal(again, first) and count == count_again == len(calls) == 1


def check_fails(first, second, match):
    with DecisionRecorder() as recorder:
        first()
    with (
        pytest.raises(AssertionError, match=rf"the function routes differently.*{match}"),
        DecisionRepeater(recorder.entries, "the function"),
    ):
        second()


class Chooser:
    def choose(self, x):
        return {"index": x.argmax(-1), "count": (x > 0).sum()}


@pytest.mark.parametrize(
    "function",
    [lambda: Chooser().choose, lambda: lambda x: Chooser().choose(x)],
    ids=["method", "lambda"],
)
def test_method_or_lambda_is_decided_once(function):
    """Each pass makes another object of it. Its outputs may have names."""
    with DecisionRecorder() as recorder:
        first = recorder.decide(function(), X)
        expected = {name: value.clone() for name, value in first.items()}
        first["index"].zero_()
    assert len(recorder.entries) == 1
    with DecisionRepeater(recorder.entries, "the function") as repeater:
        again = repeater.decide(function(), X + NOISE)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_other_operations_are_refused():
    """More, fewer and other decisions, and outputs that cannot be repeated."""
    check_fails(lambda: X.argsort(), lambda: X > 0, "its decision 0 was not aten.gt")
    check_fails(lambda: X > 0, lambda: (X > 0, X < 0), "its decision 1 was not aten.lt")
    check_fails(lambda: (X > 0, X < 0), lambda: X > 0, "it took 1 decisions instead of 2")
    check_fails(lambda: X.frexp(), lambda: (X * 4).frexp(), "aten.frexp.* has another output")


def test_errors_inside_are_not_replaced():
    """An exception leaves the repetition early, as checkpointing's early stop does."""
    with DecisionRecorder() as recorder:
        X.argsort()
    with pytest.raises(KeyError), DecisionRepeater(recorder.entries, "the function"):
        raise KeyError("early")
