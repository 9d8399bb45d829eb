"""PEER experts against a reference: values, gradients, precision, sharding, initial weights."""

import contextlib
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from benchmarks import peer
from helpers.peer_tables import (
    MKL,
    D,
    assert_equals_reference,
    make_experts,
    make_inputs,
    reuse_memory_from,
)
from megatron.config.schema import ACTIVATIONS
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.peer.experts import _MAX_BLOCKS, choose_peer_backend, number_of_blocks


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 3])
def test_experts_equal_reference(activation, width):
    experts = make_experts(4, width, activation).double()
    names = ["w1", "w2", "w3"] if is_gated(activation) else ["w1", "w2"]
    assert [n for n, _ in experts.named_parameters()] == names
    assert_equals_reference(experts, make_inputs(6, 20, 4))


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
def test_random_lists_equal_reference(
    seed, tokens, assignments, num_local, width, activation, size, sparse, mkl
):
    experts = make_experts(num_local, width, activation, sparse_gradients=sparse).double()
    with reuse_memory_from(size), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.backends.mkl.is_available", lambda: mkl and MKL)
        assert_equals_reference(experts, make_inputs(tokens, assignments, num_local, seed))


@pytest.mark.parametrize("width", [1, 2])
def test_repeated_assignments_add_up(width):
    """Repeats are summed, and experts without assignments get zero gradients."""
    experts = make_experts(5, width, "silu").double()
    x, _, _, _ = make_inputs(3, 0, 5)
    token = torch.tensor([2, 0, 2, 2])
    expert = torch.tensor([1, 3, 1, 1])
    weight = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    assert_equals_reference(experts, (x, token, expert, weight))
    y = experts(x, token, expert, weight)
    summed = experts(
        x,
        torch.tensor([2, 0]),
        torch.tensor([1, 3]),
        torch.tensor([2.75, -1.0], dtype=torch.float64),
    )
    torch.testing.assert_close(y, summed)
    assert (y[1] == 0).all()
    y.sum().backward()
    for p in experts.parameters():
        assert (p.grad[[0, 2, 4]] == 0).all() and (p.grad[[1, 3]] != 0).all()


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_empty_list_gives_zeros(tokens, activation):
    experts = make_experts(4, 2, activation)
    x, token, expert, weight = make_inputs(tokens, 0, 4, dtype=torch.float32)
    y = experts(x, token, expert, weight)
    assert y.shape == (tokens, D) and (y == 0).all()
    y.sum().backward()
    for t in (x, weight, *experts.parameters()):
        assert t.grad is not None and t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("activation", ["gelu", "silu", "swiglu", "geglu"])
def test_gradients_pass_gradcheck(activation):
    experts = make_experts(3, 2, activation).double()
    x, token, expert, weight = make_inputs(3, 7, 3)

    def run(x, weight, *tables):
        return torch.func.functional_call(
            experts, dict(zip(names, tables)), (x, token, expert, weight)
        )

    names, tables = zip(*experts.named_parameters())
    assert torch.autograd.gradcheck(run, (x, weight, *tables))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_close(activation, dtype, tolerance):
    assert_equals_reference(
        make_experts(4, 3, activation).to(dtype),
        make_inputs(6, 20, 4, dtype=dtype),
        atol=tolerance,
        rtol=0.02,
    )


def test_bf16_dots_accumulate_in_fp32():
    """256 + 1 + ... + 1 stays 256 in bf16, which would be off by a third here."""
    experts = make_experts(1, 1, "relu", hidden_size=129).bfloat16()
    for table in experts.parameters():
        torch.nn.init.ones_(table)
    x = torch.ones(1, 129, dtype=torch.bfloat16)
    x[0, 0] = 256
    zero = torch.zeros(1, dtype=torch.int64)
    assert (experts(x, zero, zero, torch.ones(1)) == 384).all()


def test_bf16_products_are_not_rounded():
    """a * a - round(a * a) is 2^-14, and 0 once the product is rounded to bf16."""
    experts = make_experts(1, 1, "relu", hidden_size=2).bfloat16()
    a = 1 + 2**-7
    with torch.no_grad():
        experts.w_in.copy_(torch.tensor([a, -1 - 2**-6]))
        experts.w_out.fill_(1)
    zero = torch.zeros(1, dtype=torch.int64)
    y = experts(torch.tensor([[a, 1]], dtype=torch.bfloat16), zero, zero, torch.ones(1))
    assert (y == 2**-14).all()


def test_activation_of_bf16_is_fp32():
    """silu(1) * 1.3738 is 1.0043, which rounds to 1 + 2^-7. With silu(1) rounded to bf16 the
    product is 1.0035, which rounds to 1."""
    experts = make_experts(1, 1, "silu", hidden_size=1).bfloat16()
    for table in experts.parameters():
        torch.nn.init.ones_(table)
    zero = torch.zeros(1, dtype=torch.int64)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert experts(x, zero, zero, torch.tensor([1.3738])) == 1 + 2**-7


