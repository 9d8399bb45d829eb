"""Lookups in PEER's tables: what is computed and allocated, and sparse gradients."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.peer_tables import MKL, make_experts, make_inputs, reuse_memory_from
from megatron.moe.peer import lookup


def test_gradient_alone_equals_gradient_among_all():
    """Each input that alone requires a gradient gets the same one as among all inputs."""
    experts = make_experts(4, 2, "geglu").double()
    x, token, expert, weight = make_inputs(5, 12, 4)
    names, tables = zip(("x", x), ("weight", weight), *experts.named_parameters())
    together = torch.autograd.grad(experts(x, token, expert, weight).square().sum(), tables)
    for i, name in enumerate(names):
        for t in tables:
            t.requires_grad_(t is tables[i])
        (alone,) = torch.autograd.grad(
            experts(x, token, expert, weight).square().sum(), tables[i]
        )
        assert torch.equal(alone, together[i]), name


@pytest.mark.parametrize(
    "required, expected",
    [
        (("x", "weight"), {"token_sums": 3, "row_sums": 0, "pair_dots": 3}),
        (("w1",), {"token_sums": 1, "row_sums": 1, "pair_dots": 3}),
        (("w2",), {"token_sums": 1, "row_sums": 1, "pair_dots": 2}),
    ],
)
def test_unused_gradients_are_not_computed(required, expected):
    """Two passes of dots and one of sums are the forward pass."""
    experts = make_experts(4, 1, "swiglu")
    calls = dict.fromkeys(expected, 0)
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=torch.float32)
    for name, t in {"x": x, "weight": weight, **dict(experts.named_parameters())}.items():
        t.requires_grad_(name in required)

    def counted(name, original):
        def call(*args):
            calls[name] += 1
            return original(*args)

        return call

    with mock.patch.multiple(
        lookup.PairOps,
        **{name: counted(name, getattr(lookup.PairOps, name)) for name in expected},
    ):
        experts(x, token, expert, weight).sum().backward()
    assert calls == expected


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest dense tensor that operations create."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, activation", [(1, "gelu"), (3, "swiglu")])
def test_table_rows_are_never_copied(dtype, width, activation, sparse):
    """The rows of 2,000 assignments of width 64 are 256 KB or more per table. What is created
    is lists of two or three numbers per pair."""
    tokens, assignments, num_local, hidden = 10, 2000, 20, 64
    experts = make_experts(
        num_local, width, activation, hidden_size=hidden, sparse_gradients=sparse
    ).to(dtype)
    x, token, expert, weight = make_inputs(
        tokens, assignments, num_local, dtype=dtype, hidden_size=hidden
    )
    with LargestTensor() as largest:
        torch.einsum("ad,awd->aw", x[token], experts.w_in[expert])
    assert largest.bytes >= assignments * width * hidden * dtype.itemsize, (
        "the probe must see a copy of the rows of all assignments"
    )
    with LargestTensor() as largest:
        y = experts(x, token, expert, weight)
        torch.autograd.grad(y.float().square().sum(), (x, weight, *experts.parameters()))
    assert 8 * assignments * width <= largest.bytes <= 3 * 8 * assignments * width


@pytest.mark.skipif(
    not MKL, reason="this torch has no product that writes sums of rows to given memory"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gradient_uses_reused_memory(dtype):
    """Reused memory may hold anything, here NaN."""
    num_local, hidden = 2000, 64
    requested = []
    experts = make_experts(num_local, 1, "gelu", hidden_size=hidden).to(dtype)
    inputs = make_inputs(10, 50, num_local, dtype=dtype, hidden_size=hidden)
    results = []

    def used_memory(shape, dtype, device):
        requested.append(tuple(shape))
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    for size in (2**30, 100_000):
        with (
            reuse_memory_from(size),
            mock.patch.object(lookup, "empty_cached", used_memory),
            LargestTensor() as largest,
        ):
            loss = experts(*inputs).square().sum()
            results.append(torch.autograd.grad(loss, tuple(experts.parameters())))
        assert largest.bytes == num_local * hidden * dtype.itemsize, (
            "nothing may be larger than the gradient"
        )
    assert requested == [(num_local, hidden)] * 2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width, activation", [(1, "gelu"), (2, "geglu")])
def test_sparse_gradients_equal_dense_ones(width, activation):
    """They hold each used row once, in order, and no unused rows."""
    experts = make_experts(384, width, activation)  # 192 blocks of 2 experts
    x, token, _, weight = make_inputs(6, 40, 384, dtype=torch.float32)
    # Seeded: for a few draws gelu underflows, and a used row has a gradient of exactly 0.
    g = torch.Generator().manual_seed(0)
    expert = torch.randint(0, 100, (40,), generator=g) * 3
    dense = torch.autograd.grad(
        experts(x, token, expert, weight).square().sum(), tuple(experts.parameters())
    )
    experts.sparse_gradients = True
    sparse = torch.autograd.grad(
        experts(x, token, expert, weight).square().sum(), tuple(experts.parameters())
    )
    used = (expert.unique()[:, None] * width + torch.arange(width)).flatten()
    for (name, p), a, b in zip(experts.named_parameters(), sparse, dense, strict=True):
        assert a.is_coalesced() and a.shape == p.shape and a.dtype == p.dtype, name
        assert a.sparse_dim() == 2 and a.dense_dim() == 1, name
        block, row = a.indices()
        assert torch.equal(block * p.shape[1] + row, used), name
        assert torch.equal(a.to_dense(), b) and (a.values() != 0).any(1).all(), name


def test_sparse_gradients_train_with_sparse_adam():
    """Accumulate two micro-batches, then step: the first step of Adam leaves rows without a
    gradient unchanged, as SparseAdam does."""
    results = []
    for sparse, optimizer in ((False, torch.optim.Adam), (True, torch.optim.SparseAdam)):
        experts = make_experts(20, 2, "swiglu", sparse_gradients=sparse).double()
        before = [p.detach().clone() for p in experts.parameters()]
        for seed in (0, 1):
            experts(*make_inputs(6, 12, 20, seed)).square().sum().backward()
        grads = [p.grad.to_dense().clone() for p in experts.parameters()]
        optimizer(list(experts.parameters()), lr=0.1, eps=1e-30).step()
        results.append(
            [*grads, *(a.detach() - b for a, b in zip(experts.parameters(), before))]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert (a == 0).any() and (a != 0).any()


def test_table_gradients_are_made_separately():
    """An optimizer that consumes each gradient immediately needs memory for one table only."""
    experts = make_experts(6, 1, "swiglu", sparse_gradients=True)
    events = []
    make_gradient = lookup.PairOps.row_sums

    def row_sums(ops, rows, scale, pairs, shape):
        events.append("made")
        return make_gradient(ops, rows, scale, pairs, shape)

    for p in experts.parameters():
        p.register_post_accumulate_grad_hook(lambda p: events.append("consumed"))
    with mock.patch.object(lookup.PairOps, "row_sums", row_sums):
        experts(*make_inputs(4, 9, 6, dtype=torch.float32)).sum().backward()
    assert events == ["made", "consumed"] * 3


def test_table_offsets_exceed_32_bits():
    """Element offsets beyond 2^31, in a table of 4 GB of which only two pages are touched."""
    rows, hidden = 2**20 + 1, 2**11
    table = torch.empty(rows, hidden, dtype=torch.bfloat16)
    table[-1] = 0.5
    table[0] = -0.25
    x = torch.ones(1, hidden, dtype=torch.bfloat16)
    row = torch.tensor([rows - 1, 0])
    token = torch.tensor([0, 0])
    assert lookup.embedding_dots(x, table, token, row).tolist() == [1024, -512]
    y = lookup.segment_sum_in_reused_memory(
        table, row, torch.tensor([0, 2]), torch.tensor([2.0, 4.0])
    )
    assert y.shape == (1, hidden) and (y == 0).all()
