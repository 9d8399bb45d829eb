"""Engines of a tiny MoE model in a rank of the pool, and what saving and resuming them needs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from megatron.config.schema import (
    CheckpointConfig,
    DeepSpeedConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron.gate_checks import tiny_run
from megatron.gate_checks.tiny_run import GLOBAL_BATCH, TinyRun
from megatron.parallel.groups import Groups

MODEL = replace(tiny_run.MODEL, seq_length=8)
OPTIONS = {
    "remoe": {"lambda_init": 0.1},
    "deepseek_v3": {"bias_update_speed": 0.07},
    "peer": {"peer_num_heads": 2, "peer_topk": 2, "peer_query_size": 8},
}
IDENTITY = {"tokenizer_name": "t", "tokenizer_vocab_size": 61, "tokenizer_fingerprint": "f"}


def config_of(
    gate: str, ep_size: int, stage: int, precision: str = "fp32", **checkpoint
) -> RunConfig:
    """A dense model when `gate` is empty. `checkpoint` are fields of CheckpointConfig."""
    num_experts = 16 if gate == "peer" else 4
    moe = (
        MoEConfig(
            num_experts=num_experts,
            gate=gate,
            moe_ffn_hidden_size=8,
            moe_expert_parallel_size=ep_size,
            check_routing=True,
            moe_shared_experts=0 if gate == "peer" else 1,
        )
        if gate
        else MoEConfig()
    )
    optimizer = OptimizerConfig(
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        lr=0.02,
        adam_eps=1e-3,
        clip_grad=0.5,
    )
    return RunConfig(
        MODEL,
        moe,
        optimizer=optimizer,
        deepspeed=DeepSpeedConfig(zero_stage=stage),
        gate_options={gate: OPTIONS[gate]} if gate in OPTIONS else {},
        train=TrainConfig(micro_batch_size=1, global_batch_size=GLOBAL_BATCH),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def micro_batches(step: int, groups):
    """This rank's micro-batches of a step; all ranks together always see the same four."""
    from megatron.data.loader import Batch

    g = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(GLOBAL_BATCH):
        ids = torch.randint(0, MODEL.vocab_size, (1, 9), generator=g)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 8), None, None))
    return batches[groups.rank :: groups.world_size]


def frozen_names(model: torch.nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that match a regular expression."""
    return [name for name, _ in model.named_parameters() if re.search(pattern, name)]


def freeze(model: torch.nn.Module, pattern: str) -> None:
    """Train no parameter whose name matches a regular expression."""
    for name in frozen_names(model, pattern):
        model.get_parameter(name).requires_grad_(False)


def build(config: RunConfig, groups: Groups | None = None, seed: int = 7) -> nn.Module:
    """Build the model of a run; without `groups` it is not sharded."""
    from megatron.model.builder import build_model

    return build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=MODEL.vocab_size,
        seed=seed,
        groups=groups or Groups(),
        expert_options=config.expert_options,
        attention=config.attention,
        rotary=config.rotary,
    )


class Run(TinyRun):
    """An engine, its progress and its checkpoints; resumed if --load is set in `config`.

    Parameters whose name matches the regular expression `frozen` are not trained. With
    `representable` all weights are rounded to bf16 first.
    """

    identity = IDENTITY

    def __init__(
        self,
        config: RunConfig,
        seed: int = 7,
        frozen: str = "(?!)",
        representable: bool = False,
    ):
        self.config = config
        self.seed = seed
        self.frozen = frozen
        self.representable = representable
        super().__init__(config)

    def build_model(self, config: RunConfig) -> nn.Module:
        return build(config, self.groups, self.seed)

    def change_model(self, model: nn.Module) -> None:
        freeze(model, self.frozen)
        if self.representable:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()

    def steps(self, number: int) -> list[float]:
        """Mean losses over ranks of so many more steps."""
        from megatron.parallel.groups import all_reduce_mean
        from megatron.training.task import LM_LOSS, NextTokenLoss

        losses = []
        for _ in range(number):
            batches = micro_batches(self.progress.iteration, self.groups)
            step_losses = self.engine.step(batches, NextTokenLoss(), 0.02, 0.0)
            losses.append(all_reduce_mean(float(step_losses[LM_LOSS]), self.groups))
            self.progress.iteration += 1
            self.checkpoints.poll()
        return losses

    def local_weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass uses, of this rank (a share under ZeRO 3)."""
        tensors = {
            n: getattr(p, "ds_tensor", p).detach().clone()
            for n, p in self.engine.model.named_parameters()
        }
        return {**tensors, **{n: b.clone() for n, b in self.engine.model.named_buffers()}}


def train(
    config: RunConfig, steps: int = 0, more: int = 0, seed: int = 7, frozen: str = "(?!)"
):
    """Train in a rank.

    Returns:
        (losses of `steps`, losses of `more` steps after a save, this rank's weights, gradient norm)
    """
    run = Run(config, seed, frozen)
    try:
        before = run.steps(steps)
        if config.checkpoint.save:
            run.save()
        return before, run.steps(more), run.local_weights(), run.engine.grad_norm()
    finally:
        run.close()


def latest(folder: str | Path) -> str:
    """Name of the checkpoint of a folder that was completed last."""
    from megatron.checkpoint import directory

    return directory.list_checkpoints(folder)[0][0][0].name


def full_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint of a folder: "<kind>/<name>" and "buffer/<name>"."""
    from megatron.checkpoint.shards import CheckpointReader

    shards = CheckpointReader(Path(folder) / latest(folder))
    tensors = {
        f"{kind}/{name}": shards.read(kind, name).view(shards.shapes[name])
        for kind in shards.state_keys
        for name in shards.shapes
        if kind == "weight" or name not in shards.frozen
    }
    return {**tensors, **{f"buffer/{name}": shards.buffer(name) for name in shards.buffers}}


def tensors_sha256(folder: str | Path) -> str:
    """Return a hash of all tensors of the newest checkpoint of a directory, with their names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(full_tensors(folder).items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def loading(config: RunConfig, folder: str | Path, save: str | Path = "") -> RunConfig:
    checkpoint = replace(config.checkpoint, load=str(folder), save=str(save))
    return replace(config, checkpoint=checkpoint)
