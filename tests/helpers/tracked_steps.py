"""Training steps of the real engine in a rank, with their live tensors and collectives recorded."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.schema import (
    DeepSpeedConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

COLLECTIVES = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::alltoall_base_": "all-to-all",
}


def planned_run(
    gate: str = "topk",
    *,
    world_size: int = 1,
    ep_size: int = 1,
    zero_stage: int = 1,
    bf16: bool = True,
    micro_batches: int = 1,
    seq_length: int = 128,
    num_experts: int = 8,
    width: int = 128,
    num_layers: int = 2,
    recompute: bool = False,
    dropout: float = 0.0,
    reduce_in_bf16: bool = False,
    options: dict[str, Any] | None = None,
    **moe: Any,
) -> RunConfig:
    """Return the configuration of a run whose weights and activations are both a few MB.

    Args:
        gate: empty: a dense model.
        moe: fields of MoEConfig.
    """
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=128,
        num_attention_heads=4,
        seq_length=seq_length,
        vocab_size=2048,
        make_vocab_size_divisible_by=1,
        activation="swiglu",
        ffn_hidden_size=512,
        hidden_dropout=dropout,
    )
    experts = MoEConfig()
    if gate:
        experts = MoEConfig(
            num_experts=num_experts,
            gate=gate,
            moe_ffn_hidden_size=width,
            moe_expert_parallel_size=ep_size,
            **moe,
        )
    train = TrainConfig(
        micro_batch_size=2,
        global_batch_size=2 * micro_batches * world_size,
        recompute_activations=recompute,
    )
    return RunConfig(
        model,
        experts,
        optimizer=OptimizerConfig(bf16=bf16, grad_reduce_in_bf16=reduce_in_bf16),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),
        train=train,
        gate_options={gate: options} if options else {},
    )


class _Collectives(TorchDispatchMode):
    """Adds up the bytes of collectives among more than one rank."""

    def __init__(self):
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._add(COLLECTIVES[func._schema.name], args)
        return func(*args, **(kwargs or {}))

    def _add(self, collective: str, args: Any) -> None:
        tensors = []
        ranks = 0
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
                tensors += arg
            elif "ProcessGroup" in str(getattr(arg, "_type", lambda: "")()):
                ranks = dist.ProcessGroup.unbox(arg).size()
        # The result comes first; for a reduce-scatter and an all-to-all the input counts.
        is_input = collective in ("reduce-scatter", "all-to-all")
        if ranks > 1:
            self.sizes[collective] += tensors[is_input].nbytes


def _engine_and_steps(config: RunConfig) -> tuple[Any, Callable[[], None]]:
    from megatron.data.loader import Batch
    from megatron.engine import distributed
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_run_config_model
    from megatron.training.task import NextTokenLoss

    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=rank)
    groups = distributed.init_distributed(config.moe.moe_expert_parallel_size)
    model = build_run_config_model(config, config.model.vocab_size, groups)
    engine = Engine(model, config.optimizer, config.deepspeed, config.train, groups)
    size = config.train.micro_batch_size
    number = config.train.global_batch(groups.world_size) // size // groups.world_size
    generator = torch.Generator().manual_seed(groups.rank)
    shape = (size, config.model.seq_length + 1)

    def step() -> None:
        batches = []
        for _ in range(number):
            ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
            mask = torch.ones(size, config.model.seq_length)
            batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, None, None))
        engine.step(batches, NextTokenLoss(), 1e-4, 0.0)

    return engine, step


def peak_of_second_step(config: RunConfig) -> tuple[int, float]:
    """Return the most bytes of tensors alive in the second step, and its experts per token.

    Memory that is kept for reuse does not count: the host allocator is off.
    """
    from megatron import host_allocator
    from megatron.analysis.live_memory import LiveMemory

    memory = LiveMemory()
    from_numpy = torch.from_numpy

    def counted(array: Any) -> Tensor:
        tensor = from_numpy(array)
        memory.add(tensor)
        return tensor

    no_reuse = mock.patch.object(host_allocator, "_MIN_CACHED_BYTES", 2**60)
    with no_reuse, mock.patch.object(torch, "from_numpy", counted), memory:
        engine, step = _engine_and_steps(config)
        step()
        engine.metrics.read()
        gc.collect()
        memory.reset_peak()
        step()
        metrics = engine.metrics.read()
        return memory.peak, metrics.get("experts_per_token", 0.0)


def collectives_of_a_step(config: RunConfig) -> tuple[dict[str, int], float]:
    """Return the bytes of each kind of collective in the third step, and its experts per token.

    In the two steps before, ZeRO 3 learns and compares the order of the modules. Metrics are not
    part of a step.
    """
    engine, step = _engine_and_steps(config)
    step()
    step()
    engine.metrics.read()
    recorded = _Collectives()
    with recorded:
        step()
    metrics = engine.metrics.read()
    return dict(recorded.sizes), metrics.get("experts_per_token", 0.0)
