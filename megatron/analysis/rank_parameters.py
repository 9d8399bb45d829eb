"""The parameters of one rank in the optimizer's groups, as ZeRO divides them over ranks.

Sizes are numbers of elements. They are taken from a model on `meta`, so DeepSpeed is not imported:
the groups are those of `megatron.engine.optimizer.parameter_groups`, which a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron.config.schema import RunConfig
from megatron.engine.ds_config import bucket_size, deepspeed_config
from megatron.model.builder import build_run_config_model
from megatron.model.gpt import GPT
from megatron.model.meta_device import meta_device
from megatron.moe.experts.backends import COMPUTE_DTYPES
from megatron.moe.experts.expert_type import ExpertType
from megatron.moe.layer_sums import find_moe_layers
from megatron.parallel.groups import Groups


@dataclass(frozen=True)
class Topology:
    """Where a run is planned to run. The rest is in its flags, such as --zero-stage."""

    world_size: int = 1
    """number of ranks"""
    device: str = "cuda"
    """type of the ranks' devices: cuda or cpu"""

    def groups(self, config: RunConfig) -> Groups:
        """Return rank 0's place, without process groups.

        Raises:
            ValueError: --moe-expert-parallel-size does not divide the number of ranks.
        """
        ep_size = config.moe.moe_expert_parallel_size
        if self.world_size % ep_size:
            raise ValueError(
                f"--moe-expert-parallel-size is {ep_size}; allowed: a divisor of the "
                f"{self.world_size} ranks. Plan for another number of them or change it"
            )
        return Groups(world_size=self.world_size, ep_size=ep_size)


@dataclass(frozen=True)
class ParameterGroupSize:
    """An optimizer group on one rank: ZeRO flattens it and gives each rank an equal part."""

    name: str
    numels: tuple[int, ...]
    """elements of each parameter, in order"""
    itemsize: int
    """bytes of an element in the model"""
    is_expert: bool
    ranks: int
    """ranks that hold the same parameters and divide their optimizer state"""

    @property
    def total(self) -> int:
        """Elements without padding."""
        return sum(self.numels)

    @property
    def shard(self) -> int:
        """Elements of a rank's part, of the flattened group padded as DeepSpeed does."""
        unit = 2 * self.ranks
        return math.ceil(self.total / unit) * 2

    @property
    def shard_in_full_parameters(self) -> int:
        """Most elements on a rank of the parameters that have any element in its part."""
        most = 0
        for rank in range(self.ranks):
            first = rank * self.shard
            start = 0
            covered = 0
            for numel in self.numels:
                if start < first + self.shard and start + numel > first:
                    covered += numel
                start += numel
            most = max(most, covered)
        return most


@dataclass(frozen=True)
class RankParameters:
    """All parameters of one rank."""

    groups: tuple[ParameterGroupSize, ...]
    blocks: tuple[tuple[tuple[int, int, int], ...], ...]
    """of each module that ZeRO 3 gathers together, in the order of the forward pass, the
    parameters' (elements, itemsize, ranks)"""

    def elements(self, is_expert: bool | None = None) -> int:
        """Number of elements; None: of experts and others."""
        chosen = [g for g in self.groups if is_expert in (None, g.is_expert)]
        return sum(g.total for g in chosen)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights on a rank that holds all of them."""
        return sum(g.total * g.itemsize for g in self.groups)

    @property
    def shard(self) -> int:
        """Elements of this rank's part of all groups."""
        return sum(g.shard for g in self.groups)

    @property
    def largest_shard(self) -> int:
        """Elements of this rank's part of the largest group."""
        return max(g.shard for g in self.groups)

    @property
    def shard_in_full_parameters(self) -> int:
        """See `ParameterGroupSize`."""
        return sum(g.shard_in_full_parameters for g in self.groups)


@dataclass(frozen=True)
class ZeroOptions:
    """What of DeepSpeed's options decides memory and communication."""

    stage: int
    reduce_bucket_size: int
    """elements"""
    overlap_comm: bool
    persistence_threshold: int
    """ZeRO 3: parameters with fewer elements are not divided"""
    max_reuse_distance: int
    """ZeRO 3: parameters stay gathered if they are used again within so many elements"""
    prefetch_bucket_size: int
    offload_optimizer: bool
    offload_param: bool


