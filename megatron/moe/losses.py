"""Auxiliary losses of gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.moe.routing import LoadBalancingLoss, Routing


def aux_losses(*terms: LoadBalancingLoss, extra: Tensor | float = 0.0) -> dict[str, Any]:
    """Return the fields `aux_loss` and `balance` of a `Routing`.

    Losses that this rank can compute alone are summed into `aux_loss`. Those of scope
    global-batch go to `balance`: the layer adds the loads of other ranks first.

    Args:
        terms: balance losses; at least one, unless `extra` is a tensor.
        extra: 0-d sum of other losses, coefficients applied.
    """
    aux_loss = extra
    global_terms = []
    for term in terms:
        if term.scope == "global-batch":
            global_terms.append(term)
            aux_loss = aux_loss + term.count_NG.new_zeros(())
        else:
            aux_loss = aux_loss + term.loss()
    return {"aux_loss": aux_loss, "balance": tuple(global_terms)}


def entropy_loss(logits_TE: Tensor) -> Tensor:
    """Compute mean_t -sum_e p_te log p_te, which makes each token's choice sharper.

    It keeps dynamic routing from using all experts (Huang et al. 2024, eq. 6).

    Args:
        logits_TE: fp32 [T, E].
    Returns:
        0-d fp32; 0 when there are no tokens.
    """
    log_TE = logits_TE.log_softmax(-1)
    return -(log_TE.exp() * log_TE).sum() / max(1, logits_TE.shape[0])


def simbal_loss(weight_ED: Tensor) -> Tensor:
    """Compute || W W^T - 1 ||_1, which makes router rows orthogonal, of length 1.

    A router that keeps similarities of tokens sends similar ones to the same experts
    (SimBal, Omi et al. 2025). The norm is the sum over the entries; the paper writes
    R^T R with R = W^T.

    Args:
        weight_ED: router weights, a row per choice.
    Returns:
        0-d fp32.
    """
    weight_ED = weight_ED.float()
    with torch.autocast(weight_ED.device.type, enabled=False):
        gram_EE = weight_ED @ weight_ED.t()
    return (gram_EE - torch.eye(len(gram_EE), device=gram_EE.device)).abs().sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Compute mean_t logsumexp(z_t)^2 (ST-MoE, eq. 5), which keeps logits small.

    Args:
        logits_TE: fp32 [T, E].
    Returns:
        0-d fp32; 0 when there are no tokens.
    """
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


def named_losses(routing: Routing, config: Any) -> dict[str, Tensor]:
    """Return the losses of a routing that are logged by name, coefficients applied.

    These are the gate's own, and the general losses of a gate that returns its logits: the
    z-loss, if the gate has the option `z_loss_coeff` and it is not 0.

    Args:
        config: options of the gate.
    """
    losses = dict(routing.losses)
    coeff = getattr(config, "z_loss_coeff", 0.0)
    if routing.logits_TE is not None and coeff:
        assert "z_loss" not in losses, "the layer adds the z-loss of a gate with logits_TE"
        losses["z_loss"] = coeff * z_loss(routing.logits_TE)
    return losses


def reduce_over_layers(aux_loss_L: Tensor, reduction: str) -> Tensor:
    """Reduce the auxiliary losses of the MoE layers to the term that is added to the loss.

    Args:
        aux_loss_L: one value for each of L MoE layers.
        reduction: "sum", as in Megatron, DeepSpeed and the gates' papers, or "mean".
    Returns:
        0-d, in the dtype of the values.
    """
    if reduction == "mean":
        return aux_loss_L.mean()
    return aux_loss_L.sum()
