"""A model in the precision of training, without DeepSpeed and without an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.model.precision import cast_parameters


class EvaluationModel(nn.Module):
    """Runs a model as DeepSpeed's engine does under ZeRO 1 and 2: gates stay in fp32.

    Args:
        model: an fp32 model on the CPU; it is moved and cast.
        dtype: of all parameters but those of gates; buffers keep theirs.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.module = model
        cast_parameters(model, dtype)
        model.to(device)

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)
