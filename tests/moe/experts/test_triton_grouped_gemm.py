"""The Triton kernels against float64 loops: compiled where there is a GPU, elsewhere in Triton's interpreter.

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows sorted by expert.
"""

import ast
import mmap
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
if not CUDA:  # before Triton is imported: its library of functions is made for one or the other
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")

from megatron.moe.dispatch.plan import PermutedTokens, build_dispatch_plan  # noqa: E402
from megatron.moe.experts import triton_grouped_gemm, triton_mlp  # noqa: E402
from megatron.moe.routing import Routing  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "w1", "w3", "w2")
few = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def checked_memory():
    """Have the interpreter check that loads and stores stay within the memory of the kernel's arguments, and not copy
    these to the device where they are anyway: some are of 4 GB."""
    if CUDA:
        yield
        return
    from triton.runtime import interpreter

    spans, start = [], interpreter.GridExecutor._init_args_hst
    load, store = interpreter._interpreter.load, interpreter._interpreter.store

    def record(self, args, kwargs):
        memory = [
            t.untyped_storage()
            for t in (*args, *kwargs.values())
            if isinstance(t, torch.Tensor)
        ]
        spans[:] = [(m.data_ptr(), m.data_ptr() + m.nbytes()) for m in memory]
        return start(self, args, kwargs)

    def check(places, size):
        inside = [(places >= first) & (places + size <= last) for first, last in spans]
        assert sum(inside).all(), "outside of the arguments' memory"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", record)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        patch.setattr(
            interpreter._interpreter,
            "load",
            lambda places, mask, other, dtype: (
                check(places[mask], dtype.itemsize) or load(places, mask, other, dtype)
            ),
        )
        patch.setattr(
            interpreter._interpreter,
            "store",
            lambda places, values, mask: (
                check(places[mask], values.itemsize) or store(places, values, mask)
            ),
        )
        yield


def assert_close(name, actual, expected, roundings=1, dtype=None):
    """Up to so many roundings to the dtype of the largest value (by up to one unit: the interpreter cuts bf16 off),
    and the error of sums in fp32."""
    assert actual.shape == expected.shape, name
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound = roundings * torch.finfo(dtype or actual.dtype).eps * largest + 64 * torch.finfo(
        torch.float32
    ).eps * max(1, largest)
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=bound, msg=lambda m: f"{name}: {m}"
    )


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(DEVICE, dtype)


def ends_of(counts):
    return torch.tensor(counts, device=DEVICE).cumsum(0)


def expert_of_rows(counts):
    return [e for e, n in enumerate(counts) for _ in range(n)]


@st.composite
def cases(draw):
    """(dtype, counts, D, H, gathers): gathers are pairs of (rows to gather from, which), or (S, None) without."""
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    gathers = []
    for seed in range(2):
        pool = draw(st.integers(1, 6))
        index = torch.randint(
            pool, (sum(counts),), generator=torch.Generator().manual_seed(seed)
        ).to(DEVICE)
        gathers.append((pool, index) if draw(st.booleans()) else (sum(counts), None))
    return (
        draw(st.sampled_from(DTYPES)),
        counts,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        *gathers,
    )


def pick(rows, index):
    return rows.double() if index is None else rows.double()[index]


@few
@given(cases())
def test_linear(case):
    dtype, counts, D, H, (pool, index), _ = case
    x, weight = randn(pool, D, dtype=dtype), randn(len(counts), H, D, dtype=dtype, seed=1)
    expected = [
        weight[e].double() @ row
        for e, row in zip(expert_of_rows(counts), pick(x, index), strict=True)
    ]
    expected = (
        torch.stack(expected)
        if expected
        else torch.zeros(0, H, dtype=torch.float64, device=DEVICE)
    )
    assert_close(
        "y",
        triton_grouped_gemm.triton_grouped_gemm(x, weight, ends_of(counts), index),
        expected,
    )


@few
@given(cases(), st.booleans())
def test_data_grad(case, two):
    dtype, counts, D, H, (pool, index), _ = case
    pairs = [
        (randn(pool, H, dtype=dtype, seed=i), randn(len(counts), H, D, dtype=dtype, seed=i + 2))
        for i in range(1 + two)
    ]
    expected = torch.zeros(sum(counts), D, dtype=torch.float64, device=DEVICE)
    for grad, weight in pairs:
        for s, (e, row) in enumerate(
            zip(expert_of_rows(counts), pick(grad, index), strict=True)
        ):
            expected[s] += weight[e].double().t() @ row
    actual = triton_grouped_gemm.grouped_data_grad(
        *pairs[0], ends_of(counts), index, plus=pairs[1] if two else None
    )
    assert_close("grad of x", actual, expected)


