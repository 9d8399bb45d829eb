"""Multi-head latent attention against loops and transformers, and its cached decoding."""

import math

import pytest
import torch
from torch import nn

from helpers.list_cache import ListCache
from megatron.config.schema import AttentionConfig, ModelConfig, MoEConfig, RotaryConfig
from megatron.model import mla
from megatron.model.attention_context import AttentionContext, VisibleKeys
from megatron.model.builder import build_model
from megatron.model.document_attention import DocumentLayout
from megatron.model.gpt import GPT
from megatron.model.mla import LatentAttention
from megatron.model.mlp import MLP
from megatron.model.parameter_count import count_parameters
from megatron.model.rotary import build_rotary
from megatron.parallel.groups import Groups

H, C, R, N, V, D, S = 4, 20, 6, 10, 14, 18, 11
MODEL = ModelConfig(hidden_size=D, num_attention_heads=H, seq_length=S)
RANKS = {"attention": "mla", "kv_lora_rank": C, "qk_rope_head_dim": R}
OPTIONS = AttentionConfig(**RANKS, qk_nope_head_dim=N, v_head_dim=V)
WIDE_KEYS = AttentionConfig(**RANKS, q_lora_rank=12, qk_nope_head_dim=16, v_head_dim=8)
WITH_BIASES = AttentionConfig(
    **RANKS,
    q_lora_rank=12,
    qk_nope_head_dim=N,
    v_head_dim=V,
    add_qkv_bias=True,
    attention_output_bias=True,
)


def make(options: AttentionConfig = OPTIONS, rotary: RotaryConfig | None = None):
    """Return a layer whose parameters, also norms and biases, are random."""
    torch.manual_seed(0)
    layer = LatentAttention(MODEL, options, rotary)
    for parameter in layer.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    return layer


def make_gpt(options: AttentionConfig, num_layers: int = 2) -> GPT:
    torch.manual_seed(0)
    model = ModelConfig(
        num_layers=num_layers, hidden_size=D, num_attention_heads=H, seq_length=16
    )
    gpt = GPT(model, 30, make_ffn=lambda i: MLP(D, 24, "gelu"), attention=options)
    for parameter in gpt.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    return gpt.eval()


def reference(p, x_BSD, options, rotation, segments_BS):
    """Attend one query, one head and one key at a time."""

    def linear(name, x):
        return nn.functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(name, x):
        return nn.functional.rms_norm(x, x.shape[-1:], p[f"{name}.weight"], 1e-6)

    if options.q_lora_rank:
        q = linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x_BSD)))
    else:
        q = linear("q_proj", x_BSD)
    N, V = options.qk_nope_head_dim, options.v_head_dim
    q = q.unflatten(-1, (H, N + R))
    latent, shared = linear("kv_a_proj_with_mqa", x_BSD).split((C, R), -1)
    latent = norm("kv_a_layernorm", latent)
    rope = q[..., N:]
    if rotation is not None:
        rope = rotation.apply(rope.transpose(1, 2)).transpose(1, 2)
        shared = rotation.apply(shared[:, None])[:, 0]
    kv = linear("kv_b_proj", latent).unflatten(-1, (H, N + V))
    rows = []
    for b in range(x_BSD.shape[0]):
        for s in range(x_BSD.shape[1]):
            heads = []
            for h in range(H):
                seen = [
                    j
                    for j in range(s + 1)
                    if segments_BS is None or segments_BS[b, j] == segments_BS[b, s]
                ]
                scores = torch.stack(
                    [
                        (q[b, s, h, :N] @ kv[b, j, h, :N] + rope[b, s, h] @ shared[b, j])
                        / math.sqrt(N + R)
                        for j in seen
                    ]
                )
                heads.append(scores.softmax(0) @ torch.stack([kv[b, j, h, N:] for j in seen]))
            rows.append(torch.cat(heads))
    return linear("o_proj", torch.stack(rows).unflatten(0, x_BSD.shape[:2]))


