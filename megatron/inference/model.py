"""A model for inference: the dtypes of training without an engine."""

from __future__ import annotations

import torch

from megatron.log import get_logger
from megatron.model.gpt import GPT
from megatron.moe.experts.backends import COMPUTE_DTYPES
from megatron.moe.layer_sums import find_moe_layers


def cast_for_inference(model: GPT, precision: str, device: torch.device) -> GPT:
    """Move a finished fp32 model to a device and cast it as the training engine does.

    Gates stay fp32. (In a training with `offload_param` their parameters were cast, too.)

    Args:
        precision: of the training: fp32, bf16 or fp16. CPUs compute fp32 instead of fp16.

    Returns:
        The same model, in evaluation mode.
    """
    dtype = COMPUTE_DTYPES[precision]
    if dtype == torch.float16 and device.type == "cpu":
        get_logger().info("the model was trained in fp16; it runs in fp32 on the CPU")
        dtype = torch.float32
    fp32_state = []
    for layer in find_moe_layers(model):
        fp32_state += layer.gate.buffers()
        fp32_state += layer.gate.parameters()
    originals = [tensor.detach().clone() for tensor in fp32_state]
    model.to(device, dtype)
    for tensor, original in zip(fp32_state, originals, strict=True):
        tensor.data = original.to(device)
    return model.eval()
