"""The Triton kernels of grouped products and the combine against fp64 loops.

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows sorted by expert.
"""

import ast
import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from helpers.triton_kernels import (  # noqa: E402
    CUDA,
    DEVICE,
    DTYPES,
    assert_close,
    cases,
    expert_of_rows,
    few,
    offsets_of,
    pick,
    randn,
)
from megatron.moe.experts import triton_grouped_gemm  # noqa: E402
from megatron.moe.experts.triton_combine import weighted_combine  # noqa: E402
from megatron.moe.experts.triton_grouped_gemm import (  # noqa: E402
    choose_tile,
    grouped_data_grad,
    grouped_weight_grad,
)
from megatron.moe.experts.triton_grouped_gemm import triton_grouped_gemm as gemm  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("checked_memory")]


@few
@given(cases())
def test_product_matches_loop(case):
    dtype, counts, D, H, (pool, index), _ = case
    x = randn(pool, D, dtype=dtype)
    weight = randn(len(counts), H, D, dtype=dtype, seed=1)
    expected = torch.zeros(sum(counts), H, dtype=torch.float64, device=DEVICE)
    for s, (e, row) in enumerate(zip(expert_of_rows(counts), pick(x, index), strict=True)):
        expected[s] = weight[e].double() @ row
    assert_close("y", gemm(x, weight, offsets_of(counts), index), expected)


@few
@given(cases(), st.booleans())
def test_data_grad_matches_loop(case, two):
    dtype, counts, D, H, (pool, index), _ = case
    pairs = []
    for i in range(1 + two):
        grad = randn(pool, H, dtype=dtype, seed=i)
        weight = randn(len(counts), H, D, dtype=dtype, seed=i + 2)
        pairs.append((grad, weight))
    expected = torch.zeros(sum(counts), D, dtype=torch.float64, device=DEVICE)
    for grad, weight in pairs:
        picked = pick(grad, index)
        for s, (e, row) in enumerate(zip(expert_of_rows(counts), picked, strict=True)):
            expected[s] += weight[e].double().t() @ row
    plus = pairs[1] if two else None
    actual = grouped_data_grad(*pairs[0], offsets_of(counts), index, plus=plus)
    assert_close("grad of x", actual, expected)


@few
@given(cases())
def test_weight_grad_matches_loop(case):
    dtype, counts, D, H, (pool, index), (grad_pool, grad_index) = case
    grad = randn(grad_pool, H, dtype=dtype)
    x = randn(pool, D, dtype=dtype, seed=1)
    expected = torch.zeros(len(counts), H, D, dtype=torch.float64, device=DEVICE)
    for e, grad_row, x_row in zip(
        expert_of_rows(counts), pick(grad, grad_index), pick(x, index), strict=True
    ):
        expected[e] += torch.outer(grad_row, x_row)
    actual = grouped_weight_grad(grad, x, offsets_of(counts), index, grad_index)
    assert_close("grad of weight", actual, expected)


