"""The experts' MLP on the Triton kernels against an fp64 loop over rows.

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows sorted by expert.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

from helpers.triton_kernels import (  # noqa: E402
    CHOICES,
    CUDA,
    DTYPES,
    NAMES,
    assert_close,
    expert_of_rows,
    few,
    mlp_inputs,
    offsets_of,
    randn,
    reference_rows_mlp,
    routed,
)
from megatron.moe.experts import triton_mlp  # noqa: E402
from megatron.moe.experts.activations import available_activations  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("checked_memory")]


def run(inputs, rows, activation):
    args = (inputs.get(name) for name in NAMES)
    return triton_mlp.triton_mlp(*args, rows, activation)


def assert_mlp(rows, activation, D, H, dtype):
    inputs = mlp_inputs(rows, activation, D, H, dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    y = run(inputs, rows, activation)
    expected = reference_rows_mlp(wide, rows, activation)
    assert y.dtype == dtype
    assert_close("y", y.detach(), expected.detach(), roundings=4)
    grad = randn(*y.shape, dtype=dtype, seed=9)
    actual = torch.autograd.grad(y, list(inputs.values()), grad)
    reference = torch.autograd.grad(
        expected, list(wide.values()), grad.double(), allow_unused=True
    )
    for name, ours, theirs in zip(inputs, actual, reference, strict=True):
        assert ours.dtype == inputs[name].dtype
        if theirs is None:
            theirs = torch.zeros_like(wide[name])
        assert_close(f"grad of {name}", ours, theirs, 4, dtype)


@pytest.mark.parametrize("activation", available_activations())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_matches_loop(activation, dtype):
    """Expert 2 has no rows."""
    assert_mlp(routed(*CHOICES, 9, 5), activation, 24, 20, dtype)


def test_halves_of_fused_weights_equal_copies():
    """Slices of one stack, as models of transformers have them, need no copy."""
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    expected = run(inputs, rows, "swiglu")
    fused = torch.cat([inputs["w1"], inputs["w3"]], dim=1).detach().requires_grad_()
    w1, w3 = fused.chunk(2, dim=1)
    actual = run({**inputs, "w1": w1, "w3": w3}, rows, "swiglu")
    assert not w1.is_contiguous() and torch.equal(actual, expected)
    grad = randn(*expected.shape, dtype=torch.float32, seed=9)
    grads = torch.autograd.grad(expected, (inputs["w1"], inputs["w3"]), grad)
    (fused_grad,) = torch.autograd.grad(actual, (fused,), grad)
    assert torch.equal(fused_grad, torch.cat(grads, dim=1))


EXTREME_ROWS = {
    "all rows on one expert": ([0, 0, 1, 2, 2, 2], [1] * 6, 3, 3, None),
    "token without experts, token with an expert twice": (
        [3, 0, 3, 1],
        [0, 2, 0, 2],
        5,
        3,
        None,
    ),
    "single expert": ([0, 1], [0, 0], 2, 1, None),
    "no rows": ([], [], 3, 2, None),
    "no tokens": ([], [], 0, 2, None),
    "rows over capacity at the end": (*CHOICES, 9, 5, 2),
    "no capacity": (*CHOICES, 9, 5, 0),
}


@pytest.mark.parametrize("case", EXTREME_ROWS, ids=lambda case: case.replace(" ", "-"))
def test_mlp_with_extreme_rows(case):
    assert_mlp(routed(*EXTREME_ROWS[case]), "swiglu", 5, 3, torch.float32)


def test_mlp_over_several_tiles():
    """More row tiles than a group and several tiles of columns and depth, the last partial."""
    counts = [0, 40, 1, 3, 17, 0, 33, 2, 16, 8, 10, 14]
    expert = expert_of_rows(counts)
    rows = routed([i % 50 for i in range(len(expert))], expert, 50, 12)
    assert_mlp(rows, "swiglu", 70, 66, torch.float32)


@few
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_mlp_of_any_routing(num_tokens, num_experts, data):
    token = st.integers(0, num_tokens - 1)
    expert = st.integers(0, num_experts - 1)
    pairs = data.draw(st.lists(st.tuples(token, expert), max_size=12))
    D = data.draw(st.integers(1, 20))
    H = data.draw(st.integers(1, 20))
    rows = routed([t for t, _ in pairs], [e for _, e in pairs], num_tokens, num_experts)
    activation = data.draw(st.sampled_from(["gelu", "relu", "swiglu"]))
    assert_mlp(rows, activation, D, H, torch.float32)


def gradients(inputs, rows, names=None):
    """Return y, and the gradients of its sum by name."""
    y = run(inputs, rows, "swiglu")
    names = names or list(inputs)
    grads = torch.autograd.grad(y.sum(), [inputs[name] for name in names])
    return y, dict(zip(names, grads, strict=True))


def test_mlp_is_repeatable_bit_for_bit():
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.bfloat16)
    y1, grads1 = gradients(inputs, rows)
    y2, grads2 = gradients(inputs, rows)
    assert torch.equal(y1, y2)
    assert all(torch.equal(grads1[name], grads2[name]) for name in inputs)


@pytest.mark.parametrize("name", NAMES)
def test_only_needed_gradients_are_computed(name, monkeypatch):
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    _, expected = gradients(inputs, rows)
    calls = []
    for kernel in ("grouped_weight_grad", "grouped_data_grad", "weighted_combine"):
        original = getattr(triton_mlp, kernel)

        def spy(*args, kernel=kernel, original=original, **kwargs):
            calls.append(kernel)
            return original(*args, **kwargs)

        monkeypatch.setattr(triton_mlp, kernel, spy)
    frozen = {other: t.detach() for other, t in inputs.items()}
    _, actual = gradients({**frozen, name: inputs[name]}, rows, [name])
    assert torch.equal(actual[name], expected[name])
    assert calls.count("grouped_weight_grad") == (name in ("w1", "w3", "w2"))
    assert calls.count("grouped_data_grad") == {"x": 2, "w2": 0}.get(name, 1)
    assert calls.count("weighted_combine") == 1 + (name == "x")


def test_mlp_saves_inputs_and_preactivations():
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(inputs, rows, "swiglu")
    shapes = [tuple(t.shape) for t in saved if t.is_floating_point()]
    expected = [*(tuple(t.shape) for t in inputs.values()), (18, 20), (18, 20)]
    assert sorted(shapes) == sorted(expected)


def test_mlp_can_be_recomputed():
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    y, expected = gradients(inputs, rows)
    again = checkpoint(run, inputs, rows, "swiglu", use_reentrant=False)
    assert torch.equal(again, y)
    grads = torch.autograd.grad(again.sum(), list(inputs.values()))
    for name, value in zip(inputs, grads, strict=True):
        assert torch.equal(value, expected[name]), name


def test_mlp_accepts_views():
    """Rows with gaps between them, transposed rows, a gradient expanded from a scalar."""
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    _, expected = gradients(inputs, rows)
    with_gaps = torch.cat([inputs["x"]] * 2, 1).detach()[:, :24]
    transposed = inputs["x"].detach().t().contiguous().t()
    for view in (with_gaps, transposed):
        _, actual = gradients({**inputs, "x": view.requires_grad_()}, rows)
        assert all(torch.equal(actual[name], expected[name]) for name in inputs)


def test_grouped_linear_function_matches_loop():
    """The sixth row is padding."""
    counts = [3, 0, 2]
    x = randn(6, 5)
    weight = randn(3, 4, 5, seed=1)
    wide_x, wide_weight = (t.double().requires_grad_() for t in (x[:5], weight))
    pairs = zip(expert_of_rows(counts), wide_x, strict=True)
    expected = torch.stack([wide_weight[e] @ row for e, row in pairs])
    x = x.requires_grad_()
    weight = weight.requires_grad_()
    y = triton_mlp.TritonGroupedLinear.apply(x, weight, offsets_of(counts))
    assert_close("y", y[:5].detach(), expected.detach())
    grad_x, grad_weight = torch.autograd.grad(y[:5].square().sum(), (x, weight))
    wide = torch.autograd.grad(expected.square().sum(), (wide_x, wide_weight))
    assert_close("grad of x", grad_x[:5], wide[0])
    assert_close("grad of weight", grad_weight, wide[1])


def test_mlp_refuses_mismatched_arguments():
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 24, 20, torch.float32)
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        run(inputs, rows, "tanh")
    with pytest.raises(AssertionError, match="do not go together"):
        run(inputs, rows, "gelu")
    half = {**inputs, "weight": rows.expert_offsets_E.half()}
    with pytest.raises(AssertionError, match="weights of the rows are fp32"):
        run(half, rows, "swiglu")


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_mlp_does_not_sync():
    rows = routed(*CHOICES, 9, 5)
    inputs = mlp_inputs(rows, "swiglu", 64, 64, torch.bfloat16)
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

# A driver that reports a GPU, which need not exist.
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", int(sys.argv[1]), 32)))
compiled, run = [], JITFunction.run
JITFunction.run = lambda *args, warmup, **kwargs: compiled.append(run(*args, warmup=True, **kwargs))
from megatron.moe.experts.triton_mlp import triton_mlp
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.routing import Routing

token, expert = torch.arange(256) // 2, torch.arange(256) % 2
routing = Routing(token, expert, torch.ones(256), torch.zeros(()))
rows = build_dispatch_plan(routing, 128, 2).routed
x, w1, w3, w2 = (torch.zeros(*s, dtype=getattr(torch, sys.argv[2]), requires_grad=True)
                 for s in ((128, 64), (2, 64, 64), (2, 64, 64), (2, 64, 64)))
weight = torch.zeros(256, requires_grad=True)
triton_mlp(x, weight, w1, w3, w2, rows, "swiglu").sum().backward()
for name, ptx in ((kernel.metadata.name, kernel.asm["ptx"]) for kernel in compiled):
    wide_loads = "cp.async.cg" in ptx and not re.search(r"\\bld.global.b(16|32)\\b", ptx)
    print(name, "mma" in ptx, wide_loads, bool(re.search(r"\\b(atom|red)\\b", ptx)))
"""


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("90", "bfloat16"), pytest.param("80", "float32", marks=pytest.mark.slow)],
)
def test_kernels_compile_for_gpu(target, dtype, tmp_path, repo):
    """Compile the kernels as the layer launches them, without a GPU.

    Products use tensor cores and load 16 bytes at a time while they multiply, never
    single numbers; there are no atomics.
    """
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no NVIDIA compiler")
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


COMPILE_UNKNOWN = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32)))
run = JITFunction.run
JITFunction.run = lambda *args, warmup, **kwargs: run(*args, warmup=True, **kwargs)
from megatron.moe.experts import activations, triton_activation

tanh = activations.Nonlinearity("tanh", torch.tanh, torch.ops.aten.tanh_backward)
activations._REGISTRY["tanh"] = activations.Activation(tanh, gated=False)
gate, weight, offsets = torch.zeros(2, 16), torch.zeros(2), torch.tensor([2])
triton_activation.weighted_activation(gate, None, weight, offsets, "tanh")
"""


def test_unknown_nonlinearity_does_not_compile(tmp_path, repo):
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no NVIDIA compiler")
    env = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(repo),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_UNKNOWN], env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no Triton code for this nonlinearity" in done.stderr
