"""A tiny model with the gate, trained in this rank by the engine or in plain torch.

Its data is a noisy sequence in which each token follows from the one before, so that a working
model learns within a few dozen steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.schema import (
    CheckpointConfig,
    DeepSpeedConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron.gate_checks.cases import GateCase
from megatron.moe.gate_registry import import_gate_files
from megatron.parallel.groups import Groups, all_reduce_mean

VOCAB_SIZE = 61
GLOBAL_BATCH = 4
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=16,
    activation="swiglu",
    ffn_hidden_size=24,
    init_method_std=0.3,
    make_vocab_size_divisible_by=1,
    vocab_size=VOCAB_SIZE,
)
# A large epsilon keeps Adam smooth: with a tiny one, a gradient of rounding size would
# move a weight by the full learning rate. Where weights are compared it is larger still, for
# gates with steep functions (blockffn).
SMOOTH_EPS = 1e-2
OPTIMIZER = OptimizerConfig(lr=0.02, adam_eps=1e-3, clip_grad=0.5, weight_decay=0.1)
IDENTITY = {
    "tokenizer_name": "none",
    "tokenizer_vocab_size": 61,
    "tokenizer_fingerprint": "none",
}


@dataclass(frozen=True)
class Curve:
    """What a training showed, step by step."""

    losses: list[float] = field(default_factory=list)
    """cross-entropy in nats, the mean over ranks"""
    grad_norms: list[float] = field(default_factory=list)
    """global gradient norm before clipping"""
    load_imbalance: list[float] = field(default_factory=list)
    """load_imbalance_max_over_mean"""
    experts_per_token: list[float] = field(default_factory=list)


def run_config(
    case: GateCase,
    *,
    ep_size: int = 1,
    zero_stage: int = 1,
    adam_eps: float = OPTIMIZER.adam_eps,
    **checkpoint: str,
) -> RunConfig:
    """Return the configuration of a tiny run.

    Args:
        checkpoint: fields of CheckpointConfig.
    """
    moe = MoEConfig(
        num_experts=case.num_experts,
        gate=case.name,
        moe_ffn_hidden_size=8,
        moe_expert_parallel_size=ep_size,
    )
    return RunConfig(
        MODEL,
        moe,
        optimizer=replace(OPTIMIZER, adam_eps=adam_eps),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),
        gate_options={case.name: case.options},
        train=TrainConfig(micro_batch_size=1, global_batch_size=GLOBAL_BATCH),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def build(config: RunConfig, groups: Groups) -> nn.Module:
    """Build this rank's part of the model."""
    from megatron.model.builder import build_model

    return build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=VOCAB_SIZE,
        seed=7,
        groups=groups,
        attention=config.attention,
        rotary=config.rotary,
    )


def micro_batches(step: int, groups: Groups) -> list:
    """Return this rank's micro-batches of a step; all ranks together always see the same."""
    from megatron.data.loader import Batch

    generator = torch.Generator().manual_seed(step)
    length = MODEL.seq_length
    batches = []
    for _ in range(GLOBAL_BATCH):
        ids = torch.randint(0, VOCAB_SIZE, (1, length + 1), generator=generator)
        is_noise = torch.rand(length + 1, generator=generator) < 0.1
        for i in range(1, length + 1):
            if not is_noise[i]:
                ids[0, i] = (3 * ids[0, i - 1] + 7) % VOCAB_SIZE
        batches.append(Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, length), None, None))
    return batches[groups.rank :: groups.world_size]