@few
@given(cases())
def test_weight_grad(case):
    dtype, counts, D, H, (pool, index), (grad_pool, grad_index) = case
    grad, x = randn(grad_pool, H, dtype=dtype), randn(pool, D, dtype=dtype, seed=1)
    expected = torch.zeros(len(counts), H, D, dtype=torch.float64, device=DEVICE)
    for e, grad_row, x_row in zip(
        expert_of_rows(counts), pick(grad, grad_index), pick(x, index), strict=True
    ):
        expected[e] += torch.outer(grad_row, x_row)
    assert_close(
        "grad of weight",
        triton_grouped_gemm.grouped_weight_grad(grad, x, ends_of(counts), index, grad_index),
        expected,
    )


@few
@given(
    st.lists(st.integers(0, 6), max_size=6),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_combine(sizes, pool, D, weighted, dtype):
    rows = randn(pool, D, dtype=dtype)
    order = torch.randint(pool, (sum(sizes),), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    weight = randn(sum(sizes), seed=1) if weighted else None
    bags = ends_of([0, *sizes])
    expected = torch.zeros(len(sizes), D, dtype=torch.float64, device=DEVICE)
    for t in range(len(sizes)):
        for i in range(int(bags[t]), int(bags[t + 1])):
            expected[t] += rows[order[i]].double() * (weight[i].double() if weighted else 1)
    assert_close("y", triton_grouped_gemm.weighted_combine(rows, order, bags, weight), expected)


def dumb_activation(name, gate, up):
    sigmoid, gelu = 1 / (1 + torch.exp(-gate)), gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    act = {"relu": gate * (gate > 0), "silu": gate * sigmoid, "swiglu": gate * sigmoid}.get(
        name, gelu
    )
    return act if up is None else act * up


def gated(name):
    return name in ("swiglu", "geglu")


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_and_its_gradients(activation, dtype):
    """Over more than one tile of columns, with less than a tile of rows in the last, and two that are none."""
    S, H = 19, 200
    gate, up, grad = (3 * randn(S, H, dtype=dtype, seed=i) for i in range(3))
    weight, ends = randn(S, seed=3), ends_of([9, 0, 8])
    gate[17], weight[18] = float("nan"), float("inf")
    up = up if gated(activation) else None
    inputs = [t[:17].double().requires_grad_() for t in (gate, up, weight) if t is not None]
    expected = (
        dumb_activation(activation, inputs[0], inputs[1] if up is not None else None)
        * inputs[-1][:, None]
    )
    actual = triton_grouped_gemm.weighted_activation(gate, up, weight, ends, activation)
    assert_close("y", actual[:17], expected.detach())
    grads = dict(
        zip(
            ("gate", "up", "weight") if up is not None else ("gate", "weight"),
            torch.autograd.grad(expected, inputs, grad[:17].double()),
            strict=True,
        )
    )
    by_name = dict(
        zip(
            ("gate", "up", "weight"),
            triton_grouped_gemm.weighted_activation_grad(
                grad, gate, up, weight, ends, activation
            ),
            strict=True,
        )
    )
    for name, value in grads.items():
        assert_close(f"grad of {name}", by_name[name][:17], value)
    assert (by_name["up"] is None) == (up is None)
    assert by_name["weight"][17:].tolist() == [0, 0]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_nan_stays_one(activation):
    gate, weight, ends = torch.full((1, 4), float("nan"), device=DEVICE), randn(1), ends_of([1])
    assert (
        triton_grouped_gemm.weighted_activation(gate, None, weight, ends, activation)
        .isnan()
        .all()
    )
    assert (
        triton_grouped_gemm.weighted_activation_grad(
            gate, gate, None, weight, ends, activation
        )[2]
        .isnan()
        .all()
    )


def routed(token, expert, num_tokens, num_experts, limit=None) -> PermutedTokens:
    token, expert = (
        torch.tensor(token, dtype=torch.int64),
        torch.tensor(expert, dtype=torch.int64),
    )
    routing = Routing(
        token.to(DEVICE),
        expert.to(DEVICE),
        torch.linspace(-1, 2, len(token), device=DEVICE),
        torch.zeros((), device=DEVICE),
    )
    return build_dispatch_plan(routing, num_tokens, num_experts, capacity=limit).routed


def leaves(rows, activation, D, H, dtype, num_tokens=None):
    """The differentiable arguments by name."""
    T, E = (
        len(rows.token_offsets_T1) - 1 if num_tokens is None else num_tokens,
        len(rows.expert_offsets_E),
    )
    shapes = {
        "x": (T, D),
        "weight": (len(rows.token_S),),
        "w1": (E, H, D),
        "w3": (E, H, D),
        "w2": (E, D, H),
    }
    return {
        name: (
            randn(*shape, dtype=torch.float32 if name == "weight" else dtype, seed=i)
            * (1 if name in ("x", "weight") else D**-0.5)
        ).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
        if gated(activation) or name != "w3"
    }


def run(inputs, rows, activation):
    args = (inputs.get(name) for name in NAMES)
    return triton_mlp.triton_mlp(*args, rows, activation)


def dumb_mlp(inputs, rows, activation):
    outputs, start = [0 * x for x in inputs["x"]], 0
    for e, end in enumerate(rows.expert_offsets_E.tolist()):
        for s in range(start, end):
            t = int(rows.token_S[s])
            up = inputs["w3"][e] @ inputs["x"][t] if gated(activation) else None
            hidden = dumb_activation(activation, inputs["w1"][e] @ inputs["x"][t], up)
            outputs[t] = outputs[t] + inputs["weight"][s] * (inputs["w2"][e] @ hidden)
        start = end
    return torch.stack(outputs) if outputs else 0 * inputs["x"]


def assert_mlp(rows, activation, D, H, dtype):
    inputs = leaves(rows, activation, D, H, dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    y, expected = run(inputs, rows, activation), dumb_mlp(wide, rows, activation)
    assert y.dtype == dtype
    assert_close("y", y.detach(), expected.detach(), roundings=4)
    grad = randn(*y.shape, dtype=dtype, seed=9)
    actual = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))
    reference = torch.autograd.grad(
        expected, list(wide.values()), grad.double(), allow_unused=True
    )
    for name, value in zip(wide, reference, strict=True):
        assert actual[name].dtype == inputs[name].dtype
        value = torch.zeros_like(wide[name]) if value is None else value
        assert_close(f"grad of {name}", actual[name], value, 4, dtype)


CHOICES = (
    [t for t in range(9) for _ in range(2)],
    [0, 1, 3, 1, 0, 4, 1, 4, 3, 0, 0, 1, 1, 3, 4, 0, 1, 3],
)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_against_a_loop(activation, dtype):
    """Expert 2 has no rows."""
    assert_mlp(routed(*CHOICES, 9, 5), activation, 24, 20, dtype)


HOSTILE = {
    "one expert with everything": ([0, 0, 1, 2, 2, 2], [1] * 6, 3, 3, None),
    "a token without experts, one with an expert twice": (
        [3, 0, 3, 1],
        [0, 2, 0, 2],
        5,
        3,
        None,
    ),
    "a single expert": ([0, 1], [0, 0], 2, 1, None),
    "no rows": ([], [], 3, 2, None),
    "no tokens": ([], [], 0, 2, None),
    "rows over capacity, at the end of the arrays": (*CHOICES, 9, 5, 2),
    "no capacity": (*CHOICES, 9, 5, 0),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_mlp_with_hostile_rows(case):
    assert_mlp(routed(*HOSTILE[case]), "swiglu", 5, 3, torch.float32)


def test_mlp_over_several_tiles():
    """More row tiles than a group, more than one tile of columns and of depth, the last of each not full."""
    expert = (
        torch.arange(12)
        .repeat_interleave(torch.tensor([0, 40, 1, 3, 17, 0, 33, 2, 16, 8, 10, 14]))
        .tolist()
    )
    rows = routed([i % 50 for i in range(len(expert))], expert, 50, 12)
    assert_mlp(rows, "swiglu", 70, 66, torch.float32)


@few
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_mlp_of_any_routing(num_tokens, num_experts, data):
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, num_tokens - 1), st.integers(0, num_experts - 1)),
            max_size=12,
        )
    )
    D, H = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    rows = routed([t for t, _ in pairs], [e for _, e in pairs], num_tokens, num_experts)
    assert_mlp(
        rows, data.draw(st.sampled_from(["gelu", "relu", "swiglu"])), D, H, torch.float32
    )


