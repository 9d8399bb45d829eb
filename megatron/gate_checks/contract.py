"""Checks of a gate by itself: the contract of `megatron.moe.routing`, state, and gradients.

Every check raises AssertionError with one sentence that says what is wrong.

Shape suffixes: T tokens, D hidden, A assignments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.gate_checks.cases import (
    GateCase,
    expert_sets,
    make_carry,
    make_input,
    require_that,
)
from megatron.moe.gate import Gate
from megatron.moe.routing import GateInput, Routing

EXTREME_INPUTS = ((5, 0, 1.0), (1, 0, 1.0), (0, 0, 1.0), (5, 1, 1.0), (13, 0, 1e4))
"""(number of tokens, number of experts or 0 for the case's own, scale of the hidden states)"""
_TOKENS = 10
# What torch keeps in every module, and whether `warn_once` has warned.
_NOT_STATE = {*vars(nn.Module()), "_has_warned"}


def check_extreme_input(case: GateCase, tokens: int, num_experts: int, scale: float) -> None:
    """Check the contract, and that values and gradients are finite, in fp32 and bf16.

    Args:
        num_experts: 0: that of the case.
    """
    sizes: dict[str, Any] = {}
    if num_experts:
        sizes = {"num_experts": num_experts}
        if "topk" in case.gate_class.Config.__dataclass_fields__:
            sizes["topk"] = min(num_experts, case.options.get("topk", 1))
    gate = case.gate(**sizes)
    x_BSD, ids_BS = make_input(tokens, scale=scale)
    for dtype in (torch.float32, torch.bfloat16):
        x_TD = x_BSD[0].to(dtype).requires_grad_()
        carry = make_carry(gate, tokens, scale=scale).requires_grad_()
        inp = GateInput(x_TD, ids_BS[0], torch.zeros(tokens, dtype=torch.int64), carry)
        what = f"{tokens} tokens of scale {scale:g} in {dtype} for {gate.num_experts} experts"
        check_routing(gate, inp, what)


def check_routing(gate: Gate, inp: GateInput, what: str) -> None:
    """Check that a routing keeps the contract and is finite, with its gradients.

    Args:
        what: description of the input, for messages.
    """
    num_tokens = len(inp.x_TD)
    out = gate(inp)
    require_that(isinstance(out, Routing), f"forward returned {type(out).__name__}, no Routing")
    out.check(num_tokens, gate.num_experts + len(gate.zero_computation_experts))
    for name in ("weight_A", "aux_loss"):
        finite = bool(torch.isfinite(getattr(out, name)).all())
        require_that(finite, f"{name} is NaN or infinite for {what}")
    total = out.weight_A.sum() + out.aux_loss
    if not total.requires_grad:
        return
    total.backward()
    leaves = {"x_TD": inp.x_TD, "carry": inp.carry, **dict(gate.named_parameters())}
    for name, leaf in leaves.items():
        finite = leaf.grad is None or bool(torch.isfinite(leaf.grad).all())
        require_that(finite, f"the gradient of {name} is NaN or infinite for {what}")


def check_experts_in_range(case: GateCase) -> None:
    """Check that every assignment is of an existing token to an existing expert."""
    gate = case.gate()
    num_choices = gate.num_experts + len(gate.zero_computation_experts)
    for seed in range(4):
        inp = _input(gate, _TOKENS, seed)
        out = gate(inp)
        for name, tensor, bound in (
            ("token_A", out.token_A, _TOKENS),
            ("expert_A", out.expert_A, num_choices),
        ):
            if not len(tensor):
                continue
            low = int(tensor.min())
            high = int(tensor.max())
            require_that(
                low >= 0 and high < bound,
                f"{name} has values from {low} to {high}; allowed: 0 to {bound - 1}",
            )


def check_forward_keeps_state(case: GateCase) -> None:
    """Check that forward changes nothing of the gate, in training and in evaluation.

    Activation recomputation runs forward twice, and evaluation must not influence training.
    A second pass over the same input must also return the same routing.
    """
    gate = case.gate()
    inp = _input(gate, _TOKENS)
    gate(inp)  # a first pass may create caches that depend on shapes only
    for training in (True, False):
        gate.train(training)
        before = _state(gate)
        torch.manual_seed(0)
        first = gate(inp)
        changed = _changed(before, _state(gate))
        mode = "training" if training else "evaluation"
        require_that(
            not changed,
            f"forward in {mode} changed {', '.join(changed)}; state is updated in "
            "post_optimizer_step only",
        )
        torch.manual_seed(0)
        second = gate(inp)
        same = expert_sets(first, _TOKENS) == expert_sets(second, _TOKENS)
        require_that(same, f"two forward passes in {mode} over the same tokens differ")
    if not case.is_stochastic:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        gate.train()(inp)
        require_that(
            torch.equal(state, torch.get_rng_state()),
            "forward draws random numbers; declare it with `stochastic = True`",
        )


def _state(gate: Gate) -> dict[str, Any]:
    """Return a copy of the gate's parameters, buffers and plain attributes by name."""
    state: dict[str, Any] = {
        name: tensor.detach().clone()
        for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]
    }
    for path, module in gate.named_modules():
        for name, value in vars(module).items():
            if name in _NOT_STATE:
                continue
            key = f"{path}.{name}" if path else name
            state[key] = value.detach().clone() if isinstance(value, Tensor) else repr(value)
    return state


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the entries that differ."""
    changed = []
    for name in sorted({*before, *after}):
        old = before.get(name)
        new = after.get(name)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.shape == new.shape and torch.equal(old, new)
        else:
            same = type(old) is type(new) and old == new
        if not same:
            changed.append(name)
    return changed


def check_tokens_are_independent(case: GateCase) -> None:
    """Check that a token's assignments do not depend on the other tokens.

    In a causal model a gate that looks at later tokens trains on information that generation does
    not have. Both neighbours before and after a token are changed, and left out.
    """
    gate = case.gate()
    half = _TOKENS // 2
    for training in (True, False):
        if training and case.is_stochastic:
            continue
        gate.train(training)
        alone_first = gate(_part(_input(gate, _TOKENS), slice(0, half)))
        for seed in range(3):
            together = gate(_joined(gate, half, seed))
            _require_equal_tokens(alone_first, together, 0, half, "later")
        alone_last = gate(_part(_input(gate, _TOKENS), slice(half, _TOKENS)))
        together = gate(_input(gate, _TOKENS))
        _require_equal_tokens(alone_last, together, half, _TOKENS - half, "earlier")


def _joined(gate: Gate, half: int, seed: int) -> GateInput:
    """Return the usual first half of the tokens, followed by others drawn from `seed`."""
    first = _input(gate, _TOKENS)
    other = _input(gate, _TOKENS, seed + 10)
    return GateInput(
        torch.cat([first.x_TD[:half], other.x_TD[half:]]),
        torch.cat([first.token_ids_T[:half], other.token_ids_T[half:]]),
        first.sequence_T,
        torch.cat([first.carry[:half], other.carry[half:]]),
    )


def _require_equal_tokens(
    alone: Routing, together: Routing, first: int, count: int, others: str
) -> None:
    expected = expert_sets(alone, count)
    got = expert_sets(together, _TOKENS)[first : first + count]
    for token, (a, b) in enumerate(zip(expected, got, strict=True)):
        same = [e for e, _ in a] == [e for e, _ in b]
        same = same and all(abs(x - y) <= 1e-5 * max(1, abs(x)) for (_, x), (_, y) in zip(a, b))
        require_that(
            same,
            f"the assignments of token {token} change with {others} tokens; a gate that looks at "
            "other tokens declares `sees_other_tokens = True`",
        )


def check_weights_are_differentiable(case: GateCase) -> None:
    """Compare the gradients of the weights with finite differences, parameter by parameter.

    A gate with `surrogate_gradients = True` (straight-through estimators) needs a gradient where
    the differences have one, of any value.
    """
    gate = case.gate()
    x_BSD, ids_BS = make_input(_TOKENS)
    x_TD = x_BSD[0].requires_grad_()
    carry = make_carry(gate, _TOKENS)
    sequence_T = torch.zeros(_TOKENS, dtype=torch.int64)

    def forward() -> Routing:
        torch.manual_seed(0)
        return gate(GateInput(x_TD, ids_BS[0], sequence_T, carry))

    out = forward()
    probe_A = torch.randn(len(out.weight_A), generator=torch.Generator().manual_seed(1))
    leaves = {"x_TD": x_TD, **dict(gate.named_parameters())}
    value = (out.weight_A * probe_A).sum()
    gradients: dict[str, Tensor] = {}
    if value.requires_grad:
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    for name, leaf in leaves.items():
        difference = _directional_difference(forward, leaf, probe_A, out)
        if difference is None:
            continue
        expected, direction = difference
        got = 0.0
        if name in gradients:
            got = float((gradients[name] * direction).sum())
        _require_gradient(case, name, got, expected)


def _require_gradient(case: GateCase, name: str, got: float, expected: float) -> None:
    scale = max(abs(got), abs(expected))
    if scale < 1e-3:
        return
    if case.gate_class.surrogate_gradients:
        require_that(
            got != 0, f"the weights depend on {name}, which gets no gradient from them"
        )
        return
    require_that(
        abs(got - expected) <= 0.1 * scale,
        f"the gradient of the weights by {name} is {got:.3g} along a direction in which they "
        f"change by {expected:.3g}",
    )


def _directional_difference(
    forward: Any, leaf: Tensor, probe_A: Tensor, out: Routing
) -> tuple[float, Tensor] | None:
    """Return the central difference of the probed weights, and its direction.

    None if the choices differ in between, whatever the step: the weights have no derivative there.
    """
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(leaf.shape, generator=generator)
    direction = direction / direction.norm().clamp_min(1e-12)
    original = leaf.detach().clone()
    for step in (3e-3, 3e-4):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.copy_(original + sign * step * direction)
                moved = forward()
                leaf.copy_(original)
            same = torch.equal(moved.token_A, out.token_A)
            if not same or not torch.equal(moved.expert_A, out.expert_A):
                break
            values.append(float((moved.weight_A.double() * probe_A).sum()))
        if len(values) == 2:
            return (values[0] - values[1]) / (2 * step), direction
    return None


def check_initial_weights(case: GateCase) -> None:
    """Check that initial weights depend on the seed and the layer only.

    All ranks have to draw the same gate.
    """
    first = case.gate(seed=5)
    torch.rand(3)
    second = case.gate(seed=5)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        require_that(
            torch.equal(a, b),
            f"{name} depends on torch's global random state; draw it from "
            "`context.generator()`, as make_router does",
        )


def check_state_dict(case: GateCase) -> None:
    """Check that a gate can be restored from its state dict, whose floats are fp32."""
    first = case.gate(seed=1)
    second = case.gate(seed=2)
    second.load_state_dict(first.state_dict())
    for name, tensor in first.state_dict().items():
        fp32 = not tensor.is_floating_point() or tensor.dtype == torch.float32
        require_that(
            fp32, f"{name} is {tensor.dtype}; parameters and buffers of a gate are fp32"
        )
    inp = _input(first, _TOKENS)
    same = expert_sets(first.eval()(inp), _TOKENS) == expert_sets(second.eval()(inp), _TOKENS)
    require_that(
        same,
        "a gate with the state dict of another one routes differently: it has state that is "
        "neither a parameter nor a buffer",
    )


def _input(gate: Gate, tokens: int, seed: int = 0) -> GateInput:
    x_BSD, ids_BS = make_input(tokens, seed)
    sequence_T = torch.zeros(tokens, dtype=torch.int64)
    return GateInput(x_BSD[0], ids_BS[0], sequence_T, make_carry(gate, tokens, seed))


def _part(inp: GateInput, rows: slice) -> GateInput:
    return GateInput(
        inp.x_TD[rows], inp.token_ids_T[rows], inp.sequence_T[rows], inp.carry[rows]
    )
