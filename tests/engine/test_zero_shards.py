"""Shards of the optimizer state: refusals, fp16's loss scale, partition of every tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import engines
from megatron.engine.zero_shards import GlobalLayout, ZeroShards
from megatron.parallel.groups import Groups

SCALE = {"cur_scale": 128.0, "cur_iter": 7, "last_overflow_iter": 3, "cur_hysteresis": 1}


def stage_0(model: nn.Module, zero=None):
    """Return the used part of a DeepSpeed engine, around a model with torch's own optimizer."""
    optimizer = zero or torch.optim.AdamW(model.parameters())
    return SimpleNamespace(optimizer=optimizer, module=model, zero_optimization_stage=lambda: 0)


def test_nvme_is_refused():
    zero = SimpleNamespace(swap_optimizer=True, optimizer=None)
    with pytest.raises(
        ValueError,
        match="offload_optimizer.device is 'nvme'; allowed: none or cpu, with --save and",
    ):
        ZeroShards(stage_0(nn.Linear(1, 1), zero), GlobalLayout({}, {}, ()))


def test_frozen_parameter_has_no_shard():
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    zero_shards = ZeroShards(stage_0(model), GlobalLayout.of(model, Groups()))
    assert [shard.name for shard in zero_shards.shards] == ["weight"]


def scalers():
    """Return optimizers with the loss scalers of DeepSpeed, by where they are."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    half = torch.float16
    dynamic = {
        "init_scale": 65536,
        "scale_window": 1000,
        "min_scale": 1,
        "delayed_shift": 2,
        "consecutive_hysteresis": False,
    }
    return {
        "ZeRO": SimpleNamespace(loss_scaler=CreateLossScaler(half, 0, True, dynamic)),
        "static": SimpleNamespace(loss_scaler=CreateLossScaler(half, 4, False, None)),
        "none": SimpleNamespace(),
    }


@pytest.mark.parametrize("kind, dynamic", [("ZeRO", True), ("static", False), ("none", False)])
def test_dynamic_loss_scale_is_restored(kind, dynamic):
    """Uses DeepSpeed's loss scalers without its optimizer, as fp16 needs a GPU."""
    model = nn.Linear(1, 1)
    zero = SimpleNamespace(
        **vars(scalers()[kind]),
        optimizer=torch.optim.AdamW(model.parameters()),
        fp16_groups=[list(model.parameters())],
        fp32_groups=[list(model.parameters())],
    )
    shards = ZeroShards(stage_0(model, zero), GlobalLayout.of(model, Groups()))
    before = shards.loss_scaler_state()
    changed = {name: value for name, value in SCALE.items() if name in before}
    shards.set_loss_scaler_state(changed or SCALE)
    if dynamic:
        assert {"cur_scale", "cur_iter", "last_overflow_iter"} <= before.keys()
        assert shards.loss_scaler_state() == {name: SCALE[name] for name in before} != before
    else:
        assert before == shards.loss_scaler_state() == {}


def _shards(config):
    """Run on a rank: shards, full shapes, and state keys before and after the first step."""
    run = engines.Run(config)
    zero_shards = run.engine.zero_shards()
    keys_before = zero_shards.state_keys()
    run.steps(1)
    run.close()
    return (
        [(s.name, s.start, s.length) for s in zero_shards.shards],
        run.engine.layout.shapes,
        keys_before,
        zero_shards.state_keys(),
    )


@pytest.mark.parametrize("ranks, ep_size", [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_partition_every_tensor(stage, ranks, ep_size, request):
    answers = request.getfixturevalue(f"ranks{ranks}").run(
        _shards, engines.config_of("topk", ep_size, stage)
    )
    seen = {
        name: torch.zeros(shape, dtype=torch.int).view(-1)
        for name, shape in answers[0][1].items()
    }
    for shards, _, keys_before, keys_after in answers:
        assert keys_before == ("weight",) and keys_after == ("weight", "exp_avg", "exp_avg_sq")
        for name, start, length in shards:
            seen[name][start : start + length] += 1
    assert all((count == 1).all() for count in seen.values())
    stacks = {name: shape for name, shape in answers[0][1].items() if ".experts.w" in name}
    assert stacks and all(shape[0] == 4 for shape in stacks.values())


def _make(config):
    engines.Run(config).close()


def test_round_robin_gradients_are_refused(ranks2, tmp_path):
    options = tmp_path / "ds.json"
    options.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    config = engines.config_of("topk", 1, 1, save=str(tmp_path / "c"))
    deepspeed = replace(config.deepspeed, deepspeed_config=str(options))
    config = replace(config, deepspeed=deepspeed)
    with pytest.raises(
        RuntimeError,
        match="zero_optimization.round_robin_gradients is True; allowed: false, with",
    ):
        ranks2.run(_make, config)


def _check_changed_weight(config):
    """Run on a rank: the check passes before and after steps, and fails for a changed weight."""
    run = engines.Run(config)
    zero_shards = run.engine.zero_shards()
    zero_shards.check()
    run.steps(2)
    zero_shards.check()
    first = zero_shards.shards[0]
    first.weight.view(-1)[0] += 1.0
    with pytest.raises(
        ValueError, match=f"optimizer's copy of {first.name} is not that parameter's"
    ):
        zero_shards.check()
    return True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_are_compared_with_model(stage, ranks2):
    assert ranks2.run(_check_changed_weight, engines.config_of("topk", 2, stage, "bf16")) == [
        True,
        True,
    ]
