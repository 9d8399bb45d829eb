"""The precision of a model outside DeepSpeed's engine."""

from __future__ import annotations

import torch
from torch import nn

from megatron.moe.layer_sums import find_moe_layers


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a model, in place, as the training engine does.

    Parameters of gates and all buffers stay as they are. (In a training with `offload_param` the
    former were cast, too.)
    """
    gates = {id(p) for layer in find_moe_layers(model) for p in layer.gate.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in gates:
            parameter.data = parameter.data.to(dtype)