@few
@given(
    st.lists(st.integers(0, 6), max_size=6),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_combine_matches_loop(sizes, pool, D, weighted, dtype):
    rows = randn(pool, D, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(pool, (sum(sizes),), generator=generator).to(DEVICE)
    weight = randn(sum(sizes), seed=1) if weighted else None
    offsets = offsets_of([0, *sizes])
    expected = torch.zeros(len(sizes), D, dtype=torch.float64, device=DEVICE)
    for t in range(len(sizes)):
        for i in range(int(offsets[t]), int(offsets[t + 1])):
            factor = weight[i].double() if weighted else 1
            expected[t] += rows[order[i]].double() * factor
    assert_close("y", weighted_combine(rows, order, offsets, weight), expected)


def sparse(num_rows, columns, stride):
    """Return bf16 rows that are far apart, in memory that is mapped only where touched."""
    numbers = (num_rows - 1) * stride + columns
    if CUDA:
        flat = torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE)
    else:
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # the value on Linux
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        flat = torch.frombuffer(mmap.mmap(-1, 2 * numbers, flags=flags), dtype=torch.bfloat16)
    rows = flat.as_strided((num_rows, columns), (stride, 1))
    return rows.copy_(randn(num_rows, columns))


@pytest.mark.skipif(sys.platform != "linux", reason="maps 4 GB without using them")
def test_offsets_have_64_bits():
    """The last of three rows is 2^31 numbers away from the first."""
    far = sparse(3, 16, 2**30)
    near = far.clone()
    assert near.stride() == (16, 1)
    offsets = offsets_of([1, 2])
    index = torch.tensor([2, 0, 2], device=DEVICE)
    weight = randn(2, 16, 16, dtype=torch.bfloat16)
    for gather in (None, index):
        for operation in (gemm, grouped_data_grad):
            actual = operation(far, weight, offsets, gather)
            assert torch.equal(actual, operation(near, weight, offsets, gather))
        assert torch.equal(
            grouped_weight_grad(far, near, offsets, index, gather),
            grouped_weight_grad(near, near, offsets, index, gather),
        )
        assert torch.equal(
            grouped_weight_grad(near, far, offsets, gather, index),
            grouped_weight_grad(near, near, offsets, gather, index),
        )
    segment = offsets_of([0, 3])
    assert torch.equal(
        weighted_combine(far, index, segment), weighted_combine(near, index, segment)
    )
    stack = sparse(3, 256, 2**30).view(3, 16, 16)
    offsets = offsets_of([1, 1, 1])
    assert torch.equal(
        triton_grouped_gemm._product(near, stack, offsets, None),
        triton_grouped_gemm._product(near, stack.clone(), offsets, None),
    )


def test_fp64_is_refused():
    wide = torch.zeros(2, 2, device=DEVICE).double()
    offsets = offsets_of([1, 1])
    calls = (
        lambda: gemm(wide, wide[None], offsets),
        lambda: grouped_data_grad(wide, wide[None], offsets),
        lambda: grouped_weight_grad(wide, wide, offsets),
        lambda: weighted_combine(wide, offsets, offsets),
    )
    message = "expert kernels is torch.float64; allowed: torch.bfloat16 torch.float16"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


X, W1, OFFSETS = randn(9, 24), randn(5, 20, 24), offsets_of([5, 6, 0, 4, 3])


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (
            "rows are torch.float32, weights torch.float16",
            lambda: gemm(X, W1.half(), OFFSETS),
        ),
        (
            "rows .*9, 24.*, weights .*20, 23",
            lambda: gemm(X, W1[..., :-1].contiguous(), OFFSETS),
        ),
        ("must be contiguous", lambda: gemm(X, W1[..., :-1], OFFSETS)),
        ("5 experts, but 2 expert offsets", lambda: gemm(X, W1, OFFSETS[:2])),
        ("indices are int64, not torch.int32", lambda: gemm(X, W1, OFFSETS.int())),
        ("indices must be contiguous", lambda: weighted_combine(X, OFFSETS, OFFSETS[::2])),
        ("one weight per entry", lambda: weighted_combine(X, OFFSETS, OFFSETS, X[0])),
        ("gradient is torch.float16", lambda: grouped_weight_grad(X.half(), X, OFFSETS)),
        ("differ in rows", lambda: grouped_weight_grad(X, X[1:], OFFSETS)),
    ],
)
def test_mismatched_operands_are_refused(match, call):
    with pytest.raises(AssertionError, match=match):
        call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared_kib", [0, 48, 64, 99, 163, 227])
def test_tiles_fit_device_and_sizes(dtype, shared_kib):
    products = ((2048, 1408, 2048), (0, 1, 1), (20, 100, 17), (10**6, 64, 10**6))
    for rows, columns, depth in products:
        tile = choose_tile(dtype, rows, columns, depth, shared_kib * 1024)
        for size, most in ((tile.rows, rows), (tile.columns, columns), (tile.depth, depth)):
            assert size >= 16 and size & (size - 1) == 0 and size < max(17, 2 * most)
        operands = tile.depth * (tile.rows + tile.columns) * dtype.itemsize
        assert tile.stages * operands <= max(48, shared_kib) * 1024
        assert tile.warps in (4, 8)


def imported_modules(tree):
    """Return the names of modules that are imported when the module itself is."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.add(getattr(node, "module", None))
            names.update(alias.name for alias in node.names)
    return {name for name in names if name}


def test_only_kernel_modules_import_triton(repo):
    """Triton is optional: other modules import it where it is used."""
    users = set()
    for path in (repo / "megatron").rglob("*.py"):
        for name in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] == "triton" or name.startswith(
                "megatron.moe.experts.triton_"
            ):
                users.add(path.stem)
    assert users == {
        "triton_activation",
        "triton_combine",
        "triton_grouped_gemm",
        "triton_lookup",
        "triton_mlp",
    }
