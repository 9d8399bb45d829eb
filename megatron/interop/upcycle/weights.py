"""The tensors of an upcycled model, read by ranges: made from the dense model when they are read.

Memory: the dense feed-forward layer of one block and one expert. A tensor's values depend on the
dense weights, the options and the seed only, not on the ranges in which it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.checkpoint.weights_only import WeightsSource
from megatron.interop.hf.weights import ReadRange
from megatron.interop.upcycle.dense_ffn import DenseFFN, FFNStatistics
from megatron.interop.upcycle.experts import ExpertChange, seeded
from megatron.interop.upcycle.flags import UpcycleRequest
from megatron.interop.upcycle.gates import (
    StartWeights,
    build_gate,
    repeat_router_rows,
    set_router_centres,
    start_weights,
)
from megatron.interop.upcycle.split import NeuronGroups, expert_centres, split_neurons
from megatron.io.safetensors_writer import TensorSpec
from megatron.model.gpt import GPT
from megatron.moe.experts.activations import is_gated
from megatron.moe.gate import Gate

_MOE_TENSOR = re.compile(r"layers\.(\d+)\.mlp\.(gate|experts|shared|shared_gate)\.(.+)")
_EXPERT_MATRICES = {"w1": "first_WD", "w3": "up_WD", "w2": "down_DW"}
_SHARED_MATRICES = {"up_proj.weight": "up_WD", "down_proj.weight": "down_DW"}


@dataclass(frozen=True)
class _Expert:
    """The expert that was read last."""

    layer: int
    number: int
    weights: DenseFFN


class UpcycledWeights:
    """Tensors of the MoE model.

    Args:
        request: what the model is.
        model: the MoE model, which may be on `meta`.
        read_dense: reads ranges of the dense model's tensors.
        weight_scales: factor of the experts' down projections, by the name of the gate.
        statistics: of the blocks whose layers are replaced, if the options need them.
    """

    def __init__(
        self,
        request: UpcycleRequest,
        model: GPT,
        read_dense: ReadRange,
        weight_scales: Mapping[str, float],
        statistics: Mapping[int, FFNStatistics] | None = None,
    ):
        self.request = request
        self.model = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._read_dense = read_dense
        self._weight_scales = weight_scales
        self._statistics = statistics or {}
        self._layers = set(request.moe_layers)
        self._gates: dict[int, Gate] = {}
        self._groups: dict[int, NeuronGroups] = {}
        self._dense: tuple[int, DenseFFN] | None = None
        self._expert: _Expert | None = None

    def source(self) -> WeightsSource:
        """Return the tensors as a checkpoint of weights stores them."""
        specs = {}
        for name, buffer in self.model.state_dict().items():
            if name not in self.shapes:
                specs[name] = TensorSpec(name, buffer.dtype, tuple(buffer.shape))
        return WeightsSource(self.shapes, specs, self.read, self.buffer)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of a flattened parameter: fp32 [length]."""
        found = _MOE_TENSOR.fullmatch(name)
        if found is None or int(found[1]) not in self._layers:
            return self._read_dense(name, start, length).float()
        layer = int(found[1])
        if found[2] == "experts":
            return self._read_experts(layer, name, found[3], start, length)
        if found[2] == "gate":
            full = self._gate(layer).state_dict()[found[3]]
        elif found[2] == "shared":
            full = self._shared(layer, found[3])
        else:
            full = torch.zeros(self.shapes[name])
        return full.reshape(-1)[start : start + length].float()

    def buffer(self, name: str) -> Tensor:
        """Return a buffer, which only gates have."""
        _, layer, _, gate, key = name.split(".", 4)
        assert gate == "gate", f"{name} is no buffer of a gate"
        return self._gate(int(layer)).state_dict()[key]

    def start_weights(self) -> dict[str, StartWeights]:
        """Return the range of the slices' weights in the first block of each gate.

        Raises:
            ValueError: a gate does not fit the options.
        """
        found = {}
        for layer in self.request.moe_layers:
            name = self._gate_name(layer)
            if name not in found:
                scale = self._weight_scales[name]
                gate = self._gate(layer)
                found[name] = start_weights(gate, self.request.num_slices, scale)
        return found

    def groups(self, layer: int) -> NeuronGroups:
        """Return the neurons of the slices of a block, and those of its shared expert."""
        if layer not in self._groups:
            self._groups[layer] = self._divide(layer)
        return self._groups[layer]

    def _divide(self, layer: int) -> NeuronGroups:
        options = self.request.options
        ffn = self._dense_ffn(layer)
        strategy = options.strategy if options.is_split else "sequential"
        return split_neurons(
            strategy,
            ffn,
            self.request.num_slices,
            options.shared_neurons,
            seeded(f"{self._seed}.{layer}.split"),
            self._statistics.get(layer),
        )

    @property
    def _seed(self) -> int:
        return self.request.config.train.seed

    def _dense_ffn(self, layer: int) -> DenseFFN:
        if self._dense is None or self._dense[0] != layer:
            self._dense = None  # frees its memory first, and that of the expert made from it
            self._expert = None
            model = self.request.config.model
            sizes = (model.hidden_size, self.request.dense_width)
            ffn = DenseFFN.read(self._read_dense, layer, *sizes, is_gated(model.act))
            self._dense = (layer, ffn)
        return self._dense[1]

    def _read_experts(
        self, layer: int, name: str, matrix: str, start: int, length: int
    ) -> Tensor:
        """Read a range of a stack of experts. Biases, which dense layers lack, are 0."""
        if matrix not in _EXPERT_MATRICES:
            return torch.zeros(length)
        size = math.prod(self.shapes[name][1:])
        parts = []
        stop = start + length
        while start < stop:
            number, first = divmod(start, size)
            count = min(size - first, stop - start)
            weight = getattr(self._expert_weights(layer, number), _EXPERT_MATRICES[matrix])
            parts.append(weight.reshape(-1)[first : first + count])
            start += count
        return torch.cat(parts) if parts else torch.empty(0)

    def _expert_weights(self, layer: int, number: int) -> DenseFFN:
        current = self._expert
        if current is None or (current.layer, current.number) != (layer, number):
            current = None
            self._expert = None  # frees its memory first
            options = self.request.options
            scale = self._weight_scales[self._gate_name(layer)]
            change = ExpertChange(options.noise_std, options.drop_ratio, scale)
            neurons = self.groups(layer).experts_EM[number % self.request.num_slices]
            expert = self._dense_ffn(layer).take(neurons)
            key = f"{self._seed}.{layer}.{number}"
            self._expert = _Expert(layer, number, change.apply(expert, key))
        return self._expert.weights

    def _shared(self, layer: int, name: str) -> Tensor:
        """Return a matrix of the shared expert.

        A gate on its output is 0 at the start, and its sigmoid 1/2: the down projection is twice as
        large.
        """
        shared = self._dense_ffn(layer).take(self.groups(layer).shared_N)
        if name == "gate_proj.weight" or (name == "up_proj.weight" and shared.up_WD is None):
            return shared.first_WD
        if name == "down_proj.weight" and self.request.config.moe.moe_shared_expert_gate:
            return 2 * shared.down_DW
        return getattr(shared, _SHARED_MATRICES[name])

    def _gate_name(self, layer: int) -> str:
        return self.request.config.moe.gate_of(layer)

    def _gate(self, layer: int) -> Gate:
        if layer not in self._gates:
            gate = build_gate(self.model.layers[layer].mlp.gate)
            if self.request.options.granularity > 1:
                repeat_router_rows(gate, self.request.options.granularity)
            if self.request.options.router_init == "centroids":
                ffn = self._dense_ffn(layer)
                groups = self.groups(layer)
                centre_ED = expert_centres(groups, ffn, self._statistics.get(layer))
                set_router_centres(gate, centre_ED)
            self._gates[layer] = gate
        return self._gates[layer]
