"""An engine whose global batch changes between steps, against plain PyTorch.

DeepSpeed counts micro-batches to find the last one of a step, so a changed number of them must
not leave it counting from the middle of a step.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import engines
from megatron.config.schema import RunConfig
from megatron.parallel.groups import Groups

SIZES = [2, 2, 6, 4, 4, 8, 2]
"""Samples of each step over all ranks; a micro-batch is one sample"""
LR = 0.02


def samples_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, engines.MODEL.vocab_size, (SIZES[step], 9), generator=generator)


def config_of(stage: int) -> RunConfig:
    """Return the configuration of a dense model, without weight decay."""
    config = engines.config_of("", 1, stage)
    return replace(config, optimizer=replace(config.optimizer, weight_decay=0.0))


def _train(config) -> list[tuple[float, float]]:
    """Train in a rank. Returns the loss, averaged over ranks, and the gradient norm by step."""
    from megatron.data.loader import Batch
    from megatron.parallel.groups import all_reduce_mean
    from megatron.training.task import LM_LOSS, NextTokenLoss

    run = engines.Run(config)
    world_size = run.groups.world_size
    results = []
    for step, size in enumerate(SIZES):
        run.engine.set_global_batch(size)
        own = samples_of(step)[run.groups.rank :: world_size]
        batches = [Batch(ids[None, :-1], ids[None, 1:], torch.ones(1, 8)) for ids in own]
        losses = run.engine.step(batches, NextTokenLoss(), LR, 0.0)
        loss = all_reduce_mean(float(losses[LM_LOSS]), run.groups)
        results.append((loss, run.engine.grad_norm()))
    assert run.engine.counters()["global_steps"] == len(SIZES)
    assert run.engine.counters()["global_samples"] == sum(SIZES)
    run.close()
    return results


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, float]]:
    """Train with plain PyTorch, each step on all of its samples together."""
    from megatron.model.builder import build_model

    config = config_of(1)
    model = build_model(
        config.model,
        config.moe,
        {},
        vocab_size=engines.MODEL.vocab_size,
        seed=7,
        groups=Groups(),
    )
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LR,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=0.0,
    )
    results = []
    for step in range(len(SIZES)):
        ids = samples_of(step)
        logits = model(ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_of_changing_size_match_pytorch(stage, ranks, expected, request):
    """At every ZeRO stage, on one rank and on two, from one micro-batch to eight."""
    pool = request.getfixturevalue(f"ranks{ranks}")
    for results in pool.run(_train, config_of(stage)):
        for got, reference in zip(results, expected, strict=True):
            assert got == pytest.approx(reference, rel=1e-4)


def test_offloaded_optimizer_follows_the_batch(expected, ranks2, tmp_path):
    """ZeRO 2 with CPU offload adds up gradients in a buffer of its own."""
    path = tmp_path / "ds.json"
    options = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    }
    path.write_text(json.dumps(options))
    config = config_of(2)
    config = replace(config, deepspeed=replace(config.deepspeed, deepspeed_config=str(path)))
    for results in ranks2.run(_train, config):
        for got, reference in zip(results, expected, strict=True):
            assert got == pytest.approx(reference, rel=1e-4)
