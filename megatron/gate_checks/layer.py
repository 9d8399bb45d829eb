"""Checks of a gate in an MoE layer: values, gradients, capacity, recomputation, micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron.gate_checks.cases import (
    GateCase,
    layer_input,
    reference_layer,
    require_that,
    route,
    rows_of,
    within_capacity,
)
from megatron.moe.ffn import FFNContext
from megatron.moe.layer import MoELayer
from megatron.moe.routing import Routing

_TOKENS = 11


def check_layer_equals_reference(case: GateCase) -> None:
    """Compare the layer with a loop over the assignments, and require every gradient."""
    layer = case.layer()
    x_BSD, context = layer_input(layer, _TOKENS)
    torch.manual_seed(0)
    routing = route(layer, x_BSD, context)
    gradients = require_equals_reference(layer, x_BSD, context, routing)
    for name, gradient in gradients.items():
        require_that(bool(gradient.abs().sum() > 0), f"{name} gets no gradient")


def require_equals_reference(
    layer: MoELayer,
    x_BSD: Tensor,
    context: FFNContext,
    routing: Routing,
    dispatched: list[int] | None = None,
) -> dict[str, Tensor]:
    """Compare output and gradients with a loop over all or some of the assignments.

    Returns:
        The gradients of x and of every parameter, by name.
    """
    torch.manual_seed(0)
    out = layer(x_BSD, context)
    expected = reference_layer(layer, x_BSD[0], routing, dispatched)
    torch.testing.assert_close(out.y[0], expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = {"x": x_BSD, **dict(layer.named_parameters())}
    ours = torch.autograd.grad(
        (out.y[0] * grad).sum() + out.aux_loss, list(leaves.values()), allow_unused=True
    )
    reference = torch.autograd.grad(
        (expected * grad).sum() + routing.aux_loss, list(leaves.values()), allow_unused=True
    )
    gradients = {}
    for (name, leaf), got, want in zip(leaves.items(), ours, reference, strict=True):
        got = torch.zeros_like(leaf) if got is None else got
        want = torch.zeros_like(leaf) if want is None else want
        require_that(bool(torch.isfinite(got).all()), f"the gradient of {name} is not finite")
        _require_close(name, got, want, atol=1e-5, rtol=1e-4)
        gradients[name] = got
    return gradients


def check_capacity(case: GateCase, factor: float = 0.8) -> None:
    """Compare the layer under a capacity with the loop over the highest priorities."""
    layer = case.layer(moe_train_capacity_factor=factor, moe_min_capacity=1)
    x_BSD, context = layer_input(layer, _TOKENS)
    torch.manual_seed(0)
    routing = route(layer, x_BSD, context)
    dispatched = within_capacity(layer, routing, _TOKENS, factor)
    require_equals_reference(layer, x_BSD, context, routing, dispatched)


def check_recompute(case: GateCase) -> None:
    """Compare a layer with activation recomputation with one without.

    Outputs, gradients and counters are equal, and no buffer changes.
    """
    with_recompute = _run_once(case, recompute=True)
    without = _run_once(case, recompute=False)
    require_that(
        with_recompute.keys() == without.keys(), "recomputation changes which sums are counted"
    )
    for name, expected in without.items():
        got = with_recompute[name]
        same = got is None and expected is None
        same = same or (got is not None and expected is not None and torch.equal(got, expected))
        require_that(same, f"{name} differs with activation recomputation")


def _run_once(case: GateCase, recompute: bool) -> dict[str, Tensor | None]:
    """Return output, gradients and counters of a forward and backward pass."""
    layer = case.layer()
    x_BSD, context = layer_input(layer, _TOKENS)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()(x_BSD, context)
    layer.train()
    torch.manual_seed(0)
    if recompute:
        # With early stop the recomputed pass would end before it updates the counters.
        with set_checkpoint_early_stop(False):
            out = checkpoint(
                layer,
                x_BSD,
                context,
                use_reentrant=False,
                context_fn=layer.recompute_contexts,
            )
            (out.y.sum() + out.aux_loss).backward()
    else:
        out = layer(x_BSD, context)
        (out.y.sum() + out.aux_loss).backward()
    for name, buffer in layer.named_buffers():
        same = torch.equal(buffer, before[name])
        require_that(same, f"the buffer {name} changes in a forward pass")
    return {
        "the output": out.y.detach(),
        "the gradient of x": x_BSD.grad,
        **{f"the gradient of {name}": p.grad for name, p in layer.named_parameters()},
        **{f"the counter {name}": value for name, value in layer.counters[True].items()},
        **{f"the step's sum {name}": value for name, value in layer.step_sums.items()},
    }


def check_micro_batches(case: GateCase) -> None:
    """Compare two micro-batches with one: outputs, and the loads and tokens of the step.

    Losses may differ, because their loads are those of a micro-batch.
    """
    if case.sees_other_tokens or case.is_stochastic:
        return
    joined = case.layer()
    x_BSD, context = layer_input(joined, _TOKENS)
    expected_y = joined(x_BSD, context).y[0]
    split = case.layer()
    outputs = []
    for rows in (slice(0, 4), slice(4, _TOKENS)):
        outputs.append(split(x_BSD[:, rows], rows_of(context, rows)).y[0])
    _require_close("the output", torch.cat(outputs), expected_y, atol=1e-5, rtol=1e-4)
    for name in ("load_E", "tokens"):
        same = torch.equal(split.step_sums[name], joined.step_sums[name])
        require_that(same, f"{name} of a step depends on its split into micro-batches")


def chunked(
    case: GateCase, chunks: list[int], spread: float, moe: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run each rank's tokens as a micro-batch on one rank.

    Returns:
        Outputs, the gradient of x, and the gradients of the parameters by name.
    """
    layer = case.layer(**moe)
    x_BSD, context = layer_input(layer, sum(chunks), spread)
    weight_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(3))
    outputs = []
    start = 0
    for size in chunks:
        mine = slice(start, start + size)
        torch.manual_seed(0)
        out = layer(x_BSD[:, mine], rows_of(context, mine))
        ((out.y * weight_BSD[:, mine]).sum() + out.aux_loss).backward(retain_graph=True)
        outputs.append(out.y[0].detach())
        start += size
    return torch.cat(outputs), x_BSD.grad[0], _gradients(layer)


def _gradients(layer: MoELayer) -> dict[str, Tensor]:
    """Return the gradients of the parameters by name; zeros for those without one."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in layer.named_parameters()
    }


def _require_close(name: str, got: Tensor, want: Tensor, *, atol: float, rtol: float) -> None:
    torch.testing.assert_close(
        got, want, atol=atol, rtol=rtol, msg=lambda message: f"{name}: {message}"
    )
