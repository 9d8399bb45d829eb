"""Scaled rotary frequencies against those of transformers, bit by bit where possible."""

import pytest
import torch

from megatron.config.schema import ModelConfig, RotaryConfig
from megatron.model.rotary import build_rotary
from megatron.model.rotary_scaling import YarnScaling, latent_score_factor, yarn_mscale

LLAMA3 = RotaryConfig(rope_scaling="llama3", rope_original_max_positions=64)
YARN = RotaryConfig(
    rope_scaling="yarn", rope_original_max_positions=64, rope_scaling_factor=40.0
)


def yarn(**options) -> RotaryConfig:
    return RotaryConfig(rope_scaling="yarn", rope_original_max_positions=64, **options)


CASES = {
    "none": (RotaryConfig(), {"rope_type": "default"}),
    "partial": (
        RotaryConfig(rotary_percent=0.5),
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "linear": (
        RotaryConfig(rope_scaling="linear", rope_scaling_factor=3.0),
        {"rope_type": "linear", "factor": 3.0},
    ),
    "llama3": (LLAMA3, {"rope_type": "llama3", "factor": 8.0}),
    "llama3 options": (
        RotaryConfig(
            rope_scaling="llama3",
            rope_original_max_positions=64,
            rope_scaling_factor=32.0,
            rope_low_freq_factor=2.0,
            rope_high_freq_factor=3.5,
            rotary_percent=0.75,
        ),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 3.5,
            "partial_rotary_factor": 0.75,
        },
    ),
    "yarn": (yarn(), {"rope_type": "yarn", "factor": 8.0}),
    "yarn below 1": (
        yarn(rope_scaling_factor=0.5),
        {"rope_type": "yarn", "factor": 0.5},
    ),
    "gpt-oss": (
        yarn(rope_scaling_factor=32.0, yarn_truncate=False, yarn_beta_fast=20.0),
        {"rope_type": "yarn", "factor": 32.0, "truncate": False, "beta_fast": 20.0},
    ),
    "deepseek": (
        yarn(rope_scaling_factor=40.0, yarn_mscale=0.707, yarn_mscale_all_dim=0.5),
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5},
    ),
    "one mscale": (
        yarn(yarn_mscale_all_dim=0.5),
        {"rope_type": "yarn", "factor": 8.0, "mscale_all_dim": 0.5},
    ),
    "attention factor": (
        yarn(yarn_attention_factor=1.7, yarn_beta_fast=8.0, yarn_beta_slow=4.0),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "attention_factor": 1.7,
            "beta_fast": 8.0,
            "beta_slow": 4.0,
        },
    ),
    "equal bounds": (
        yarn(yarn_beta_fast=1e6, yarn_beta_slow=1e5, yarn_truncate=False),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 1e6,
            "beta_slow": 1e5,
            "truncate": False,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("head_size", "base"), [(16, 10000.0), (64, 150000.0)])
def test_tables_equal_transformers(case, head_size, base):
    pytest.importorskip("transformers", reason="the reference is not installed")
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    options, parameters = CASES[case]
    theirs = {"rope_theta": base, "partial_rotary_factor": 1.0, **parameters}
    if parameters["rope_type"] in ("llama3", "yarn"):
        theirs["original_max_position_embeddings"] = 64
    if parameters["rope_type"] == "llama3":
        theirs = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **theirs}
    config = Glm4MoeConfig(
        head_dim=head_size, max_position_embeddings=512, rope_parameters=theirs
    )
    position_ids = torch.arange(512)[None]
    cos, sin = Glm4MoeRotaryEmbedding(config)(torch.zeros(1), position_ids)
    model = ModelConfig(kv_channels=head_size, seq_length=512, rotary_base=base)
    rotary = build_rotary(model, options)
    # The order of operations may differ by a rounding of the frequency, times 512 positions.
    tolerance = 0 if case in ("none", "partial", "linear") else 512 * 2**-23
    torch.testing.assert_close(rotary.cos_PR, cos[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(rotary.sin_PR, sin[0], rtol=0, atol=tolerance)


def test_original_positions_default_to_the_models():
    model = ModelConfig(kv_channels=16, seq_length=64)
    for scaling in ("llama3", "yarn"):
        unset = build_rotary(model, RotaryConfig(rope_scaling=scaling))
        explicit = RotaryConfig(rope_scaling=scaling, rope_original_max_positions=64)
        assert torch.equal(unset.cos_PR, build_rotary(model, explicit).cos_PR)


def test_scaled_table_survives_casts():
    model = ModelConfig(kv_channels=16, seq_length=64)
    expected = build_rotary(model, YARN).cos_PR
    assert torch.equal(build_rotary(model, YARN).bfloat16().cos_PR, expected)
    assert expected.max() > 1, "queries and keys are multiplied by a factor above 1"


def test_mscale_equals_deepseek():
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    assert transformers
    for mscale in (0.0, 0.707, 1.0):
        options = yarn(rope_scaling_factor=40.0, yarn_mscale_all_dim=mscale)
        parameters = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": mscale}
        assert latent_score_factor(options) == pytest.approx(yarn_apply_mscale(parameters, 1.0))
    assert latent_score_factor(LLAMA3) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0
    assert YarnScaling(64, yarn(yarn_attention_factor=1.25)).amplitude == 1.25
