"""Inputs and comparisons for tests of the experts' Triton kernels.

The kernels are compiled where there is a GPU and run in Triton's interpreter elsewhere
(conftest.py sets TRITON_INTERPRET).

Shape suffixes: T tokens, D hidden, E experts, H expert width, S rows sorted by expert.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from helpers.reference_mlp import reference_activation
from megatron.moe.dispatch.plan import PermutedTokens, build_dispatch_plan
from megatron.moe.experts.activations import is_gated
from megatron.moe.routing import Routing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "w1", "w3", "w2")
CHOICES = (
    [t for t in range(9) for _ in range(2)],
    [0, 1, 3, 1, 0, 4, 1, 4, 3, 0, 0, 1, 1, 3, 4, 0, 1, 3],
)
"""Token and expert of 18 assignments of 9 tokens to 5 experts, of which expert 2 has none."""
few = settings(max_examples=15, deadline=None)


def assert_close(name, actual, expected, roundings=1, dtype=None):
    """Compare with an fp64 reference.

    The bound is `roundings` roundings of the largest value to the dtype, each by up to one
    unit in the last place (the interpreter truncates bf16), and the error of fp32 sums.
    """
    assert actual.shape == expected.shape, name
    largest = expected.abs().max().item() if expected.numel() else 0.0
    rounding = torch.finfo(dtype or actual.dtype).eps * largest
    summation = 64 * torch.finfo(torch.float32).eps * max(1, largest)
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=0,
        atol=roundings * rounding + summation,
        msg=lambda m: f"{name}: {m}",
    )


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def offsets_of(counts):
    """Return expert_offsets_E: the end of each expert's rows."""
    return torch.tensor(counts, device=DEVICE).cumsum(0)


def expert_of_rows(counts):
    return [e for e, n in enumerate(counts) for _ in range(n)]


def pick(rows, index):
    """Gather rows in fp64; without an index, return all of them."""
    return rows.double() if index is None else rows.double()[index]


@st.composite
def cases(draw):
    """Draw (dtype, counts, D, H, gather, gather).

    A gather is (number of rows to gather from, index), or (S, None) without an index.
    """
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    gathers = []
    for seed in range(2):
        pool = draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(pool, (sum(counts),), generator=generator).to(DEVICE)
        gathers.append((pool, index) if draw(st.booleans()) else (sum(counts), None))
    return (
        draw(st.sampled_from(DTYPES)),
        counts,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        *gathers,
    )


def routed(token, expert, num_tokens, num_experts, limit=None) -> PermutedTokens:
    """Sort assignments by expert; weights run from -1 to 2."""
    routing = Routing(
        torch.tensor(token, dtype=torch.int64, device=DEVICE),
        torch.tensor(expert, dtype=torch.int64, device=DEVICE),
        torch.linspace(-1, 2, len(token), device=DEVICE),
        torch.zeros((), device=DEVICE),
    )
    return build_dispatch_plan(routing, num_tokens, num_experts, capacity=limit).routed


def mlp_inputs(rows, activation, D, H, dtype):
    """Return the differentiable arguments of the MLP by name."""
    T = len(rows.token_offsets_T1) - 1
    E = len(rows.expert_offsets_E)
    shapes = {
        "x": (T, D),
        "weight": (len(rows.token_S),),
        "w1": (E, H, D),
        "w3": (E, H, D),
        "w2": (E, D, H),
    }
    inputs = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if name == "w3" and not is_gated(activation):
            continue
        own_dtype = torch.float32 if name == "weight" else dtype
        scale = 1 if name in ("x", "weight") else D**-0.5
        inputs[name] = (randn(*shape, dtype=own_dtype, seed=seed) * scale).requires_grad_()
    return inputs


def reference_rows_mlp(inputs, rows, activation):
    """Compute the MLP one row at a time."""
    outputs = [0 * x for x in inputs["x"]]
    start = 0
    for e, end in enumerate(rows.expert_offsets_E.tolist()):
        for s in range(start, end):
            t = int(rows.token_S[s])
            up = inputs["w3"][e] @ inputs["x"][t] if is_gated(activation) else None
            gate = inputs["w1"][e] @ inputs["x"][t]
            hidden = reference_activation(activation, gate, up)
            outputs[t] = outputs[t] + inputs["weight"][s] * (inputs["w2"][e] @ hidden)
        start = end
    return torch.stack(outputs) if outputs else 0 * inputs["x"]
