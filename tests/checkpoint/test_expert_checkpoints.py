"""Checkpoints of expert types with biases and of latent projections, and their use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import engines
from megatron.checkpoint import consolidate as c

CHANGES = {"expert_type": "swiglu_clamped", "moe_latent_size": 6, "moe_weight_on_input": True}


def config_of(ep_size, stage, precision="fp32", expert_options=None, **checkpoint):
    config = engines.config_of("topk", ep_size, stage, precision, **checkpoint)
    return replace(
        config,
        moe=replace(config.moe, **CHANGES),
        expert_options=expert_options or {"limit": 0.5},
    )


@pytest.fixture(scope="module")
def saved(ranks2, tmp_path_factory):
    """A checkpoint of two ranks that share the experts, and the losses after it."""
    folder = tmp_path_factory.mktemp("saved")
    config = config_of(2, 2, save=str(folder))
    return folder, ranks2.run(engines.train, config, 3, 5)[0][1]


def test_biases_and_projections_are_saved(saved):
    tensors = engines.full_tensors(saved[0])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for layer in range(2):
            prefix = f"{kind}/layers.{layer}.mlp"
            assert tensors[f"{prefix}.experts.b1"].shape == (4, 8)
            assert tensors[f"{prefix}.experts.b2"].shape == (4, 6)
            assert tensors[f"{prefix}.experts.w1"].shape == (4, 8, 6)
            assert tensors[f"{prefix}.fc1_latent_proj.weight"].shape == (6, 16)
            assert tensors[f"{prefix}.fc2_latent_proj.weight"].shape == (16, 6)
            assert tensors[f"{prefix}.experts.b1"].abs().sum() > 0


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), [(1, 1, 1), (2, 2, 3), (4, 4, 1)])
def test_run_resumes_on_another_topology(ranks, ep_size, stage, saved, request, tmp_path):
    """Saved again immediately, all tensors are equal bit by bit, and the losses continue."""
    folder, expected = saved
    pool = request.getfixturevalue(f"ranks{ranks}")
    config = engines.loading(config_of(ep_size, stage), folder, tmp_path)
    answers = pool.run(engines.train, config, 0, 5, 8)
    found = engines.full_tensors(tmp_path)
    wanted = engines.full_tensors(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert answers[0][1] == pytest.approx(expected, abs=1e-5)


def test_consolidated_tensors_fill_a_model(saved, tmp_path):
    """The full tensors have the names and shapes of a model that is not sharded."""
    c.consolidate(
        c.find_verified_checkpoint(saved[0]), tmp_path / "out", c.ConsolidateOptions()
    )
    tensors = load_file(tmp_path / "out/model.safetensors")
    model = engines.build(config_of(1, 1))
    model.load_state_dict(tensors)
    wanted = engines.full_tensors(saved[0])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[f"weight/{name}"])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"expert_type": "mlp"},
            {"linear_bias": True},
            "--expert-type is 'mlp' but checkpoint",
        ),
        ({}, {"limit": 7.0}, "--expert-limit is 7.0 but checkpoint .* was made with 0.5"),
        ({"moe_latent_size": None}, {"limit": 0.5}, "--moe-latent-size is None but checkpoint"),
        (
            {"moe_weight_on_input": False},
            {"limit": 0.5},
            "--moe-weight-on-input is False but checkpoint",
        ),
    ],
)
def test_other_experts_do_not_resume(changes, options, message, saved, ranks1):
    config = engines.loading(config_of(1, 1, expert_options=options), saved[0])
    config = replace(config, moe=replace(config.moe, **changes))
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(engines.train, config, 0, 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts_train_in_bf16(stage, ranks2):
    """Losses are those of fp32 but for rounding, and fall."""
    losses = ranks2.run(engines.train, config_of(2, stage, "bf16"), 6)[0][0]
    exact = ranks2.run(engines.train, config_of(2, stage), 6)[0][0]
    assert losses == pytest.approx(exact, abs=0.1)
    assert exact[-1] != exact[0]
