"""Training with multi-head latent attention on several ranks and under every ZeRO stage."""

from dataclasses import replace

import pytest
import torch

from helpers import engines
from helpers.list_cache import ListCache
from megatron.config.schema import AttentionConfig, RotaryConfig
from megatron.engine.optimizer import parameter_groups

LATENT = AttentionConfig(
    attention="mla",
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=8,
    add_qkv_bias=True,
)
YARN = RotaryConfig(rope_scaling="yarn", yarn_mscale_all_dim=0.7)


def config_of(ep_size: int, stage: int, **checkpoint):
    config = engines.config_of("topk", ep_size, stage, **checkpoint)
    return replace(config, attention=LATENT, rotary=YARN)


def _train(config, recompute):
    run = engines.Run(config)
    run.engine.model.recompute = recompute
    try:
        losses = run.steps(3)
        run.save()
        return losses
    finally:
        run.close()


@pytest.fixture(scope="module")
def alone(ranks1, tmp_path_factory):
    """Losses of a run on one rank, and its tensors after three steps."""
    folder = tmp_path_factory.mktemp("alone")
    (losses,) = ranks1.run(_train, config_of(1, 1, save=str(folder)), False)
    return losses, engines.full_tensors(folder)


@pytest.mark.parametrize(
    "ep_size, stage, recompute", [(2, 1, True), (1, 2, False), (2, 3, True)]
)
def test_ranks_train_like_one(ep_size, stage, recompute, alone, ranks2, tmp_path):
    """Losses, weights and moments are those of one rank, with and without recompute."""
    config = config_of(ep_size, stage, save=str(tmp_path))
    losses, _ = ranks2.run(_train, config, recompute)
    expected_losses, expected = alone
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    tensors = engines.full_tensors(tmp_path)
    assert tensors.keys() == expected.keys()
    assert any("self_attn.kv_b_proj" in name for name in tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def _decode_under_zero3(config):
    """Return logits of one pass and of step-by-step decoding, in a rank."""
    run = engines.Run(config)
    try:
        run.steps(1)
        model = run.engine.model.eval()
        tokens_BS = torch.arange(12).view(2, 6)
        with torch.no_grad():
            expected = model(tokens_BS).logits
            cache = ListCache(2, 2)
            logits = []
            for token_B in tokens_BS.unbind(1):
                cache.add([1, 1])
                logits.append(model(token_B[:, None], cache=cache).logits)
        return torch.cat(logits, 1), expected
    finally:
        run.close()


def test_absorbed_weights_are_gathered(ranks2):
    """Under ZeRO 3 a rank holds a part of the weight that absorbed decoding reads."""
    for logits, expected in ranks2.run(_decode_under_zero3, config_of(1, 3)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_latent_norms_and_biases_do_not_decay():
    model = engines.build(config_of(1, 1))
    groups = parameter_groups(model, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    attention = model.layers[0].self_attn
    for name, parameter in attention.named_parameters():
        is_vector = "layernorm" in name or name.endswith("bias")
        assert (id(parameter) in decayed) != is_vector, name
