"""Auxiliary losses of gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.moe.routing import LoadBalancingLoss


def aux_losses(*terms: LoadBalancingLoss, extra: Tensor | float = 0.0) -> dict[str, Any]:
    """The fields `aux_loss` and `balance` of a `Routing`: what is known on this rank is added up, the rest handed on.

    Args:
        terms: balance losses; at least one, or `extra` a 0-d tensor.
        extra: other losses, coefficients applied.
    """
    aux = extra
    for term in terms:
        aux = aux + (
            term.loss() if term.scope != "global-batch" else term.count_NG.new_zeros(())
        )
    return {
        "aux_loss": aux,
        "balance": tuple(term for term in terms if term.scope == "global-batch"),
    }


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(z_t)^2 (ST-MoE, eq. 5): keeps logits small.

    Args:
        logits_TE: fp32 [T, E].
    Returns:
        0-d fp32; 0 when there are no tokens.
    """
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])
