"""Residual structure, dropout and context of a transformer block."""

import torch
from torch import nn

from megatron.config.schema import ModelConfig
from megatron.model.block import Block
from megatron.model.mlp import MLP
from megatron.moe.ffn import FFNContext, FFNOutput

CONFIG = ModelConfig(hidden_size=8, num_attention_heads=2, seq_length=5)


class Recorder(nn.Module):
    """A feed-forward layer that records its inputs and returns y = 2x, aux_loss 7, carry 1."""

    def forward(self, x, context):
        self.x, self.context = x, context
        return FFNOutput(2 * x, torch.tensor(7.0), torch.ones(3))


def test_block_has_pre_norm_residuals():
    torch.manual_seed(0)
    block = Block(CONFIG, MLP(8, 12, "gelu")).double()
    for p in block.parameters():
        p.data.normal_()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    y, aux, carry = block(h)
    assert aux is None and carry is None

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    middle = h + block.self_attn(rms(h, block.input_layernorm.weight))
    torch.testing.assert_close(
        y, middle + block.mlp(rms(middle, block.post_attention_layernorm.weight)).y
    )


def test_ffn_context_and_carry_pass_through():
    torch.manual_seed(0)
    ffn = Recorder()
    block = Block(CONFIG, ffn)
    context = FFNContext(torch.zeros(2, 5, dtype=torch.int64), torch.ones(1), 0.25)
    y, aux, carry = block(torch.randn(2, 5, 8), None, context)
    assert ffn.context is context
    assert aux == 7 and torch.equal(carry, torch.ones(3)) and y.shape == (2, 5, 8)
    block(torch.randn(2, 5, 8))
    assert ffn.context.token_ids_BS is None, (
        "without a context the layer should get an empty one"
    )


def test_hidden_dropout_applies_in_training_only():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=8, num_attention_heads=2, seq_length=5, hidden_dropout=0.5)
    dropped, plain = Block(config, Recorder()), Block(CONFIG, Recorder())
    plain.load_state_dict(dropped.state_dict())
    h = torch.randn(2, 5, 8)
    dropped(h)
    attended = dropped.mlp.x  # norm(h + dropout(attention))
    dropped(h)
    assert not torch.equal(attended, dropped.mlp.x)
    assert torch.equal(dropped.eval()(h)[0], plain(h)[0])
    dropped.train().self_attn.o_proj.weight.data.zero_()
    y, *_ = dropped(h)
    assert 0.2 < (y == h).float().mean() < 0.8, "dropout of the feed-forward branch"