@pytest.mark.parametrize(
    "rows, tables", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_rows_and_tables_mix_dtypes(rows, tables):
    """The output has the rows' dtype; each gradient has that of its own tensor."""
    experts = make_experts(4, 2, "swiglu").to(tables)
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=rows)
    assert_equals_reference(experts, (x, token, expert, weight), atol=0.05, rtol=0.02)
    experts(x, token, expert, weight).sum().backward()
    assert x.grad.dtype == rows and weight.grad.dtype == torch.float32
    assert {p.grad.dtype for p in experts.parameters()} == {tables}


def test_recompute_and_no_grad_change_nothing():
    experts = make_experts(4, 2, "swiglu")
    x, token, expert, weight = make_inputs(5, 12, 4, dtype=torch.float32)
    plain = experts(x, token, expert, weight)
    with torch.no_grad():
        assert torch.equal(experts(x, token, expert, weight), plain)
    recomputed = checkpoint(experts, x, token, expert, weight, use_reentrant=False)
    inputs = (x, weight, *experts.parameters())
    for a, b in zip(
        torch.autograd.grad(recomputed.sum(), inputs), torch.autograd.grad(plain.sum(), inputs)
    ):
        assert torch.equal(a, b)


def test_second_derivative_is_refused():
    experts = make_experts().double()
    x, token, expert, weight = make_inputs(3, 4, 4)
    loss = experts(x, token, expert, weight).square().sum()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_strided_rows_equal_reference():
    experts = make_experts(4, 2, "gelu").double()
    x, token, expert, weight = make_inputs(D, 12, 4)
    transposed = x.detach().clone().t().contiguous().t().requires_grad_()
    assert not transposed.is_contiguous()
    assert_equals_reference(experts, (transposed, token, expert, weight))