def zero_options(config: RunConfig, world_size: int, parameters: RankParameters) -> ZeroOptions:
    """Return the options that the flags and --deepspeed-config set, and DeepSpeed's defaults.

    Raises:
        ValueError: the batch does not divide over the ranks, or the file is not valid.
    """
    merged = deepspeed_config(config.optimizer, config.deepspeed, config.train, world_size)
    options = merged["zero_optimization"]
    stage = options["stage"]
    bucket = bucket_size(parameters.elements())
    return ZeroOptions(
        stage=stage,
        reduce_bucket_size=int(options.get("reduce_bucket_size", bucket)),
        overlap_comm=bool(options.get("overlap_comm", stage == 3)),
        persistence_threshold=int(options.get("stage3_param_persistence_threshold", 1e5)),
        max_reuse_distance=int(options.get("stage3_max_reuse_distance", 1e9)),
        prefetch_bucket_size=int(options.get("stage3_prefetch_bucket_size", 5e7)),
        offload_optimizer=_is_offloaded(options, "offload_optimizer"),
        offload_param=_is_offloaded(options, "offload_param"),
    )


def _is_offloaded(options: dict, name: str) -> bool:
    return options.get(name, {}).get("device", "none") not in ("none", None)


def meta_model(config: RunConfig, vocab_size: int, topology: Topology) -> GPT:
    """Build a rank's model on `meta`, in the dtypes of training.

    Args:
        vocab_size: before padding.
    """
    with meta_device():
        model = build_run_config_model(config, vocab_size, topology.groups(config))
    return model.to(COMPUTE_DTYPES[config.optimizer.precision])


def rank_parameters(model: GPT, topology: Topology, ep_size: int) -> RankParameters:
    """Return the groups of a model on `meta`."""
    experts = _expert_parameters(model)
    members: dict[tuple[bool, str], list[nn.Parameter]] = {}
    names = list(_group_names(model))
    order = dict.fromkeys(("matrices", "vectors", "gates", *(name for name, _ in names)))
    for is_expert in (False, True):
        for group in order:
            for name, parameter in names:
                if name == group and (id(parameter) in experts) == is_expert:
                    members.setdefault((is_expert, group), []).append(parameter)
    groups = []
    for (is_expert, name), parameters in members.items():
        ranks = topology.world_size // (ep_size if is_expert else 1)
        numels = tuple(p.numel() for p in parameters)
        groups.append(
            ParameterGroupSize(name, numels, parameters[0].itemsize, is_expert, ranks)
        )
    return RankParameters(tuple(groups), _gathered_together(model, topology, ep_size, experts))


def _expert_parameters(model: GPT) -> set[int]:
    found: set[int] = set()
    for layer in find_moe_layers(model):
        found |= {id(p) for p in layer.experts.parameters()}
    return found


def _group_names(model: GPT) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the optimizer group of each trained parameter, in the model's order."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    vectors = set()
    gates = {}
    for layer in find_moe_layers(model):
        if isinstance(layer.experts, ExpertType):
            vectors |= {id(p) for p in layer.experts.parameters() if p.dim() < 3}
        gates |= {id(p): "gates" for p in layer.gate.parameters()}
        for group in layer.gate.parameter_groups():
            name = f"gates, lr x{group.lr_scale:g}, weight decay {group.weight_decay:g}"
            gates |= {id(p): name for p in group.params}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in gates:
            yield gates[id(p)], p
        elif p.dim() < 2 or id(p) in embeddings or id(p) in vectors:
            yield "vectors", p
        else:
            yield "matrices", p


def _gathered_together(
    model: GPT, topology: Topology, ep_size: int, experts: set[int]
) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    modules = [model.embed_tokens, model.embed_positions, *model.layers, model.norm]
    if model.config.untie_embeddings_and_output_weights:
        modules.append(model.lm_head)
    blocks = []
    for module in modules:
        if module is None:
            continue
        parameters = []
        for p in module.parameters():
            ranks = topology.world_size // (ep_size if id(p) in experts else 1)
            parameters.append((p.numel(), torch.finfo(p.dtype).bits // 8, ranks))
        blocks.append(tuple(parameters))
    return tuple(blocks)
