"""A model for inference: the dtypes of training without an engine."""

from __future__ import annotations

import torch

from megatron.log import get_logger
from megatron.model.gpt import GPT
from megatron.model.precision import cast_parameters
from megatron.moe.experts.backends import COMPUTE_DTYPES


def cast_for_inference(model: GPT, precision: str, device: torch.device) -> GPT:
    """Move a finished fp32 model to a device and cast it as the training engine does.

    Args:
        precision: of the training: fp32, bf16 or fp16. CPUs compute fp32 instead of fp16.

    Returns:
        The same model, in evaluation mode.
    """
    dtype = COMPUTE_DTYPES[precision]
    if dtype == torch.float16 and device.type == "cpu":
        get_logger().info("the model was trained in fp16; it runs in fp32 on the CPU")
        dtype = torch.float32
    cast_parameters(model, dtype)
    return model.to(device).eval()
