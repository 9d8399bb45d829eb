"""Checks of a gate on several ranks: experts sharded over two ranks equal one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.gate_checks.cases import GateCase, layer_input, require_that, rows_of
from megatron.gate_checks.layer import chunked
from megatron.parallel.rank_pool import RankPool, groups_for

NEAR_TIES = 0.01


def check_sharded(
    case: GateCase,
    ranks: RankPool,
    chunks: list[int],
    spread: float = 1.0,
    moe: dict[str, Any] | None = None,
) -> None:
    """Compare a layer whose experts are sharded over ranks with one rank.

    Outputs, the gradient of the hidden states and those of all parameters are compared.

    Args:
        ranks: as many as there are chunks.
        chunks: number of tokens of each rank.
        spread: see `layer_input`.
        moe: fields of MoEConfig, such as a capacity factor.
    """
    moe = moe or {}
    y, x_grad, gradients = chunked(case, chunks, spread, moe)
    for name, tensor in {"the output": y, "the gradient of x": x_grad, **gradients}.items():
        require_that(bool(torch.isfinite(tensor).all()), f"{name} is NaN or infinite")
    results = ranks.run(_run_sharded, case, chunks, spread, moe)
    _require_close("the output", torch.cat([result["y"] for result in results]), y)
    _require_close("the gradient of x", torch.cat([result["x"] for result in results]), x_grad)
    for name, expected in gradients.items():
        parts = [result["gradients"][name] for result in results]
        total = torch.cat(parts) if name.startswith("experts.") else sum(parts)
        _require_close(f"the gradient of {name}", total, expected)


def _run_sharded(
    case: GateCase, chunks: list[int], spread: float, moe: dict[str, Any]
) -> dict[str, Any]:
    """Return outputs and gradients of this rank; gradients add up over ranks."""
    case.import_files()
    groups = groups_for(len(chunks))
    layer = case.layer(groups, **moe)
    start = sum(chunks[: groups.rank])
    x_BSD, context = layer_input(layer, sum(chunks), spread)
    weight_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(3))
    mine = slice(start, start + chunks[groups.rank])
    x_BSD = x_BSD[:, mine].detach().requires_grad_()
    torch.manual_seed(0)
    out = layer(x_BSD, rows_of(context, mine))
    ((out.y * weight_BSD[:, mine]).sum() + out.aux_loss).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in layer.named_parameters()
    }
    return {"y": out.y[0].detach(), "x": x_BSD.grad[0], "gradients": gradients}


def _require_close(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(
        got,
        want,
        atol=1e-5,
        rtol=1e-5,
        msg=lambda message: f"{name} differs from that of one rank: {message}",
    )
