"""Attention with cached keys and values against the forward pass over complete sequences."""

import pytest
import torch

from helpers.list_cache import ListCache
from megatron.config.schema import AttentionConfig, ModelConfig
from megatron.model.attention_context import VisibleKeys
from megatron.model.gpt import GPT
from megatron.model.mlp import MLP

V = 30
ROPE = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, seq_length=12
)
LEARNED = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=12,
    position_embedding_type="learned",
)
OPTIONS = AttentionConfig(
    add_qkv_bias=True,
    attention_output_bias=True,
    qk_norm="head",
    attention_sinks=True,
    window_size=4,
    window_layers=(1,),
)
CASES = {"rope": (ROPE, None), "learned": (LEARNED, None), "options": (ROPE, OPTIONS)}


def make(config: ModelConfig, attention: AttentionConfig | None = None) -> GPT:
    ffn_size = config.ffn_size
    model = GPT(
        config, V, make_ffn=lambda i: MLP(16, ffn_size, config.act), attention=attention
    )
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 1, 1, 1, 1], [5, 4, 3]])
@torch.no_grad()
def test_cached_chunks_equal_one_pass(case, chunks):
    config, attention = CASES[case]
    model = make(config, attention)
    tokens_BS = torch.randint(0, V, (2, 12))
    cache = ListCache(config.num_layers, 2)
    logits = []
    for chunk_BS in tokens_BS.split(chunks, dim=1):
        cache.add([chunk_BS.shape[1]] * 2)
        logits.append(model(chunk_BS, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens_BS).logits)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_ragged_rows_equal_rows_alone(case):
    """Prompts of other lengths are padded on the right; the next token replaces the padding."""
    config, attention = CASES[case]
    model = make(config, attention)
    prompts = [torch.randint(0, V, (n,)) for n in (3, 6, 1)]
    steps_BS = torch.randint(0, V, (3, 4))
    cache = ListCache(config.num_layers, 3)
    cache.add([3, 6, 1])
    padded_BS = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7)
    padding_BS = torch.arange(6) >= torch.tensor([[3], [6], [1]])
    model(padded_BS, padding_BS=padding_BS, cache=cache)
    logits = []
    for step_B in steps_BS.unbind(1):
        cache.add([1, 1, 1])
        logits.append(model(step_B[:, None], cache=cache).logits)
    logits_BSV = torch.cat(logits, 1)
    for i, prompt in enumerate(prompts):
        row = torch.cat((prompt, steps_BS[i]))[None]
        torch.testing.assert_close(logits_BSV[i], model(row).logits[0, -4:])


@pytest.mark.parametrize("attention", [None, OPTIONS], ids=["plain", "options"])
@torch.no_grad()
def test_keys_of_padding_are_not_seen(attention):
    """Rows padded on the left, as transformers does: positions then differ from slots."""
    model = make(ROPE, attention)
    row = torch.randint(0, V, (1, 8))
    padded_BS = torch.cat((torch.zeros(1, 2, dtype=torch.int64), row), 1)
    position_ids_BS = torch.tensor([[0, 0, *range(8)]])
    cache = ListCache(ROPE.num_layers, 1)
    logits = []
    for first, last in ((0, 6), (6, 9), (9, 10)):
        cache.add([last - first])
        cache.is_key_BL = torch.arange(last)[None] >= 2
        out = model(
            padded_BS[:, first:last],
            position_ids_BS=position_ids_BS[:, first:last],
            cache=cache,
        )
        logits.append(out.logits)
    logits_BSV = torch.cat(logits, 1)
    assert logits_BSV.isfinite().all(), "a query of padding should see itself"
    torch.testing.assert_close(logits_BSV[:, 2:], model(row).logits)


def test_mask_has_keys_up_to_the_own():
    visible = VisibleKeys(torch.tensor([[2, 3], [0, 1]]), torch.tensor([[0, 1, 1, 1]] * 2) > 0)
    expected = [[[0, 1, 1, 0], [0, 1, 1, 1]], [[1, 0, 0, 0], [0, 1, 0, 0]]]
    assert visible.mask(4).int().squeeze(1).tolist() == expected
    assert visible.mask(4) is visible.mask(4), "made again for another layer"
    windowed = [[[0, 0, 1, 0], [0, 0, 0, 1]], [[1, 0, 0, 0], [0, 1, 0, 0]]]
    assert visible.mask(4, window=1).int().squeeze(1).tolist() == windowed
    assert VisibleKeys(torch.arange(3)[None]).mask(3) is None


@torch.no_grad()
def test_too_many_cached_tokens_are_refused():
    model = make(ROPE)
    cache = ListCache(ROPE.num_layers, 1)
    cache.add([12])
    model(torch.zeros(1, 12, dtype=torch.int64), cache=cache)
    cache.add([1])
    with pytest.raises(ValueError, match="sequence length is 13; allowed: 1 to 12 positions"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
