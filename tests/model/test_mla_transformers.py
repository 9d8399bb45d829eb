"""Multi-head latent attention against the attention of DeepSeek-V2 and V3 in transformers."""

import pytest
import torch
from torch import Tensor, nn

from megatron.config.schema import AttentionConfig, ModelConfig, RotaryConfig
from megatron.model.attention_context import AttentionContext
from megatron.model.mla import LatentAttention
from megatron.model.rotary import build_rotary

transformers = pytest.importorskip("transformers")

D, H, S = 24, 3, 40
SIZES = {
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 12,
}
"""Those of both configurations, which have the same names"""


def build_theirs(family: str, rope: dict, **changes) -> tuple[nn.Module, nn.Module]:
    """Return an attention layer with random weights, and the module of its rotations."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    sizes = {**SIZES, **changes}
    shape = {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": H,
        "max_position_embeddings": S,
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_theta": 100.0, **rope},
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    if family == "v2":
        config = transformers.DeepseekV2Config(**shape, **sizes)
        layer = v2.DeepseekV2Attention(config, 0)
        rotary = v2.DeepseekV2RotaryEmbedding(config)
    else:
        config = transformers.DeepseekV3Config(**shape, **sizes)
        layer = v3.DeepseekV3Attention(config, 0)
        rotary = v3.DeepseekV3RotaryEmbedding(config)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.6, 0.6)
    return layer, rotary


def to_halves(name: str, tensor: Tensor, sizes: dict) -> Tensor:
    """Reorder rows of rotated features from interleaved pairs to halves."""
    rope = sizes["qk_rope_head_dim"]
    order = torch.cat((torch.arange(0, rope, 2), torch.arange(1, rope, 2)))
    if name.startswith(("q_proj", "q_b_proj")):
        heads = tensor.unflatten(0, (H, -1))
        nope, rotated = heads.split((sizes["qk_nope_head_dim"], rope), 1)
        return torch.cat((nope, rotated[:, order]), 1).flatten(0, 1)
    if name.startswith("kv_a_proj"):
        latent, rotated = tensor.split((sizes["kv_lora_rank"], rope))
        return torch.cat((latent, rotated[order]))
    return tensor


def compare(family: str, rope: dict, rotary: RotaryConfig, interleaved=True, **changes) -> None:
    """Compare outputs and all gradients."""
    theirs, their_rotary = build_theirs(family, rope, **changes)
    theirs.config.rope_interleave = interleaved
    sizes = {**SIZES, **changes}
    bias = sizes.pop("attention_bias", False)
    options = AttentionConfig(
        attention="mla",
        add_qkv_bias=bias,
        attention_output_bias=bias,
        **{name: size or 0 for name, size in sizes.items()},
    )
    model = ModelConfig(hidden_size=D, num_attention_heads=H, seq_length=S, rotary_base=100.0)
    ours = LatentAttention(model, options, rotary)

    def convert(name: str, tensor: Tensor) -> Tensor:
        return to_halves(name, tensor, sizes) if interleaved else tensor

    ours.load_state_dict({name: convert(name, t) for name, t in theirs.state_dict().items()})
    x = torch.randn(2, S, D, requires_grad=True)
    weight = torch.randn(2, S, D)
    positions = torch.arange(S)[None]
    mask = torch.full((S, S), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(
        hidden_states=x, attention_mask=mask, position_embeddings=their_rotary(x, positions)
    )
    (expected * weight).sum().backward()
    x_again = x.detach().clone().requires_grad_()
    y = ours(x_again, AttentionContext(build_rotary(model, rotary, 8)(S)))
    (y * weight).sum().backward()

    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x_again.grad, x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in theirs.named_parameters():
        gradient = convert(name, parameter.grad)
        error = (ours.get_parameter(name).grad - gradient).norm() / gradient.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"v_head_dim": 20}, {"attention_bias": True}],
    ids=str,
)
def test_layer_equals_transformers(family, changes):
    compare(family, {"rope_type": "default"}, RotaryConfig(), **changes)


def test_halves_need_no_permutation():
    """DeepSeek-V3 with `rope_interleave` off has our order of rotated features."""
    compare("v3", {"rope_type": "default"}, RotaryConfig(), interleaved=False)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LINEAR = RotaryConfig(rope_scaling="linear", rope_scaling_factor=4.0)


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize(
    "mscale, mscale_all_dim", [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (0.0, 0.8), (0.0, 0.0)]
)
def test_yarn_equals_transformers(family, mscale, mscale_all_dim):
    """DeepSeek-V3 has both scales 1, DeepSeek-V2 0.707; they enter scores and rotations."""
    rotary = RotaryConfig(
        rope_scaling="yarn",
        rope_scaling_factor=8.0,
        rope_original_max_positions=16,
        yarn_mscale=mscale,
        yarn_mscale_all_dim=mscale_all_dim,
    )
    rope = {**YARN, "mscale": mscale, "mscale_all_dim": mscale_all_dim}
    compare(family, rope, rotary)


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_linear_scaling_equals_transformers(family):
    compare(family, {"rope_type": "linear", "factor": 4.0}, LINEAR)


def test_learned_positions_scale_no_scores():
    """YaRN's options have no effect without rotary positions."""
    model = ModelConfig(position_embedding_type="learned")
    rotary = RotaryConfig(rope_scaling="yarn", yarn_mscale_all_dim=1.0)
    layer = LatentAttention(model, AttentionConfig(attention="mla"), rotary)
    assert layer.scale == (64 + 128) ** -0.5
