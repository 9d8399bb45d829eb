"""Every kind of attention and of positions generates the same tokens with the cache and without."""

from __future__ import annotations

import pytest

from megatron.config.schema import AttentionConfig, ModelConfig, MoEConfig, RotaryConfig
from megatron.inference.generate import generate
from megatron.inference.sampling import GREEDY
from megatron.model.builder import build_model
from megatron.parallel.groups import Groups

V = 41
PROMPTS = [[5, 17], [3, 9, 30, 9, 1, 12, 28, 7], [11, 0, 22, 6]]
MLA = AttentionConfig(
    attention="mla",
    q_lora_rank=8,
    kv_lora_rank=6,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=5,
)
CASES = {
    "grouped": ({"num_query_groups": 1}, AttentionConfig(), RotaryConfig()),
    "learned": ({"position_embedding_type": "learned"}, AttentionConfig(), RotaryConfig()),
    "norms": ({}, AttentionConfig(qk_norm="head", add_qkv_bias=True), RotaryConfig()),
    "window": ({}, AttentionConfig(window_size=3, window_layers=(1,)), RotaryConfig()),
    "sinks": ({}, AttentionConfig(window_size=4, attention_sinks=True), RotaryConfig()),
    "latent": ({}, MLA, RotaryConfig()),
    "yarn": (
        {"max_position_embeddings": 24},
        AttentionConfig(),
        RotaryConfig(
            rope_scaling="yarn", rope_scaling_factor=2.0, rope_original_max_positions=12
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_attention_decodes_as_it_trains(case):
    """Rows of different lengths, in a batch and alone; the longest ends at the last position."""
    shape, attention, rotary = CASES[case]
    config = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 24,
        "init_method_std": 0.5,
        "untie_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 1,
    }
    model = build_model(
        ModelConfig(**{**config, **shape}),
        MoEConfig(num_experts=4, gate="topk", moe_ffn_hidden_size=16, expert_interval=2),
        {},
        vocab_size=V,
        seed=2,
        groups=Groups(),
        attention=attention,
        rotary=rotary,
    )
    options = {"max_new_tokens": 17, "vocab_size": V, "sampling": GREEDY}
    expected = generate(model, PROMPTS, use_cache=False, **options)
    widths = []
    hook = model.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    assert generate(model, PROMPTS, **options) == expected
    hook.remove()
    assert widths == [8, *[1] * 16]
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert generate(model, [prompt], **options) == [tokens]
