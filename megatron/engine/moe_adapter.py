"""The only file that knows DeepSpeed's mixture-of-experts bookkeeping (private API of 0.19.8).

DeepSpeed's engine sees expert parallelism only in instances of its own layers. `attach` turns the layers of a
finished model into a thin subclass of `AutoEPMoELayer` whose own forward, router and experts are not used: the class
carries the attributes that engine and ZeRO read. What its checkpoint code would read as well is not there: checkpoints
are megatron.checkpoint.saver's.
"""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from megatron.moe.layer import MoELayer
from megatron.moe.metrics import moe_layers
from megatron.moe.peer.layer import PEERLayer
from megatron.parallel.groups import Groups


class _AutoEPMixin(AutoEPMoELayer):
    """What makes a mixture layer one that DeepSpeed's engine recognises. Made by `attach`, never constructed."""

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Called by the engine after it cast the model and before it builds the optimizer.

        Which is the moment to give the gate its fp32 parameters and buffers back: ZeRO then flattens the parameters, in
        their own parameter group, as fp32.
        """
        AutoEPMoELayer.set_deepspeed_parallelism(self, *args, **kwargs)
        for tensor, original in self.fp32_gate_state:
            tensor.data = original.to(tensor.device)
        self.fp32_gate_state = []


class DeepSpeedMoELayer(MoELayer, _AutoEPMixin):
    """A `MoELayer` for the engine."""


class DeepSpeedPEERLayer(PEERLayer, _AutoEPMixin):
    """A `NeuronLayer` for the engine."""


def wrap_moe_layers(model: nn.Module, groups: Groups, *, keep_gate_fp32: bool = True) -> None:
    """Turn every mixture layer of `model`, in place, into one that the engine recognises, and mark its experts.

    Args:
        keep_gate_fp32: False for ZeRO 3, which partitions parameters of one dtype only: gate parameters are then
            stored in the engine's dtype (their master copy stays fp32) and still scored in fp32. Buffers stay fp32.
    """
    for layer in moe_layers(model):
        layer.__class__ = (
            DeepSpeedPEERLayer if isinstance(layer, PEERLayer) else DeepSpeedMoELayer
        )
        local = layer.num_experts // groups.ep_size
        layer.ep_size, layer.ep_rank, layer.num_local_experts = (
            groups.ep_size,
            groups.ep_rank,
            local,
        )
        layer.ep_group_name, layer.ep_group = f"ep_size_{groups.ep_size}", None
        layer.folding_group_handles = layer.tp_group = None
        layer.combine_impl, layer.comm_backend = "weighted_sum", "comm"
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name, parameter.is_expert_group = (
                False,
                layer.ep_group_name,
                True,
            )
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = layer.ep_group_name
        kept = [*layer.gate.buffers(), *(layer.gate.parameters() if keep_gate_fp32 else ())]
        layer.fp32_gate_state = [(t, t.detach().clone()) for t in kept]
