"""Training of the tiny model in one process with torch's own optimizer."""

from __future__ import annotations

import torch
from torch import nn

from helpers import engines
from megatron.config.schema import RunConfig
from megatron.parallel.groups import Groups


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has weight decay."""
    return parameter.dim() > 1 and "embed" not in name and ".gate." not in name


def reference_training(
    config: RunConfig, steps: int, frozen: str = "$^"
) -> tuple[list[float], float, dict]:
    """Train with torch's AdamW in one process.

    Args:
        frozen: regular expression for the names of parameters that are not trained.
    Returns:
        Losses, the gradient norm of the last step before clipping, and the final parameters.
    """
    model = engines.build(config)
    engines.freeze(model, frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": config.optimizer.weight_decay * decays(name, p)}
            for name, p in trained.items()
        ],
        lr=0.02,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
    )
    losses = []
    for step in range(steps):
        outputs = [
            model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
            for batch in engines.micro_batches(step, Groups())
        ]
        (sum(out.loss for out in outputs) / len(outputs)).backward()
        losses.append(float(sum(out.lm_loss.detach() for out in outputs) / len(outputs)))
        norm = nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return losses, float(norm), {n: p.detach() for n, p in model.named_parameters()}
