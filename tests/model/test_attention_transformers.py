"""Options of attention layers against the attention modules of transformers, values and gradients.

Their parameters have our names.
"""

import pytest
import torch

from megatron.config.schema import AttentionConfig, ModelConfig, RotaryConfig
from megatron.model.attention import Attention
from megatron.model.attention_context import AttentionContext
from megatron.model.rotary import build_rotary

pytest.importorskip("transformers", reason="the reference implementation is not installed")

from transformers import (
    Glm4MoeConfig,
    GptOssConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

LENGTH = 11
SHAPE = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
CASES = {
    "qwen2": (
        Qwen2MoeConfig(**SHAPE, rope_parameters=ROPE, qkv_bias=True),
        (qwen2.Qwen2MoeAttention, qwen2.Qwen2MoeRotaryEmbedding),
        (6, AttentionConfig(add_qkv_bias=True), RotaryConfig()),
    ),
    "qwen3": (
        Qwen3MoeConfig(**SHAPE, head_dim=8, rope_parameters=ROPE),
        (qwen3.Qwen3MoeAttention, qwen3.Qwen3MoeRotaryEmbedding),
        (8, AttentionConfig(qk_norm="head"), RotaryConfig()),
    ),
    "qwen3 biases": (
        Qwen3MoeConfig(**SHAPE, head_dim=8, rope_parameters=ROPE, attention_bias=True),
        (qwen3.Qwen3MoeAttention, qwen3.Qwen3MoeRotaryEmbedding),
        (
            8,
            AttentionConfig(qk_norm="head", add_qkv_bias=True, attention_output_bias=True),
            RotaryConfig(),
        ),
    ),
    "glm": (
        Glm4MoeConfig(
            **SHAPE,
            head_dim=8,
            rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
            attention_bias=True,
            use_qk_norm=True,
        ),
        (glm.Glm4MoeAttention, glm.Glm4MoeRotaryEmbedding),
        (
            8,
            AttentionConfig(qk_norm="head", add_qkv_bias=True),
            RotaryConfig(rotary_percent=0.5),
        ),
    ),
    "olmoe": (
        OlmoeConfig(**SHAPE, rope_parameters=ROPE),
        (olmoe.OlmoeAttention, olmoe.OlmoeRotaryEmbedding),
        (6, AttentionConfig(qk_norm="all-heads"), RotaryConfig()),
    ),
    "olmoe clipped": (
        OlmoeConfig(**SHAPE, rope_parameters=ROPE, clip_qkv=0.4),
        (olmoe.OlmoeAttention, olmoe.OlmoeRotaryEmbedding),
        (6, AttentionConfig(qk_norm="all-heads", clip_qkv=0.4), RotaryConfig()),
    ),
}


def assert_equal_attention(
    theirs, config, rotary_class, ours, rotation, make_mask=create_causal_mask
):
    """Copy their weights, and compare outputs and gradients by name."""
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, LENGTH, config.hidden_size)
    mask = make_mask(config, x, attention_mask=None, past_key_values=None)
    position_ids = torch.arange(LENGTH)[None]
    positions = rotary_class(config)(x, position_ids)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = theirs(inputs[0], position_embeddings=positions, attention_mask=mask)[0]
    y = ours(inputs[1], AttentionContext(rotation))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_transformers(case):
    config, (attention_class, rotary_class), (head_size, attention, rotary) = CASES[case]
    model = ModelConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=head_size,
        seq_length=16,
        rotary_base=100.0,
        norm_epsilon=config.rms_norm_eps,
    )
    ours = Attention(model, attention)
    rotation = build_rotary(model, rotary)(LENGTH)
    theirs = attention_class(config, 0)
    assert_equal_attention(theirs, config, rotary_class, ours, rotation)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_equals_gpt_oss(layer):
    """With sinks and biases; every second layer, from the first one on, has a window."""
    config = GptOssConfig(
        **{**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 64},
        head_dim=8,
        sliding_window=4,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    )
    model = ModelConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        seq_length=64,
        rotary_base=150.0,
    )
    attention = AttentionConfig(
        add_qkv_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        window_size=4,
        window_layers=(0,),
    )
    rotary = RotaryConfig(
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        rope_original_max_positions=16,
        yarn_truncate=False,
    )
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert_equal_attention(
        gpt_oss.GptOssAttention(config, layer),
        config,
        gpt_oss.GptOssRotaryEmbedding,
        Attention(model, attention, layer),
        build_rotary(model, rotary)(LENGTH),
        [create_sliding_window_causal_mask, create_causal_mask][layer],
    )
