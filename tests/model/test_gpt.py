"""The complete model against independent implementations, its loss and its initial weights."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron.config.schema import AttentionConfig, ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.model.gpt import GPT
from megatron.model.mlp import MLP
from megatron.moe.ffn import FFNOutput
from megatron.parallel.groups import Groups

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=10,
    seq_length=16,
    rotary_base=500.0,
    swiglu=True,
)
GPT2 = ModelConfig(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=3,
    seq_length=8,
    position_embedding_type="learned",
    normalization="LayerNorm",
    activation="gelu",
)
V = 40


def make(config=LLAMA, *, std=0.3, seed=0, **options) -> GPT:
    """Build a dense model whose weights are large enough for every part to matter."""
    config = dataclasses.replace(config, init_method_std=std)
    options.setdefault(
        "make_ffn", lambda i: MLP(config.hidden_size, config.ffn_size, config.act)
    )
    model = GPT(config, V, **options)
    model.init_weights(seed)
    return model


def batch(B=2, S=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (B, S + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.randint(0, 2, (B, S), generator=generator)


def assert_same_gradients(model, expected: dict):
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, expected[name], rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


class FakeMoELayer(nn.Module):
    """A feed-forward layer with an auxiliary loss; its carry counts the MoE layers so far."""

    initialises_itself = True

    def __init__(self, hidden_size, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), scale))
        self.scale = scale
        self.seen = []

    def forward(self, x, context):
        self.seen.append((context.token_ids_BS, context.carry, context.progress))
        carry = torch.ones(()) if context.carry is None else context.carry + 1
        return FFNOutput(
            torch.tanh(x) * self.weight, self.weight.mean() * x.square().mean().float(), carry
        )


def moe_layers(config, layers):
    return lambda i: (
        FakeMoELayer(config.hidden_size, 1.0 + i)
        if i in layers
        else MLP(config.hidden_size, config.ffn_size, config.act)
    )


# ---- the complete model against independent implementations


@pytest.mark.parametrize("untied", [False, True])
def test_model_equals_transformers_llama(untied):
    transformers = pytest.importorskip(
        "transformers", reason="the reference implementation is not installed"
    )
    model = make(dataclasses.replace(LLAMA, untie_embeddings_and_output_weights=untied))
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
            hidden_act="silu",
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=not untied,
            attention_bias=False,
            attn_implementation="eager",
        )
    )
    for p in (model.norm.weight, model.layers[0].input_layernorm.weight):
        p.data.uniform_(0.5, 2)
    weights = {
        name if name == "lm_head.weight" else f"model.{name}": w
        for name, w in model.state_dict().items()
    }
    missing = reference.load_state_dict(weights, strict=False)
    assert (
        not missing.unexpected_keys
        and set(missing.missing_keys) <= {"lm_head.weight"} - weights.keys()
    )

    tokens, labels, mask = batch()
    torch.testing.assert_close(
        model(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4
    )
    gaps = torch.tensor([[0, 2, 3, 5], [1, 5, 10, 15]])
    torch.testing.assert_close(
        model(tokens[:, :4], position_ids_BS=gaps).logits,
        rtol=1e-4,
        atol=1e-4,
        expected=reference(
            tokens[:, :4], position_ids=gaps, attention_mask=torch.ones_like(gaps)
        ).logits,
    )
    out = model(tokens, labels, mask)
    loss = reference(
        tokens, shift_labels=labels.masked_fill(mask == 0, -100), labels=labels
    ).loss
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    assert_same_gradients(
        model, {n.removeprefix("model."): p.grad for n, p in reference.named_parameters()}
    )


def reference_gpt2(p, tokens_BS):
    """GPT-2 (LayerNorm, learned positions, gelu; no linear biases), one token at a time."""
    B, S = tokens_BS.shape

    def norm(x, name):
        centred = x - x.mean()
        return (
            centred / (centred.square().mean() + 1e-5).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def attend(n, x, s):
        q = (p[f"{n}.q_proj.weight"] @ x[s]).view(3, 4)
        parts = []
        for h in range(3):
            k, v = (
                [(p[f"{n}.{m}_proj.weight"] @ x[r]).view(3, 4)[h] for r in range(s + 1)]
                for m in "kv"
            )
            weights = [(q[h] @ one / math.sqrt(4)).exp() for one in k]
            parts.append(sum(w * one for w, one in zip(weights, v)) / sum(weights))
        return p[f"{n}.o_proj.weight"] @ torch.cat(parts)

    logits = []
    for b in range(B):
        h = [
            p["embed_tokens.weight"][tokens_BS[b, s]] + p["embed_positions.weight"][s]
            for s in range(S)
        ]
        for i in range(2):
            x = [norm(row, f"layers.{i}.input_layernorm") for row in h]
            h = [row + attend(f"layers.{i}.self_attn", x, s) for s, row in enumerate(h)]
            for s, row in enumerate(h):
                up = p[f"layers.{i}.mlp.up_proj.weight"] @ norm(
                    row, f"layers.{i}.post_attention_layernorm"
                )
                h[s] = row + p[f"layers.{i}.mlp.down_proj.weight"] @ (
                    up * (1 + torch.erf(up / 2**0.5)) / 2
                )
        logits.append(torch.stack([p["embed_tokens.weight"] @ norm(row, "norm") for row in h]))
    return torch.stack(logits)


def test_gpt2_equals_a_loop():
    model = make(GPT2).double()
    tokens, labels, mask = batch(S=7)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    p = {n: q.detach().clone().requires_grad_() for n, q in model.named_parameters()}
    logits = reference_gpt2(p, tokens)
    torch.testing.assert_close(model(tokens).logits, logits)

    total = 0.0
    for b in range(2):
        for s in range(7):
            total = (
                total
                - (logits[b, s, labels[b, s]] - logits[b, s].exp().sum().log()) * mask[b, s]
            )
    (total / mask.sum()).backward()
    out = model(tokens, labels, mask)
    torch.testing.assert_close(out.lm_loss, total / mask.sum())
    out.loss.backward()
    for name, q in model.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, msg=lambda m, n=name: f"{n}: {m}")


# ---- what a token may depend on


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_logits_do_not_see_later_tokens(config):
    model = make(config)
    tokens, *_ = batch(S=8)
    before = model(tokens).logits
    for t in range(8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_packed_documents_are_separate(config):
    model = make(config)
    tokens, *_ = batch(B=1, S=8)
    segments, positions = (
        torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]),
        torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
    )
    packed = model(tokens, position_ids_BS=positions, segments_BS=segments).logits
    changed = tokens.clone()
    changed[:, :3] = (changed[:, :3] + 1) % V
    assert torch.equal(
        model(changed, position_ids_BS=positions, segments_BS=segments).logits[:, 3:],
        packed[:, 3:],
    )
    assert not torch.equal(
        model(changed, position_ids_BS=positions).logits[:, 3:], packed[:, 3:]
    )
    alone = torch.cat([model(tokens[:, :3]).logits, model(tokens[:, 3:]).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("untied", [False, True])
@torch.no_grad()
def test_logits_of_chosen_tokens(untied):
    model = make(dataclasses.replace(LLAMA, untie_embeddings_and_output_weights=untied))
    tokens, *_ = batch(B=3, S=8)
    logits = model(tokens).logits
    chosen = model(tokens, logits_at_BK=torch.tensor([[7, 2], [0, 1], [3, 3]])).logits
    expected = torch.stack([logits[0, [7, 2]], logits[1, [0, 1]], logits[2, [3, 3]]])
    torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-6)


def test_too_long_sequence_is_refused():
    model = make(dataclasses.replace(LLAMA, seq_length=4, max_position_embeddings=6))
    assert model(torch.zeros(1, 6, dtype=torch.int64)).logits.shape == (1, 6, V)
    with pytest.raises(ValueError, match="sequence length is 7; allowed: 1 to 6 positions"):
        model(torch.zeros(1, 7, dtype=torch.int64))


# ---- the loss


def test_loss_mask_weights_the_tokens():
    model = make()
    tokens, labels, mask = batch()
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(
        labels
    )
    torch.testing.assert_close(model(tokens, labels, mask).loss, loss[mask > 0].mean())
    torch.testing.assert_close(model(tokens, labels, 0.01 * mask).loss, loss[mask > 0].mean())
    torch.testing.assert_close(model(tokens, labels).loss, loss.mean())
    out = model(tokens, labels, torch.zeros_like(mask))
    out.loss.backward()
    assert out.loss == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())
    assert out.logits is None and model(tokens).loss is None and model(tokens).lm_loss is None


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 3)])
def test_aux_loss_and_carry_pass_through(reduction, divisor):
    config = dataclasses.replace(LLAMA, num_layers=4)
    ffn = moe_layers(config, {0, 2, 3})
    model = make(config, make_ffn=ffn, aux_loss_reduction=reduction)
    tokens, labels, mask = batch()
    norms, hooks = [], []
    for i in (0, 2, 3):
        hooks.append(
            model.layers[i].post_attention_layernorm.register_forward_hook(
                lambda m, a, y: norms.append(y)
            )
        )
    out = model(tokens, labels, mask, progress=0.5)
    aux = [(1.0 + i) * x.square().mean() for i, x in zip((0, 2, 3), norms)]
    torch.testing.assert_close(out.aux_loss, sum(aux) / divisor)
    torch.testing.assert_close(out.loss, out.lm_loss + out.aux_loss)
    assert [model.layers[i].mlp.seen[0][1] for i in (0, 2, 3)] == [None, 1, 2]
    for i in (0, 2, 3):
        assert (
            model.layers[i].mlp.seen[0][0] is tokens and model.layers[i].mlp.seen[0][2] == 0.5
        )
    dense = make()(tokens, labels)
    assert (
        dense.aux_loss == 0
        and dense.aux_loss.dtype == torch.float32
        and dense.loss == dense.lm_loss
    )


def test_softmax_includes_padded_vocabulary():
    config = ModelConfig(
        num_layers=1, hidden_size=32, seq_length=16, make_vocab_size_divisible_by=64
    )
    model = GPT(config, config.padded_vocab(V), make_ffn=lambda i: MLP(32, 64, "gelu"))
    model.init_weights(0)
    tokens, labels, _ = batch()
    out = model(tokens, labels)
    logits = model(tokens).logits
    assert logits.shape == (2, 16, 64)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )
    out.loss.backward()
    assert (model.embed_tokens.weight.grad[V:].abs().sum(1) > 0).all(), (
        "the logits of padding should be trained too"
    )


# ---- training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_changes_no_bit(dropout):
    config = dataclasses.replace(LLAMA, hidden_dropout=dropout, attention_dropout=dropout)
    tokens, labels, mask = batch()
    results = []
    for recompute in (False, True):
        model = make(config, make_ffn=moe_layers(config, {1}), recompute=recompute)
        torch.manual_seed(5)
        out = model(tokens, labels, mask)
        out.loss.backward()
        runs = len(model.layers[1].mlp.seen)
        assert runs == (2 if recompute else 1), (
            "the block should run again in the backward pass only with recompute"
        )
        results.append((out.loss, {n: p.grad.clone() for n, p in model.named_parameters()}))
        model.eval()(tokens, labels).loss.backward()
        assert len(model.layers[1].mlp.seen) == runs + 1
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_embedding_dropout_applies_in_training_only():
    model, plain = make(dataclasses.replace(LLAMA, hidden_dropout=0.5)), make()
    tokens, *_ = batch()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(tokens)
    dropped = (seen[0] == 0).float().mean()
    assert 0.3 < dropped < 0.7
    assert torch.equal(model.eval()(tokens).logits, plain(tokens).logits)


def test_bf16_model_stays_close_to_fp32():
    tokens, labels, _ = batch()
    expected, model = make()(tokens, labels).loss, make().bfloat16()
    out = model(tokens, labels)
    assert out.loss.dtype == torch.float32 and model(tokens).logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss, expected, rtol=0.03, atol=0)


# ---- initial weights


def test_initial_weights_have_configured_std():
    config = dataclasses.replace(
        GPT2,
        num_layers=8,
        hidden_size=96,
        ffn_hidden_size=0,
        untie_embeddings_and_output_weights=True,
    )
    attention = AttentionConfig(
        add_qkv_bias=True, attention_output_bias=True, attention_sinks=True, qk_norm="head"
    )
    model = make(config, std=0.02, attention=attention)
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith(("proj.bias", "sinks")) for name in names) == 5 * 8
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(
                p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)
            ), name
            continue
        if name.endswith(("bias", "sinks")):
            assert not p.any(), name
            continue
        std = 0.02 / math.sqrt(16) if "o_proj" in name or "down_proj" in name else 0.02
        assert abs(p.std() / std - 1) < 0.12 and p.mean().abs() < 0.2 * std, name
    assert not torch.equal(
        model.layers[0].self_attn.q_proj.weight, model.layers[1].self_attn.q_proj.weight
    )


def test_weight_depends_on_seed_and_name():
    torch.manual_seed(0)
    first = dict(make().named_parameters())
    torch.manual_seed(1)
    again = make(recompute=True)
    again.init_weights(0)
    mixed = make(make_ffn=moe_layers(LLAMA, {1}))
    other = dict(make(seed=1).named_parameters())
    for model in (again, mixed):
        for name, p in model.named_parameters():
            if name != "layers.1.mlp.weight":
                assert torch.equal(p, first[name]), name
    assert not any(
        torch.equal(p, other[name]) for name, p in first.items() if "norm" not in name
    )
    assert torch.equal(mixed.layers[1].mlp.weight, torch.full((32,), 2.0)), (
        "changed, although the module initialises itself"
    )


def test_initial_weights_ignore_expert_sharding():
    config = dataclasses.replace(LLAMA, make_vocab_size_divisible_by=1)
    moe = MoEConfig(num_experts=4, moe_shared_experts=1, moe_expert_parallel_size=2)

    def weights(**groups):
        torch.manual_seed(len(groups))
        model = build_model(config, moe, {}, vocab_size=V, seed=3, groups=Groups(**groups))
        return {n: p.detach() for n, p in model.named_parameters()}

    unsharded = weights()
    shards = [weights(rank=rank, world_size=2, ep_size=2) for rank in (0, 1)]
    assert any(".shared." in name for name in unsharded)
    for name, w in unsharded.items():
        parts = [shard[name] for shard in shards]
        if ".experts." in name:
            assert torch.equal(w, torch.cat(parts)), name
        else:
            assert torch.equal(w, parts[0]) and torch.equal(w, parts[1]), name
