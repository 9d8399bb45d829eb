"""Training with options of attention, rotary positions and shared experts at every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import engines
from helpers.reference_training import reference_training
from megatron.config.schema import AttentionConfig, RotaryConfig, RunConfig

STEPS = 3
ATTENTION = AttentionConfig(
    add_qkv_bias=True,
    attention_output_bias=True,
    qk_norm="head",
    clip_qkv=1.5,
    attention_sinks=True,
    window_size=3,
    window_layers=(1,),
)
ROTARY = RotaryConfig(
    rotary_percent=0.5, rope_scaling="yarn", rope_original_max_positions=4, yarn_truncate=False
)


def config_of(ep_size: int, stage: int, **checkpoint) -> RunConfig:
    config = engines.config_of("topk", ep_size, stage, **checkpoint)
    moe = replace(
        config.moe, moe_shared_expert_gate=True, moe_shared_expert_intermediate_size=10
    )
    return replace(config, moe=moe, attention=ATTENTION, rotary=ROTARY)


def _train(config: RunConfig, recompute: bool) -> tuple[list[float], list[float]]:
    """Train and save in a rank; return the losses, and those of a resumed run."""
    run = engines.Run(config)
    run.engine.model.recompute = recompute
    try:
        losses = run.steps(STEPS)
        run.save()
    finally:
        run.close()
    resumed = replace(
        config, checkpoint=replace(config.checkpoint, load=config.checkpoint.save)
    )
    run = engines.Run(resumed)
    try:
        return losses, run.steps(1)
    finally:
        run.close()


@pytest.mark.parametrize(
    ("stage", "ep_size", "recompute"),
    [
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 2, True, marks=pytest.mark.slow),
        pytest.param(3, 1, False, marks=pytest.mark.slow),
        (3, 2, True),
    ],
)
def test_training_equals_torch_with_options(stage, ep_size, recompute, ranks2, tmp_path):
    """Losses and weights agree, also where biases, norms and sinks have no weight decay."""
    config = config_of(ep_size, stage, save=str(tmp_path))
    losses, _, expected = reference_training(config, STEPS)
    answers = ranks2.run(_train, config, recompute)
    assert answers[0][0] == pytest.approx(losses, abs=1e-5)
    more_losses, _, _ = reference_training(config, STEPS + 1)
    assert answers[0][1] == pytest.approx(more_losses[STEPS:], abs=1e-5)
    tensors = engines.full_tensors(tmp_path)
    for name, weight in expected.items():
        torch.testing.assert_close(tensors[f"weight/{name}"], weight, rtol=1e-3, atol=1e-4)
    trained = [name for name in expected if name.endswith(("sinks", "shared_gate.weight"))]
    assert len(trained) == 4
    for name in trained:
        assert not torch.equal(
            expected[name], dict(engines.build(config).named_parameters())[name]
        )