@pytest.mark.parametrize("options", [OPTIONS, WIDE_KEYS, WITH_BIASES], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_equals_a_loop(options, packed, document_path):
    layer = make(options).double()
    x = torch.randn(2, S, D, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0] * 3 + [1] * 2 + [2] * 6, [5] * 10 + [3]]) if packed else None
    rotation = build_rotary(MODEL, RotaryConfig(), R)(S)
    documents = None if segments is None else DocumentLayout(segments)
    weight = torch.randn(2, S, D, dtype=torch.float64)

    y = layer(x, AttentionContext(rotation, documents))
    (y * weight).sum().backward()
    p = {name: q.detach().clone().requires_grad_() for name, q in layer.named_parameters()}
    x_again = x.detach().clone().requires_grad_()
    expected = reference(p, x_again, options, rotation, segments)
    (expected * weight).sum().backward()

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_again.grad)
    for name, q in layer.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_layer_without_positions_equals_a_loop():
    layer = make().double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    expected = reference(dict(layer.named_parameters()), x, OPTIONS, None, None)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("options", [OPTIONS, WIDE_KEYS, WITH_BIASES], ids=str)
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 16, [9, 1, 1, 1, 1, 1, 1, 1], [6, 5, 5]])
@torch.no_grad()
def test_decoding_equals_prefill(options, absorbed, chunks, monkeypatch):
    """In chunks of any size, with latents expanded and absorbed."""
    monkeypatch.setattr(LatentAttention, "absorbs", lambda self, num_new, num_keys: absorbed)
    gpt = make_gpt(options)
    tokens_BS = torch.randint(0, 30, (2, 16))
    cache = ListCache(2, 2)
    logits = []
    for chunk_BS in tokens_BS.split(chunks, dim=1):
        cache.add([chunk_BS.shape[1]] * 2)
        logits.append(gpt(chunk_BS, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), gpt(tokens_BS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_ragged_rows_equal_rows_alone(absorbed, monkeypatch):
    monkeypatch.setattr(LatentAttention, "absorbs", lambda self, num_new, num_keys: absorbed)
    gpt = make_gpt(WIDE_KEYS)
    prompts = [torch.randint(0, 30, (n,)) for n in (3, 6, 1)]
    steps_BS = torch.randint(0, 30, (3, 4))
    cache = ListCache(2, 3)
    cache.add([3, 6, 1])
    gpt(nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7), cache=cache)
    logits = []
    for step_B in steps_BS.unbind(1):
        cache.add([1, 1, 1])
        logits.append(gpt(step_B[:, None], cache=cache).logits)
    logits_BSV = torch.cat(logits, 1)
    for i, prompt in enumerate(prompts):
        row = torch.cat((prompt, steps_BS[i]))[None]
        torch.testing.assert_close(logits_BSV[i], gpt(row).logits[0, -4:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_cache_has_latent_and_rotary_key():
    """kv_lora_rank + qk_rope_head_dim numbers for each token and layer, whatever the heads."""
    gpt = make_gpt(OPTIONS)
    cache = ListCache(2, 3)
    for new in (7, 1):
        cache.add([new] * 3)
        gpt(torch.zeros(3, new, dtype=torch.int64), cache=cache)
    for layer in cache.layers:
        assert [tuple(state.shape) for state in layer.states] == [(3, 1, 8, C), (3, 1, 8, R)]


@torch.no_grad()
def test_decoding_uses_updated_weights():
    """No absorbed weight outlives an update: decode, change every weight, decode again."""
    gpt = make_gpt(OPTIONS, num_layers=1)
    tokens_BS = torch.randint(0, 30, (2, 6))
    for _ in range(2):
        cache = ListCache(1, 2)
        logits = []
        for token_B in tokens_BS.unbind(1):
            cache.add([1, 1])
            logits.append(gpt(token_B[:, None], cache=cache).logits)
        torch.testing.assert_close(
            torch.cat(logits, 1), gpt(tokens_BS).logits, rtol=0, atol=1e-4
        )
        for parameter in gpt.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.3)


@torch.no_grad()
def test_single_token_decoding_expands_nothing(monkeypatch):
    """The latents of cached tokens are not multiplied by the weights of keys and values."""
    layer = make()
    uses = []
    forward = mla.LatentExpansion.forward
    monkeypatch.setattr(
        mla.LatentExpansion,
        "forward",
        lambda self, x, use="expand": (
            uses.append((use, tuple(x.shape))) or forward(self, x, use)
        ),
    )
    cache = ListCache(1, 2)
    for new in (5, 1):
        cache.add([new] * 2)
        visible = VisibleKeys(cache.slot_BS)
        layer(torch.randn(2, new, D), AttentionContext(cache=cache.layer(0), visible=visible))
    assert uses == [
        ("expand", (2, 1, 5, C)),
        ("query", (2, H, 1, N)),
        ("value", (2, H, 1, C)),
    ]


def test_absorbs_compares_arithmetic():
    """With DeepSeek's sizes up to 170 new tokens attend to latents; a short cache is expanded."""
    with torch.device("meta"):
        layer = LatentAttention(
            ModelConfig(hidden_size=64, num_attention_heads=2),
            AttentionConfig(attention="mla"),
        )
    assert layer.absorbs(1, 2) and layer.absorbs(100, 4096) and layer.absorbs(160, 4096)
    assert not layer.absorbs(200, 4096) and not layer.absorbs(100, 101)


def test_dropout_applies_in_training_only():
    torch.manual_seed(2)
    config = ModelConfig(
        hidden_size=D, num_attention_heads=H, seq_length=S, attention_dropout=0.5
    )
    layer = LatentAttention(config, OPTIONS)
    plain = LatentAttention(MODEL, OPTIONS)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, S, D)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), plain(x))


def test_parameters_and_their_initial_values():
    with torch.device("cpu"):
        model = ModelConfig(
            num_layers=3,
            hidden_size=D,
            num_attention_heads=H,
            init_method_std=0.5,
            make_vocab_size_divisible_by=1,
        )
        gpt = build_model(
            model,
            moe=MoEConfig(),
            gate_options={},
            vocab_size=9,
            seed=0,
            groups=Groups(),
            attention=WITH_BIASES,
        )
    q_rank = WITH_BIASES.q_lora_rank
    expected = q_rank * D + q_rank + q_rank + q_rank * H * (N + R)  # queries
    expected += D * (C + R) + (C + R) + C + C * H * (N + V)  # keys and values
    expected += H * V * D + D  # output
    assert count_parameters(gpt).parts["attention"] == 3 * expected
    layer = gpt.layers[1].self_attn
    assert layer.kv_a_layernorm.weight.eq(1).all() and layer.q_a_layernorm.weight.eq(1).all()
    for module in (layer.q_a_proj, layer.kv_a_proj_with_mqa, layer.o_proj):
        assert module.bias.eq(0).all()
    assert layer.kv_b_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert layer.o_proj.weight.std().item() == pytest.approx(0.5 / math.sqrt(6), rel=0.1)