class TinyRun:
    """An engine, its progress and its checkpoints; resumed if the configuration has `load`."""

    identity = IDENTITY
    """tokenizer that the checkpoints record"""

    def __init__(self, config: RunConfig):
        from megatron.checkpoint import loader
        from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
        from megatron.checkpoint.saver import Checkpointer
        from megatron.engine import distributed
        from megatron.engine.engine import Engine

        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=rank)
        self.groups = groups = distributed.init_distributed(config.moe.moe_expert_parallel_size)
        self.source = loader.find_checkpoint(config.checkpoint, groups)
        model = self.build_model(config)
        topology = {
            "ranks": groups.world_size,
            "expert_parallel_size": groups.ep_size,
            "zero_stage": config.deepspeed.zero_stage,
            "precision": config.optimizer.precision,
        }
        metadata = RunMetadata(config, self.identity, topology, GLOBAL_BATCH, 100)
        if self.source:
            self.source.check(metadata)
            self.source.load_weights(model, groups)
        self.change_model(model)
        self.engine = Engine(model, config.optimizer, config.deepspeed, config.train, groups)
        self.progress = TrainingProgress()
        if self.source:
            self.progress = self.source.restore(self.engine, groups)
        self.checkpoints = Checkpointer(
            config.checkpoint, self.engine, metadata, groups, self.source
        )

    def build_model(self, config: RunConfig) -> nn.Module:
        """Build this rank's part of the model."""
        return build(config, self.groups)

    def change_model(self, model: nn.Module) -> None:
        """Change a model that has its weights before the engine gets it; here nothing."""

    def steps(self, number: int, curve: Curve) -> None:
        """Train so many more steps, and add them to a curve."""
        from megatron.training.task import LM_LOSS, NextTokenLoss

        for _ in range(number):
            batches = micro_batches(self.progress.iteration, self.groups)
            losses = self.engine.step(batches, NextTokenLoss(), OPTIMIZER.lr, 0.0)
            curve.losses.append(all_reduce_mean(float(losses[LM_LOSS]), self.groups))
            curve.grad_norms.append(self.engine.grad_norm())
            metrics = self.engine.metrics.read()
            curve.load_imbalance.append(metrics["load_imbalance_max_over_mean"])
            curve.experts_per_token.append(metrics["experts_per_token"])
            self.progress.iteration += 1
            self.checkpoints.poll()

    def save(self) -> None:
        """Write a checkpoint and wait for it."""
        self.checkpoints.save(self.progress)
        self.checkpoints.finish()

    def close(self) -> None:
        """Close the directory of the checkpoints."""
        self.checkpoints.__exit__()


def train_in_rank(
    config: RunConfig, gate_paths: tuple[str, ...], steps: int, more: int = 0
) -> Curve:
    """Train in a rank; with `save` in the configuration, write a checkpoint after `steps` steps
    and another one at the end.

    Args:
        gate_paths: files that register gates.
        more: steps after the first checkpoint.
    """
    import_gate_files(gate_paths)
    run = TinyRun(config)
    curve = Curve()
    try:
        for number in (steps, more):
            run.steps(number, curve)
            if number and config.checkpoint.save:
                run.save()
        return curve
    finally:
        run.close()


def saved_tensors(folder: Path, iteration: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint: "weight/<name>", "exp_avg/<name>", "buffer/<name>"."""
    from megatron.checkpoint.directory import checkpoint_name
    from megatron.checkpoint.shards import CheckpointReader

    reader = CheckpointReader(folder / checkpoint_name(iteration))
    tensors = {}
    for key in reader.state_keys:
        for name, shape in reader.shapes.items():
            tensors[f"{key}/{name}"] = reader.read(key, name).view(shape)
    for name in reader.buffers:
        tensors[f"buffer/{name}"] = reader.buffer(name)
    return tensors


def train_in_plain_torch(config: RunConfig, steps: int) -> tuple[Curve, dict[str, Tensor]]:
    """Train in this process without DeepSpeed and without sharding: the reference.

    Returns:
        The curve, and the final tensors by the names of `saved_tensors`.
    """
    from megatron.engine.optimizer import parameter_groups
    from megatron.moe.gate_update import GateUpdater

    groups = Groups()
    model = build(config, groups)
    gate_updater = GateUpdater(model, groups)
    options = config.optimizer
    adamw = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
    )
    curve = Curve()
    for step in range(steps):
        total = 0.0
        for batch in micro_batches(step, groups):
            out = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
            (out.loss / GLOBAL_BATCH).backward()
            total += out.lm_loss.item() / GLOBAL_BATCH
        curve.losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        curve.grad_norms.append(float(norm))
        adamw.step()
        adamw.zero_grad()
        gate_updater.post_optimizer_step()
    weights = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    buffers = {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    return curve, {**weights, **buffers}
