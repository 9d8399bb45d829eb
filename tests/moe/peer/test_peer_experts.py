"""Tiny experts in tables against one dumb loop per assignment; sparse gradients; memory; initial values."""

import contextlib
import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import peer
from megatron.config.schema import ACTIVATIONS
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.backends import choose_expert_backend as choose
from megatron.moe.peer import experts as peer_experts
from megatron.moe.peer.experts import (
    MOST_BLOCKS,
    PEERExperts,
    choose_peer_backend,
    number_of_blocks,
)

D = 5
MKL = torch.backends.mkl.is_available()


def make(num_local=4, width=1, activation="gelu", hidden_size=D, num_experts=None, **options):
    return PEERExperts(
        num_experts or num_local,
        num_local,
        hidden_size,
        width,
        activation,
        **{"init_std": 0.7, "output_std": 0.5, **options},
    )


def in_place(size):
    """Sums of so many bytes and more are made in place, as only large ones else."""
    return mock.patch.object(peer_experts, "IN_PLACE_BYTES", size)


def make_inputs(tokens, assignments, experts, seed=0, dtype=torch.float64, hidden_size=D):
    """Random lists in random order: repeats, idle experts and tokens without experts come by themselves."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_size, generator=g, dtype=dtype).requires_grad_()
    assignments = assignments if tokens else 0
    token = torch.randint(0, max(1, tokens), (assignments,), generator=g)
    expert = torch.randint(0, experts, (assignments,), generator=g)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(assignments, generator=g, dtype=weight_dtype).requires_grad_()
    return x, token, expert, weight


def dumb_activation(name, g, u):
    sigmoid = 1 / (1 + torch.exp(-g))
    gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
    return {
        "relu": g * (g > 0),
        "gelu": gelu,
        "silu": g * sigmoid,
        "swiglu": g * sigmoid * u,
        "geglu": gelu * u,
    }[name]


def dumb(experts, x, token, expert, weight):
    """One assignment and one hidden unit at a time."""
    y = [0 * row for row in x]
    for t, e, w in zip(token.tolist(), expert.tolist(), weight):
        for j in range(experts.width):
            up = experts.w_up[e, j] @ x[t] if is_gated(experts.activation) else 1.0
            hidden = dumb_activation(experts.activation, experts.w_in[e, j] @ x[t], up)
            y[t] = y[t] + w * hidden * experts.w_out[e, j]
    return torch.stack(y) if y else x * 0


def compare(experts, inputs, **tolerance):
    """Values, and gradients by name, against the loop on the same tables in float64."""
    x, token, expert, weight = inputs
    exact = make(experts.num_local, experts.width, experts.activation).double()
    exact.load_state_dict(experts.state_dict())
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    ours, expected = (
        experts(x, token, expert, weight),
        dumb(exact, x64, token, expert, weight64),
    )
    assert ours.dtype == x.dtype and ours.shape == x.shape
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, tables = zip(*experts.named_parameters())
    got = torch.autograd.grad(ours, (x, weight, *tables), grad.to(x.dtype))
    want = torch.autograd.grad(
        expected, (x64, weight64, *exact.parameters()), grad, allow_unused=True
    )
    for name, a, b in zip(("x", "weight", *names), got, want, strict=True):
        assert a.layout is (
            torch.sparse_coo if experts.sparse_gradients and name in names else torch.strided
        ), name
        a = a.to_dense().double()
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(
            a, b.double(), **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 3])
def test_against_a_loop(activation, width):
    experts = make(4, width, activation).double()
    assert [n for n, _ in experts.named_parameters()] == ["w1", "w2", "w3"][
        : 3 if is_gated(activation) else 2
    ]
    compare(experts, make_inputs(6, 20, 4))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 6),
    st.integers(0, 25),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0, 300, 2**30]),
    st.booleans(),
    st.booleans(),
)
def test_random_lists(
    seed, tokens, assignments, num_local, width, activation, size, sparse, mkl
):
    experts = make(num_local, width, activation, sparse_gradients=sparse).double()
    with in_place(size), mock.patch("torch.backends.mkl.is_available", lambda: mkl and MKL):
        compare(experts, make_inputs(tokens, assignments, num_local, seed))


@pytest.mark.parametrize("width", [1, 2])
def test_repeats_add_up_and_idle_experts_get_zero_gradients(width):
    experts = make(5, width, "silu").double()
    x, _, _, _ = make_inputs(3, 0, 5)
    token, expert = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 3, 1, 1])
    weight = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    compare(experts, (x, token, expert, weight))
    y = experts(x, token, expert, weight)
    once = experts(
        x,
        torch.tensor([2, 0]),
        torch.tensor([1, 3]),
        torch.tensor([2.75, -1.0], dtype=torch.float64),
    )
    torch.testing.assert_close(y, once)
    assert (y[1] == 0).all()
    y.sum().backward()
    for p in experts.parameters():
        assert (p.grad[[0, 2, 4]] == 0).all() and (p.grad[[1, 3]] != 0).all()


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_an_empty_list(tokens, activation):
    experts = make(4, 2, activation)
    x, token, expert, weight = make_inputs(tokens, 0, 4, dtype=torch.float32)
    y = experts(x, token, expert, weight)
    assert y.shape == (tokens, D) and (y == 0).all()
    y.sum().backward()
    for t in (x, weight, *experts.parameters()):
        assert t.grad is not None and t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "silu", "swiglu", "geglu"])
def test_gradcheck(activation):
    experts = make(3, 2, activation).double()
    x, token, expert, weight = make_inputs(3, 7, 3)

    def run(x, weight, *tables):
        return torch.func.functional_call(
            experts, dict(zip(names, tables)), (x, token, expert, weight)
        )

    names, tables = zip(*experts.named_parameters())
    assert torch.autograd.gradcheck(run, (x, weight, *tables))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision(activation, dtype, tolerance):
    compare(
        make(4, 3, activation).to(dtype),
        make_inputs(6, 20, 4, dtype=dtype),
        atol=tolerance,
        rtol=0.02,
    )


def test_bf16_dot_products_are_added_up_in_fp32():
    """256 + 1 + ... + 1 stays 256 in bf16; the hidden units of a wide row would be off by a third."""
    experts = make(1, 1, "relu", hidden_size=129).bfloat16()
    for table in experts.parameters():
        torch.nn.init.ones_(table)
    x = torch.ones(1, 129, dtype=torch.bfloat16)
    x[0, 0] = 256
    zero = torch.zeros(1, dtype=torch.int64)
    assert (experts(x, zero, zero, torch.ones(1)) == 384).all()


def test_products_of_bf16_numbers_are_not_rounded():
    """a * a - round(a * a) is 2^-14, and 0 once the product is rounded to bf16."""
    experts, a = make(1, 1, "relu", hidden_size=2).bfloat16(), 1 + 2**-7
    with torch.no_grad():
        experts.w_in.copy_(torch.tensor([a, -1 - 2**-6]))
        experts.w_out.fill_(1)
    zero = torch.zeros(1, dtype=torch.int64)
    y = experts(torch.tensor([[a, 1]], dtype=torch.bfloat16), zero, zero, torch.ones(1))
    assert (y == 2**-14).all()


def test_between_bf16_sums_everything_is_fp32():
    """silu(1) * 1.3738 is 1.0043, which rounds to 1 + 2^-7; of a silu(1) in bf16 it is 1.0035, which rounds to 1."""
    experts = make(1, 1, "silu", hidden_size=1).bfloat16()
    for table in experts.parameters():
        torch.nn.init.ones_(table)
    zero = torch.zeros(1, dtype=torch.int64)
    assert (
        experts(torch.ones(1, 1, dtype=torch.bfloat16), zero, zero, torch.tensor([1.3738]))
        == 1 + 2**-7
    )


@pytest.mark.parametrize(
    "rows, tables", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_rows_and_tables_of_different_precision(rows, tables):
    """The answer has the rows' dtype; each gradient has that of its own tensor."""
    experts = make(4, 2, "swiglu").to(tables)
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=rows)
    compare(experts, (x, token, expert, weight), atol=0.05, rtol=0.02)
    experts(x, token, expert, weight).sum().backward()
    assert x.grad.dtype == rows and weight.grad.dtype == torch.float32
    assert {p.grad.dtype for p in experts.parameters()} == {tables}


