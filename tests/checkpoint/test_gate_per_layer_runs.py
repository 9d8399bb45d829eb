"""Runs whose layers have different gates: training, resuming on other ranks, inspection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import engines
from megatron.checkpoint import inspect
from megatron.checkpoint.gate_code import describe_gates
from megatron.checkpoint.inspect_text import format_checkpoint
from megatron.config.schema import RunConfig

GATES = "hash@0,deepseek_v3@1-2"
OPTIONS = {"deepseek_v3": {"bias_update_speed": 0.07}}


def config_of(ep_size: int, gates: str = GATES, **checkpoint: str) -> RunConfig:
    base = engines.config_of("topk", ep_size, 1, **checkpoint)
    return replace(
        base,
        model=replace(base.model, num_layers=3),
        moe=replace(base.moe, gate=gates),
        gate_options=OPTIONS,
    )


@pytest.fixture(scope="module")
def saved(ranks2, tmp_path_factory) -> tuple[Path, list[float]]:
    """A checkpoint of two ranks that share the experts, and the losses after it."""
    folder = tmp_path_factory.mktemp("saved")
    answers = ranks2.run(engines.train, config_of(2, save=str(folder)), 3, 4)
    return folder, [*answers[0][0], *answers[0][1]]


def test_training_is_equal_on_one_rank(saved, ranks1):
    ((losses, _, weights, _),) = ranks1.run(engines.train, config_of(1), 7)
    assert losses == pytest.approx(saved[1], abs=1e-5)
    bias = weights["layers.1.mlp.gate.expert_bias"]
    assert bias.abs().max() > 0 and not torch.equal(
        bias, weights["layers.2.mlp.gate.expert_bias"]
    )
    assert "layers.0.mlp.gate.table_V" in weights


@pytest.mark.parametrize("ranks, ep_size", [(2, 2), (1, 1)])
def test_run_resumes(ranks, ep_size, saved, request, tmp_path):
    folder, losses = saved
    config = engines.loading(config_of(ep_size), folder, tmp_path)
    pool = request.getfixturevalue(f"ranks{ranks}")
    resumed = pool.run(engines.train, config, 0, 4, 8)[0][1]
    assert resumed == (losses[3:] if ranks == 2 else pytest.approx(losses[3:], abs=1e-5))
    before = engines.full_tensors(folder)
    after = engines.full_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_list_of_gates_is_refused(saved, ranks1):
    """A list that names the same gate of every layer is the same."""
    folder, _ = saved
    other = "hash@0-1,deepseek_v3@2"
    with pytest.raises(Exception, match="--gate is 'hash@0-1,deepseek_v3@2' but checkpoint"):
        ranks1.run(engines.train, engines.loading(config_of(1, other), folder), 0)
    same = "deepseek_v3@1+2,hash@0"
    ranks1.run(engines.train, engines.loading(config_of(1, same), folder), 0)


def test_summary_names_all_gates(saved):
    folder, _ = saved
    summary = inspect.summarize_checkpoint(inspect.resolve_checkpoint(folder))
    assert summary["config"]["gate_options"]["deepseek_v3"]["bias_update_speed"] == 0.07
    assert sorted(describe_gates(config_of(1))) == ["deepseek_v3", "hash"]
    lines = format_checkpoint(summary)
    assert f"gates {GATES}, for 4 experts" in lines
    assert any("deepseek_v3" in line and "bias_update_speed 0.07" in line for line in lines)