def gradients(inputs, rows, wanted=None):
    y = run(inputs, rows, "swiglu")
    wanted = wanted or list(inputs)
    return y, dict(
        zip(
            wanted, torch.autograd.grad(y.sum(), [inputs[name] for name in wanted]), strict=True
        )
    )


def test_mlp_is_repeatable_bit_for_bit():
    rows = routed(*CHOICES, 9, 5)
    inputs = leaves(rows, "swiglu", 24, 20, torch.bfloat16)
    (y1, grads1), (y2, grads2) = gradients(inputs, rows), gradients(inputs, rows)
    assert torch.equal(y1, y2)
    assert all(torch.equal(grads1[name], grads2[name]) for name in inputs)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_that_are_needed_are_computed(name, monkeypatch):
    rows = routed(*CHOICES, 9, 5)
    inputs = leaves(rows, "swiglu", 24, 20, torch.float32)
    _, expected = gradients(inputs, rows)
    calls = []
    for kernel in ("grouped_weight_grad", "grouped_data_grad", "weighted_combine"):

        def spy(*args, kernel=kernel, **kwargs):
            calls.append(kernel)
            return getattr(triton_grouped_gemm, kernel)(*args, **kwargs)

        monkeypatch.setattr(triton_mlp, kernel, spy)
    frozen = {other: t.detach() for other, t in inputs.items()}
    _, actual = gradients({**frozen, name: inputs[name]}, rows, [name])
    assert torch.equal(actual[name], expected[name])
    assert calls.count("grouped_weight_grad") == (name in ("w1", "w3", "w2"))
    assert calls.count("grouped_data_grad") == {"x": 2, "w2": 0}.get(name, 1)
    assert calls.count("weighted_combine") == 1 + (name == "x")