def test_gradients_that_nobody_asks_for():
    """Each input alone gets the gradient that it gets among all."""
    experts = make(4, 2, "geglu").double()
    x, token, expert, weight = make_inputs(5, 12, 4)
    names, tables = zip(("x", x), ("weight", weight), *experts.named_parameters())
    whole = torch.autograd.grad(experts(x, token, expert, weight).square().sum(), tables)
    for i, name in enumerate(names):
        for t in tables:
            t.requires_grad_(t is tables[i])
        (alone,) = torch.autograd.grad(
            experts(x, token, expert, weight).square().sum(), tables[i]
        )
        assert torch.equal(alone, whole[i]), name


@pytest.mark.parametrize(
    "wanted, made",
    [
        (("x", "weight"), {"token_sums": 3, "row_sums": 0, "pair_dots": 3}),
        (("w1",), {"token_sums": 1, "row_sums": 1, "pair_dots": 3}),
        (("w2",), {"token_sums": 1, "row_sums": 1, "pair_dots": 2}),
    ],
)
def test_what_nobody_asks_for_is_not_computed(wanted, made):
    """Two passes of dots and one of sums are the forward pass."""
    experts, calls = make(4, 1, "swiglu"), dict.fromkeys(made, 0)
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=torch.float32)
    for name, t in {"x": x, "weight": weight, **dict(experts.named_parameters())}.items():
        t.requires_grad_(name in wanted)

    def counted(name, original):
        def call(*args):
            calls[name] += 1
            return original(*args)

        return call

    with mock.patch.multiple(
        peer_experts._How,
        **{name: counted(name, getattr(peer_experts._How, name)) for name in made},
    ):
        experts(x, token, expert, weight).sum().backward()
    assert calls == made


