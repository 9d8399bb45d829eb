"""Attention against a loop over queries, heads and keys."""

import math

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.model.attention import Attention
from megatron.model.attention_context import AttentionContext
from megatron.model.document_attention import DocumentLayout
from megatron.model.rotary import Rotary


def reference_attention(p, x_BSD, heads, groups, rotation, segments_BS):
    """Attend one query, one head and one key at a time."""
    B, S, _ = x_BSD.shape
    K = p["q_proj.weight"].shape[0] // heads

    def project(name, count):
        y = torch.stack(
            [torch.stack([p[name] @ x_BSD[b, s] for s in range(S)]) for b in range(B)]
        )
        return y.view(B, S, count, K)

    q, k, v = (
        project("q_proj.weight", heads),
        project("k_proj.weight", groups),
        project("v_proj.weight", groups),
    )
    if rotation is not None:
        q, k = (rotation.apply(t.transpose(1, 2)).transpose(1, 2) for t in (q, k))
    rows = []
    for b in range(B):
        for s in range(S):
            parts = []
            for h in range(heads):
                g = h // (heads // groups)
                seen = [
                    r
                    for r in range(s + 1)
                    if segments_BS is None or segments_BS[b, r] == segments_BS[b, s]
                ]
                weights = [(q[b, s, h] @ k[b, r, g] / math.sqrt(K)).exp() for r in seen]
                parts.append(sum(w * v[b, r, g] for w, r in zip(weights, seen)) / sum(weights))
            rows.append(p["o_proj.weight"] @ torch.cat(parts))
    return torch.stack(rows).view(B, S, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_a_loop(groups, rope, packed, document_path):
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=12,
        num_attention_heads=4,
        num_query_groups=groups,
        kv_channels=6,
        seq_length=7,
    )
    attention = Attention(config).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 3]]) if packed else None
    rotation = Rotary(6, 7)(7) if rope else None
    weight = torch.randn(2, 7, 12, dtype=torch.float64)

    documents = None if segments is None else DocumentLayout(segments)
    y = attention(x, AttentionContext(rotation, documents))
    (y * weight).sum().backward()
    p = {name: q.detach().clone().requires_grad_() for name, q in attention.named_parameters()}
    x_again = x.detach().clone().requires_grad_()
    expected = reference_attention(p, x_again, 4, groups, rotation, segments)
    (expected * weight).sum().backward()

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_again.grad)
    for name, q in attention.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_one_document_is_plain_causal_attention(document_path):
    torch.manual_seed(1)
    attention = Attention(ModelConfig(hidden_size=16, num_attention_heads=2, seq_length=9))
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(
        attention(x),
        attention(x, AttentionContext(documents=DocumentLayout(torch.full((2, 9), 4)))),
    )


def test_dropout_applies_in_training_only():
    torch.manual_seed(2)
    attention = Attention(
        ModelConfig(hidden_size=16, num_attention_heads=2, seq_length=8, attention_dropout=0.5)
    )
    plain = Attention(ModelConfig(hidden_size=16, num_attention_heads=2, seq_length=8))
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(1, 8, 16)
    assert not torch.equal(attention(x), attention(x))
    assert torch.equal(attention.eval()(x), plain(x))
    mean = attention.train()(x.expand(4000, 8, 16)).mean(0)
    assert (mean - plain(x)).abs().max() < 0.05 * plain(x).abs().max(), (
        "dropout changes the expectation"
    )
