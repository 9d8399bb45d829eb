"""DeepSpeed's bookkeeping of MoE layers (private API of 0.19.8), all in this file.

DeepSpeed's engine recognises expert parallelism only in instances of its own layers.
`wrap_moe_layers` turns the MoE layers of a finished model into a thin subclass of
`AutoEPMoELayer` whose own forward, router and experts are not used: the subclass
carries the attributes that the engine and ZeRO read. DeepSpeed's checkpoint code is not
used either: `megatron.checkpoint.saver` writes the checkpoints.
"""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from megatron.moe.layer import MoELayer
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.peer.layer import PEERLayer
from megatron.parallel.groups import Groups


class _AutoEPMixin(AutoEPMoELayer):
    """Makes DeepSpeed's engine recognise an MoE layer.

    Instances are made by `wrap_moe_layers`; the constructor never runs.
    """

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Restore the gate's fp32 parameters and buffers.

        The engine calls this after it cast the model and before it builds the
        optimizer. ZeRO then flattens the gate's parameters, which are in their own
        parameter group, as fp32.
        """
        AutoEPMoELayer.set_deepspeed_parallelism(self, *args, **kwargs)
        for tensor, original in self.fp32_gate_state:
            tensor.data = original.to(tensor.device)
        self.fp32_gate_state = []


class DeepSpeedMoELayer(MoELayer, _AutoEPMixin):
    """A `MoELayer` that DeepSpeed's engine recognises."""


class DeepSpeedPEERLayer(PEERLayer, _AutoEPMixin):
    """A `PEERLayer` that DeepSpeed's engine recognises."""


def wrap_moe_layers(model: nn.Module, groups: Groups, *, keep_gate_fp32: bool = True) -> None:
    """Turn every MoE layer of `model`, in place, into one that DeepSpeed recognises.

    Args:
        keep_gate_fp32: False for ZeRO 3 with offloaded parameters, which have one dtype:
            gate parameters are then stored in the engine's dtype. Their master copy is
            fp32, scores are computed in fp32, and buffers stay fp32.
    """
    for layer in find_moe_layers(model):
        is_peer = isinstance(layer, PEERLayer)
        layer.__class__ = DeepSpeedPEERLayer if is_peer else DeepSpeedMoELayer
        _set_parallelism(layer, groups)
        _mark_experts(layer)
        fp32_state = list(layer.gate.buffers())
        if keep_gate_fp32:
            fp32_state += layer.gate.parameters()
        layer.fp32_gate_state = [(tensor, tensor.detach().clone()) for tensor in fp32_state]


def _set_parallelism(layer: MoELayer, groups: Groups) -> None:
    """Set the attributes of `AutoEPMoELayer` that the engine reads from a layer."""
    layer.ep_size = groups.ep_size
    layer.ep_rank = groups.ep_rank
    layer.num_local_experts = layer.num_experts // groups.ep_size
    layer.ep_group_name = f"ep_size_{groups.ep_size}"
    layer.ep_group = None
    layer.folding_group_handles = None
    layer.tp_group = None
    layer.combine_impl = "weighted_sum"
    layer.comm_backend = "comm"


def _mark_experts(layer: MoELayer) -> None:
    """Make ZeRO reduce the experts' gradients over their own group."""
    for parameter in layer.experts.parameters():
        parameter.allreduce = False
        parameter.group_name = layer.ep_group_name
        parameter.is_expert_group = True
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = layer.ep_group_name