def test_without_gradients_and_with_recompute():
    experts = make(4, 2, "swiglu")
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=torch.float32)
    plain = experts(x, token, expert, weight)
    with torch.no_grad():
        assert torch.equal(experts(x, token, expert, weight), plain)
    again = checkpoint(experts, x, token, expert, weight, use_reentrant=False)
    wanted = (x, weight, *experts.parameters())
    for a, b in zip(
        torch.autograd.grad(again.sum(), wanted), torch.autograd.grad(plain.sum(), wanted)
    ):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused():
    experts = make().double()
    x, token, expert, weight = make_inputs(3, 4, 4)
    (grad,) = torch.autograd.grad(
        experts(x, token, expert, weight).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_that_do_not_lie_side_by_side():
    experts = make(4, 2, "gelu").double()
    x, token, expert, weight = make_inputs(D, 12, 4)
    turned = x.detach().clone().t().contiguous().t().requires_grad_()
    assert not turned.is_contiguous()
    compare(experts, (turned, token, expert, weight))


@pytest.mark.parametrize("size", [2**30, 0])
def test_repeatable_bit_for_bit(size):
    experts = make(50, 2, "swiglu", hidden_size=32)
    inputs = make_inputs(40, 3000, 50, dtype=torch.float32, hidden_size=32)
    wanted = (inputs[0], inputs[3], *experts.parameters())
    runs = []
    for _ in range(2):
        with in_place(size):
            y = experts(*inputs)
            runs.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


class Largest(TorchDispatchMode):
    """Bytes of the largest dense tensor that operations make, but for `allowed` numbers of elements."""

    def __init__(self, allowed=()):
        super().__init__()
        self.allowed, self.bytes = allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(t, torch.Tensor)
                and t.layout is torch.strided
                and t.numel() not in self.allowed
            ):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, activation", [(1, "gelu"), (3, "swiglu")])
def test_rows_are_never_laid_side_by_side(dtype, width, activation, sparse):
    """The rows of 2,000 assignments of width 64 are 256 KB or more a table; what appears is lists of two or three
    numbers for each pair."""
    tokens, assignments, num_local, hidden = 10, 2000, 20, 64
    experts = make(
        num_local, width, activation, hidden_size=hidden, sparse_gradients=sparse
    ).to(dtype)
    x, token, expert, weight = make_inputs(
        tokens, assignments, num_local, dtype=dtype, hidden_size=hidden
    )
    with Largest() as seen:
        torch.einsum("ad,awd->aw", x[token], experts.w_in[expert])
    assert seen.bytes >= assignments * width * hidden * dtype.itemsize, (
        "the probe sees the rows of all assignments"
    )
    with Largest() as seen:
        y = experts(x, token, expert, weight)
        torch.autograd.grad(y.float().square().sum(), (x, weight, *experts.parameters()))
    assert 8 * assignments * width <= seen.bytes <= 3 * 8 * assignments * width