@pytest.mark.parametrize("size", [2**30, 0])
def test_repeated_runs_are_bit_identical(size):
    experts = make_experts(50, 2, "swiglu", hidden_size=32)
    inputs = make_inputs(40, 3000, 50, dtype=torch.float32, hidden_size=32)
    differentiable = (inputs[0], inputs[3], *experts.parameters())
    runs = []
    for _ in range(2):
        with reuse_memory_from(size):
            y = experts(*inputs)
            runs.append([y, *torch.autograd.grad(y.square().sum(), differentiable)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [2**30, 0])
def test_single_busy_expert_equals_reference(size, sparse):
    x, token, expert, weight = make_inputs(4, 60, 9)
    experts = make_experts(9, 2, "silu", sparse_gradients=sparse).double()
    with reuse_memory_from(size):
        assert_equals_reference(experts, (x, token, expert * 0 + 7, weight))


@pytest.mark.parametrize(
    "name, value", [("token", -1), ("token", 3), ("expert", -1), ("expert", 4)]
)
def test_number_out_of_range_is_refused(name, value):
    x, token, expert, weight = make_inputs(3, 5, 4, dtype=torch.float32)
    {"token": token, "expert": expert}[name][2] = value
    with pytest.raises(AssertionError, match="token or row numbers span"):
        make_experts(4)(x, token, expert, weight)


@pytest.mark.parametrize(
    "num_experts, ranks", [(4, 4), (191, 191), (12, 3), (192 * 20, 64), (2**10, 16), (3**6, 3)]
)
def test_weights_do_not_depend_on_sharding(num_experts, ranks):
    options = {
        "seed": 3,
        "layer": 2,
        "hidden_size": 4,
        "width": 2,
        "activation": "swiglu",
        "num_experts": num_experts,
    }
    full = make_experts(num_experts, **options)
    local = num_experts // ranks
    for rank in {0, 1, ranks - 1}:
        part = make_experts(local, first_expert=rank * local, **options)
        assert part.num_blocks == full.num_blocks == number_of_blocks(num_experts)
        assert [n for n, _ in part.named_parameters()] == ["w1", "w2", "w3"]
        for (name, stack), all_stacks in zip(part.named_parameters(), full.parameters()):
            mine = all_stacks.chunk(ranks)[rank]
            assert len(stack) * ranks == full.num_blocks and torch.equal(stack, mine), name
        for name in ("w_in", "w_out", "w_up"):
            table = getattr(part, name)
            assert table.shape == (local, 2, 4)
            mine = getattr(full, name)[rank * local : (rank + 1) * local]
            assert torch.equal(table, mine), name


@pytest.mark.parametrize(
    "num_experts, blocks",
    [(1, 1), (7, 7), (192, 192), (193, 1), (1024**2, 64), (10**6, 64), (3 * 2**20, 192)],
)
def test_number_of_blocks_divides_experts(num_experts, blocks):
    assert number_of_blocks(num_experts) == blocks <= _MAX_BLOCKS and num_experts % blocks == 0


def test_uneven_blocks_are_refused():
    with pytest.raises(
        ValueError,
        match="--moe-expert-parallel-size is 5; allowed: a divisor of 64, the number of "
        "blocks that 1000000 experts are stored in",
    ):
        make_experts(200_000, num_experts=10**6)


def test_all_rows_start_different():
    """Compare rows of neighbouring seeds, layers, tables and blocks."""
    tables = [
        p[:, 0]
        for seed in (0, 1)
        for layer in (0, 1)
        for p in make_experts(
            4, 1, "swiglu", seed=seed, layer=layer, output_std=0.7
        ).parameters()
    ]
    assert (torch.pdist(torch.cat(tables)) > 1e-3).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_experts_equal_published_formula(sparse):
    """Compare with the benchmark's reference, which copies the rows of all assignments."""
    experts = make_experts(30, 1, "gelu", sparse_gradients=sparse)
    x, _, expert, weight = make_inputs(6, 24, 30, dtype=torch.float32)
    token = torch.arange(6).repeat_interleave(4)
    tables = [t.detach().squeeze(1).requires_grad_() for t in (experts.w_in, experts.w_out)]
    ours = experts(x, token, expert, weight)
    theirs = peer.reference(x, expert, weight, *tables, sparse)
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad(ours.square().sum(), (x, weight, experts.w1, experts.w2))
    want = torch.autograd.grad(theirs.square().sum(), (x, weight, *tables))
    for name, a, b in zip(("x", "weight", "w1", "w2"), got, want, strict=True):
        assert a.is_sparse == b.is_sparse, name
        torch.testing.assert_close(
            a.to_dense().view(b.shape), b.to_dense(), msg=lambda m, name=name: f"{name}: {m}"
        )


def test_initial_weights_ignore_global_seed():
    """Standard deviations are as configured, and the global random state has no influence."""
    torch.manual_seed(0)
    experts = make_experts(5000, 2, "geglu", hidden_size=16, init_std=0.5, output_std=0.1)
    torch.manual_seed(1)
    other = make_experts(5000, 2, "geglu", hidden_size=16, init_std=0.5, output_std=0.1)
    for name, std in (("w_in", 0.5), ("w_up", 0.5), ("w_out", 0.1)):
        table = getattr(experts, name)
        assert torch.equal(table, getattr(other, name))
        assert table.shape == (5000, 2, 16)
        assert table.std().item() == pytest.approx(std, rel=0.01)
        assert abs(table.mean().item()) < std / 100
    assert experts.initialises_itself and experts.num_local == 5000 and experts.width == 2


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        assert make_experts(2**30, 1, "swiglu", hidden_size=2**12).w_up.is_meta


def test_backend_choice_gives_reason(monkeypatch):
    for name in ("cpu", "grouped_mm"):
        message = f"--moe-backend is '{name}'; allowed: auto reference triton for PEER's tables"
        with pytest.raises(ValueError, match=message):
            make_experts(backend=name)
        with pytest.raises(ValueError, match=message):
            choose_peer_backend(name, "cpu", torch.float32)
    for name in ("auto", "reference"):
        assert choose_peer_backend(name, "cpu", torch.float32) == (
            "reference",
            "torch's own operations on tables",
        )
        assert make_experts(backend=name)._uses_triton() is False
    choose_expert_backend.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: name)
        assert choose_peer_backend("auto", "cuda", torch.bfloat16) == (
            "triton",
            "a CUDA device, and triton is installed",
        )
        assert choose_peer_backend("auto", "cuda", torch.float64)[0] == "reference"
        choose_expert_backend.cache_clear()
        m.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="--moe-backend is 'triton'.*pip install triton"):
            choose_peer_backend("triton", "cuda", torch.bfloat16)
        assert choose_peer_backend("auto", "cuda", torch.bfloat16)[0] == "reference"
    choose_expert_backend.cache_clear()


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        make_experts(activation="tanh")


@pytest.mark.parametrize("context", [contextlib.nullcontext(), torch.inference_mode()])
def test_evaluation_mode_computes_same_formula(context):
    experts = make_experts().eval()
    with context:
        x = torch.ones(1, D)
        zero = torch.zeros(1, dtype=torch.int64)
        expected = torch.nn.functional.gelu(experts.w_in[0, 0].sum()) * experts.w_out[0]
        torch.testing.assert_close(experts(x, zero, zero, torch.ones(1)), expected)