def test_mlp_keeps_the_inputs_and_the_preactivations():
    rows = routed(*CHOICES, 9, 5)
    inputs, saved = leaves(rows, "swiglu", 24, 20, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(inputs, rows, "swiglu")
    assert sorted(tuple(t.shape) for t in saved if t.is_floating_point()) == sorted(
        [*(tuple(t.shape) for t in inputs.values()), (18, 20), (18, 20)]
    )


def test_mlp_can_be_recomputed():
    rows = routed(*CHOICES, 9, 5)
    inputs = leaves(rows, "swiglu", 24, 20, torch.float32)
    y, expected = gradients(inputs, rows)
    again = checkpoint(run, inputs, rows, "swiglu", use_reentrant=False)
    assert torch.equal(again, y)
    for name, value in zip(
        inputs, torch.autograd.grad(again.sum(), list(inputs.values())), strict=True
    ):
        assert torch.equal(value, expected[name]), name


def test_mlp_takes_views():
    """Rows with gaps between them, transposed rows, a gradient expanded from one number."""
    rows = routed(*CHOICES, 9, 5)
    inputs = leaves(rows, "swiglu", 24, 20, torch.float32)
    _, expected = gradients(inputs, rows)
    for view in (
        torch.cat([inputs["x"]] * 2, 1).detach()[:, :24],
        inputs["x"].detach().t().contiguous().t(),
    ):
        _, actual = gradients({**inputs, "x": view.requires_grad_()}, rows)
        assert all(torch.equal(actual[name], expected[name]) for name in inputs)


def test_grouped_linear_as_a_function():
    counts = [3, 0, 2]
    x, weight = randn(6, 5), randn(3, 4, 5, seed=1)
    wide = [t.double().requires_grad_() for t in (x[:5], weight)]
    expected = torch.stack(
        [wide[1][e] @ row for e, row in zip(expert_of_rows(counts), wide[0], strict=True)]
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = triton_mlp.TritonGroupedLinear.apply(x, weight, ends_of(counts))
    assert_close("y", y[:5].detach(), expected.detach())
    grad_x, grad_weight = torch.autograd.grad(y[:5].square().sum(), (x, weight))
    wide_x, wide_weight = torch.autograd.grad(expected.square().sum(), wide)
    assert_close("grad of x", grad_x[:5], wide_x)
    assert_close("grad of weight", grad_weight, wide_weight)


def sparse(num_rows, columns, stride):
    """bf16 rows that lie far apart, in memory of which only what is touched is there."""
    numbers = (num_rows - 1) * stride + columns
    if CUDA:
        flat = torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE)
    else:
        flags = (
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        )  # Linux's number
        flat = torch.frombuffer(mmap.mmap(-1, 2 * numbers, flags=flags), dtype=torch.bfloat16)
    rows = flat.as_strided((num_rows, columns), (stride, 1))
    return rows.copy_(randn(num_rows, columns))


@pytest.mark.skipif(sys.platform != "linux", reason="maps 4 GB without taking them")
def test_offsets_have_64_bits():
    """The last of three rows is 2^31 numbers away from the first."""
    far, ends, bags = sparse(3, 16, 2**30), ends_of([1, 2]), ends_of([0, 3])
    near, index, weight = (
        far.clone(),
        torch.tensor([2, 0, 2], device=DEVICE),
        randn(2, 16, 16, dtype=torch.bfloat16),
    )
    assert near.stride() == (16, 1)
    for gather in (None, index):
        for operation in (
            triton_grouped_gemm.triton_grouped_gemm,
            triton_grouped_gemm.grouped_data_grad,
        ):
            assert torch.equal(
                operation(far, weight, ends, gather), operation(near, weight, ends, gather)
            )
        assert torch.equal(
            triton_grouped_gemm.grouped_weight_grad(far, near, ends, index, gather),
            triton_grouped_gemm.grouped_weight_grad(near, near, ends, index, gather),
        )
        assert torch.equal(
            triton_grouped_gemm.grouped_weight_grad(near, far, ends, gather, index),
            triton_grouped_gemm.grouped_weight_grad(near, near, ends, gather, index),
        )
    assert torch.equal(
        triton_grouped_gemm.weighted_combine(far, index, bags),
        triton_grouped_gemm.weighted_combine(near, index, bags),
    )
    stack = sparse(3, 256, 2**30).view(3, 16, 16)
    assert torch.equal(
        triton_grouped_gemm._product(near, stack, ends_of([1, 1, 1]), None),
        triton_grouped_gemm._product(near, stack.clone(), ends_of([1, 1, 1]), None),
    )


def test_what_it_cannot_do_is_refused():
    rows = routed(*CHOICES, 9, 5)
    inputs, ends, wide = (
        leaves(rows, "swiglu", 24, 20, torch.float32),
        rows.expert_offsets_E,
        torch.zeros(2, 2).double(),
    )
    calls = (
        lambda: triton_grouped_gemm.triton_grouped_gemm(wide, wide[None], ends),
        lambda: triton_grouped_gemm.grouped_data_grad(wide, wide[None], ends),
        lambda: triton_grouped_gemm.grouped_weight_grad(wide, wide, ends),
        lambda: triton_grouped_gemm.weighted_combine(wide, ends, ends),
    )
    for call in calls:
        with pytest.raises(
            ValueError,
            match="expert kernels is torch.float64; allowed: torch.bfloat16 torch.float16",
        ):
            call()
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        run(inputs, rows, "tanh")
    x, w1 = inputs["x"].detach(), inputs["w1"].detach()
    for match, call in (
        ("do not go together", lambda: run(inputs, rows, "gelu")),
        (
            "weights of the rows are fp32",
            lambda: run({**inputs, "weight": ends.half()}, rows, "swiglu"),
        ),
        (
            "rows are torch.float32, weights torch.float16",
            lambda: triton_grouped_gemm.triton_grouped_gemm(x, w1.half(), ends),
        ),
        (
            "rows .*9, 24.*, weights .*20, 23",
            lambda: triton_grouped_gemm.triton_grouped_gemm(x, w1[..., :-1].contiguous(), ends),
        ),
        (
            "must be contiguous",
            lambda: triton_grouped_gemm.triton_grouped_gemm(x, w1[..., :-1], ends),
        ),
        ("5 experts, 2 ends", lambda: triton_grouped_gemm.triton_grouped_gemm(x, w1, ends[:2])),
        (
            "indices are int64, not torch.int32",
            lambda: triton_grouped_gemm.triton_grouped_gemm(x, w1, ends.int()),
        ),
        (
            "indices must be contiguous",
            lambda: triton_grouped_gemm.weighted_combine(x, ends, ends[::2]),
        ),
        (
            "one weight per entry",
            lambda: triton_grouped_gemm.weighted_combine(x, ends, ends, x[0]),
        ),
        (
            "gradient is torch.float16",
            lambda: triton_grouped_gemm.grouped_weight_grad(x.half(), x, ends),
        ),
        ("differ in rows", lambda: triton_grouped_gemm.grouped_weight_grad(x, x[1:], ends)),
        (
            "rows must be contiguous",
            lambda: triton_grouped_gemm.weighted_activation(x.t(), None, x[0], ends, "relu"),
        ),
    ):
        with pytest.raises(AssertionError, match=match):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared_kib", [0, 48, 64, 99, 163, 227])
def test_tiles_fit_the_device_and_the_sizes(dtype, shared_kib):
    for rows, columns, depth in (
        (2048, 1408, 2048),
        (0, 1, 1),
        (20, 100, 17),
        (10**6, 64, 10**6),
    ):
        tile = triton_grouped_gemm.choose_tile(dtype, rows, columns, depth, shared_kib * 1024)
        for size, most in ((tile.rows, rows), (tile.columns, columns), (tile.depth, depth)):
            assert size >= 16 and size & (size - 1) == 0 and size < max(17, 2 * most)
        assert (
            tile.stages * tile.depth * (tile.rows + tile.columns) * dtype.itemsize
            <= max(48, shared_kib) * 1024
        )
        assert tile.warps in (4, 8)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_nothing_waits_for_the_device():
    rows = routed(*CHOICES, 9, 5)
    inputs = leaves(rows, "swiglu", 64, 64, torch.bfloat16)
    _, expected = gradients(inputs, rows)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, actual = gradients(inputs, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(actual[name], expected[name]) for name in inputs)


COMPILE = """
import re, sys, torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# A driver that knows a GPU, which need not be there.
triton.runtime.driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                                                 get_current_target=lambda: GPUTarget("cuda", int(sys.argv[1]), 32)))
compiled, run = [], JITFunction.run
JITFunction.run = lambda *args, warmup, **kwargs: compiled.append(run(*args, warmup=True, **kwargs))
from megatron.moe.experts.triton_mlp import triton_mlp
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.routing import Routing

token, expert = torch.arange(256) // 2, torch.arange(256) % 2
rows = build_dispatch_plan(Routing(token, expert, torch.ones(256), torch.zeros(())), 128, 2).routed
x, w1, w3, w2 = (torch.zeros(*s, dtype=getattr(torch, sys.argv[2]), requires_grad=True)
                 for s in ((128, 64), (2, 64, 64), (2, 64, 64), (2, 64, 64)))
weight = torch.zeros(256, requires_grad=True)
triton_mlp(x, weight, w1, w3, w2, rows, "swiglu").sum().backward()
for name, ptx in ((kernel.metadata.name, kernel.asm["ptx"]) for kernel in compiled):
    print(name, "mma" in ptx, "cp.async.cg" in ptx and not re.search(r"\\bld.global.b(16|32)\\b", ptx),
          bool(re.search(r"\\b(atom|red)\\b", ptx)))
"""


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("90", "bfloat16"), pytest.param("80", "float32", marks=pytest.mark.slow)],
)
def test_kernels_compile_for_a_gpu(target, dtype, tmp_path, repo):
    """As the layer calls them, without a GPU. Products use its matrix units and load 16 bytes at a time while they
    multiply, none singly; there are no atomics."""
    pytest.importorskip(
        "triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs"
    )
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(repo),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, dtype], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    product = f"{dtype == 'bfloat16'} True False"
    assert set(done.stdout.splitlines()) == {
        f"_product_kernel {product}",
        f"_weight_grad_kernel {product}",
        "_combine_kernel False False False",
        "_activation_kernel False False False",
        "_activation_grad_kernel False False False",
    }


def test_only_the_kernels_import_triton_with_the_module(repo):
    def imported(tree):
        return {
            name
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(a.name for a in node.names)]
            if name
        }

    users = {
        path.stem
        for path in (repo / "megatron").rglob("*.py")
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "triton" or name.startswith("megatron.moe.experts.triton_")
    }
    assert users == {"triton_grouped_gemm", "triton_mlp", "triton_lookup"}