@pytest.mark.skipif(
    not MKL, reason="this torch has no product that writes sums of rows to a given place"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_gradient_is_made_in_memory_that_is_used_again(dtype):
    """Which holds anything at all, here NaN."""
    num_local, hidden, asked = 2000, 64, []
    experts = make(num_local, 1, "gelu", hidden_size=hidden).to(dtype)
    inputs, results = make_inputs(10, 50, num_local, dtype=dtype, hidden_size=hidden), []

    def used_memory(shape, dtype, device):
        asked.append(tuple(shape))
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    for size in (2**30, 100_000):
        with (
            in_place(size),
            mock.patch.object(peer_experts.buffers, "empty", used_memory),
            Largest() as seen,
        ):
            results.append(
                torch.autograd.grad(
                    experts(*inputs).square().sum(), tuple(experts.parameters())
                )
            )
        assert seen.bytes == num_local * hidden * dtype.itemsize, (
            "nothing is larger than the gradient"
        )
    assert asked == [(num_local, hidden)] * 2
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width, activation", [(1, "gelu"), (2, "geglu")])
def test_sparse_gradients(width, activation):
    """The dense ones value by value, each used row once and in order, the unused ones not at all."""
    experts = make(384, width, activation)  # 192 blocks of 2 experts
    x, token, _, weight = make_inputs(6, 40, 384, dtype=torch.float32)
    expert = torch.randint(0, 100, (40,)) * 3
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


def test_sparse_gradients_add_up_and_an_optimizer_takes_them():
    """Two micro-batches, then a step: Adam's first step leaves rows without gradient alone, as SparseAdam's does."""
    results = []
    for sparse, optimizer in ((False, torch.optim.Adam), (True, torch.optim.SparseAdam)):
        experts = make(20, 2, "swiglu", sparse_gradients=sparse).double()
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


def test_a_gradient_that_is_taken_is_gone_before_the_next_is_made():
    """So only one table's gradient is in memory when an optimizer takes each as it comes."""
    experts, events = make(6, 1, "swiglu", sparse_gradients=True), []
    make_gradient = peer_experts._How.row_sums

    def note(how, rows, scale, pairs, shape):
        events.append("made")
        return make_gradient(how, rows, scale, pairs, shape)

    for p in experts.parameters():
        p.register_post_accumulate_grad_hook(lambda p: events.append("taken"))
    with mock.patch.object(peer_experts._How, "row_sums", note):
        experts(*make_inputs(4, 9, 6, dtype=torch.float32)).sum().backward()
    assert events == ["made", "taken"] * 3


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [2**30, 0])
def test_one_expert_with_everything(size, sparse):
    x, token, expert, weight = make_inputs(4, 60, 9)
    with in_place(size):
        compare(
            make(9, 2, "silu", sparse_gradients=sparse).double(),
            (x, token, expert * 0 + 7, weight),
        )


def test_rows_beyond_two_to_the_31_numbers():
    """Of a table of 4 GB of which two pages are ever touched."""
    rows, hidden = 2**20 + 1, 2**11
    table = torch.empty(rows, hidden, dtype=torch.bfloat16)
    table[-1], table[0] = 0.5, -0.25
    x = torch.ones(1, hidden, dtype=torch.bfloat16)
    row, token = torch.tensor([rows - 1, 0]), torch.tensor([0, 0])
    assert peer_experts._dots(x, table, token, row).tolist() == [1024, -512]
    y = peer_experts._bag_sum(table, row, torch.tensor([0, 2]), torch.tensor([2.0, 4.0]))
    assert y.shape == (1, hidden) and (y == 0).all()


@pytest.mark.parametrize(
    "name, value", [("token", -1), ("token", 3), ("expert", -1), ("expert", 4)]
)
def test_numbers_out_of_range_are_not_looked_up(name, value):
    x, token, expert, weight = make_inputs(3, 5, 4, dtype=torch.float32)
    {"token": token, "expert": expert}[name][2] = value
    with pytest.raises(AssertionError, match="token or row numbers span"):
        make(4)(x, token, expert, weight)


@pytest.mark.parametrize(
    "num_experts, ranks", [(4, 4), (191, 191), (12, 3), (192 * 20, 64), (2**10, 16), (3**6, 3)]
)
def test_values_do_not_depend_on_sharding(num_experts, ranks):
    options = {
        "seed": 3,
        "layer": 2,
        "hidden_size": 4,
        "width": 2,
        "activation": "swiglu",
        "num_experts": num_experts,
    }
    whole, local = make(num_experts, **options), num_experts // ranks
    for rank in {0, 1, ranks - 1}:
        part = make(local, first=rank * local, **options)
        assert part.num_blocks == whole.num_blocks == number_of_blocks(num_experts)
        assert [n for n, _ in part.named_parameters()] == ["w1", "w2", "w3"]
        for (name, stack), all_stacks in zip(part.named_parameters(), whole.parameters()):
            mine = all_stacks.chunk(ranks)[rank]
            assert len(stack) * ranks == whole.num_blocks and torch.equal(stack, mine), name
        for name in ("w_in", "w_out", "w_up"):
            table = getattr(part, name)
            assert table.shape == (local, 2, 4)
            assert torch.equal(
                table, getattr(whole, name)[rank * local : (rank + 1) * local]
            ), name


@pytest.mark.parametrize(
    "num_experts, blocks",
    [(1, 1), (7, 7), (192, 192), (193, 1), (1024**2, 64), (10**6, 64), (3 * 2**20, 192)],
)
def test_number_of_blocks(num_experts, blocks):
    assert number_of_blocks(num_experts) == blocks <= MOST_BLOCKS and num_experts % blocks == 0


def test_blocks_that_cannot_be_shared_out():
    with pytest.raises(
        ValueError,
        match="--moe-expert-parallel-size is 5; allowed: a divisor of 64, the blocks that "
        "1000000 experts are kept in",
    ):
        make(200_000, num_experts=10**6)


def test_no_two_rows_start_equal():
    """Of neighbouring seeds, layers, tables and blocks."""
    tables = [
        p[:, 0]
        for seed in (0, 1)
        for layer in (0, 1)
        for p in make(4, 1, "swiglu", seed=seed, layer=layer, output_std=0.7).parameters()
    ]
    assert (torch.pdist(torch.cat(tables)) > 1e-3).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_against_the_published_formula(sparse):
    """The benchmark's reference, embeddings of all chosen rows and einsum, for as many choices of every token."""
    experts = make(30, 1, "gelu", sparse_gradients=sparse)
    x, _, expert, weight = make_inputs(6, 24, 30, dtype=torch.float32)
    token = torch.arange(6).repeat_interleave(4)
    tables = [t.detach().squeeze(1).requires_grad_() for t in (experts.w_in, experts.w_out)]
    ours, theirs = (
        experts(x, token, expert, weight),
        peer.reference(x, expert, weight, *tables, sparse),
    )
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad(ours.square().sum(), (x, weight, experts.w1, experts.w2))
    want = torch.autograd.grad(theirs.square().sum(), (x, weight, *tables))
    for name, a, b in zip(("x", "weight", "w1", "w2"), got, want, strict=True):
        assert a.is_sparse == b.is_sparse, name
        torch.testing.assert_close(
            a.to_dense().view(b.shape), b.to_dense(), msg=lambda m, name=name: f"{name}: {m}"
        )


def test_initial_scales_and_independence_of_global_random_state():
    torch.manual_seed(0)
    experts = make(5000, 2, "geglu", hidden_size=16, init_std=0.5, output_std=0.1)
    torch.manual_seed(1)
    again = make(5000, 2, "geglu", hidden_size=16, init_std=0.5, output_std=0.1)
    for name, std in (("w_in", 0.5), ("w_up", 0.5), ("w_out", 0.1)):
        table = getattr(experts, name)
        assert torch.equal(table, getattr(again, name))
        assert table.shape == (5000, 2, 16)
        assert (
            table.std().item() == pytest.approx(std, rel=0.01)
            and abs(table.mean().item()) < std / 100
        )
    assert experts.initialises_itself and experts.num_local == 5000 and experts.width == 2


def test_meta_device_allocates_and_draws_nothing():
    with torch.device("meta"):
        assert make(2**30, 1, "swiglu", hidden_size=2**12).w_up.is_meta


def test_which_backend_and_why(monkeypatch):
    for name in ("cpu", "grouped_mm"):
        with pytest.raises(
            ValueError,
            match=f"--moe-backend is '{name}'; allowed: auto reference triton for tables",
        ):
            make(backend=name)
        with pytest.raises(
            ValueError,
            match=f"--moe-backend is '{name}'; allowed: auto reference triton for tables",
        ):
            choose_peer_backend(name, "cpu", torch.float32)
    for name in ("auto", "reference"):
        assert choose_peer_backend(name, "cpu", torch.float32) == (
            "reference",
            "torch's own operations on tables",
        )
        assert make(backend=name)._on_triton() is False
    choose.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: name)
        assert choose_peer_backend("auto", "cuda", torch.bfloat16) == (
            "triton",
            "a CUDA device, and triton is installed",
        )
        assert choose_peer_backend("auto", "cuda", torch.float64)[0] == "reference"
        choose.cache_clear()
        m.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="--moe-backend is 'triton'.*pip install triton"):
            choose_peer_backend("triton", "cuda", torch.bfloat16)
        assert choose_peer_backend("auto", "cuda", torch.bfloat16)[0] == "reference"
    choose.cache_clear()


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        make(activation="tanh")


@pytest.mark.parametrize("context", [contextlib.nullcontext(), torch.inference_mode()])
def test_evaluation(context):
    experts = make().eval()
    with context:
        x, zero = torch.ones(1, D), torch.zeros(1, dtype=torch.int64)
        expected = torch.nn.functional.gelu(experts.w_in[0, 0].sum()) * experts.w_out[0]
        torch.testing.assert_close(experts(x, zero, zero, torch.ones(1)), expected)
