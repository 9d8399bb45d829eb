"""Activation recompute of a model: counts and losses of gates are those of the first pass."""

import pytest
import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer_sums import find_moe_layers
from megatron.parallel.groups import Groups

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=12,
    activation="swiglu",
    ffn_hidden_size=24,
    init_method_std=0.3,
)


def train(gate, recompute, options):
    """Train one step of two micro-batches.

    Returns:
        Losses, gradients, counts of the step and the gates' buffers after it, by name.
    """
    moe = MoEConfig(num_experts=4, gate=gate, moe_ffn_hidden_size=8)
    model = build_model(
        MODEL, moe, {gate: options}, vocab_size=64, seed=1, groups=Groups(), recompute=recompute
    )
    gate_updater = GateUpdater(model, Groups())
    losses = []
    for number in (0, 1):
        ids = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(number))
        out = model(ids[:, :-1], ids[:, 1:])
        out.loss.backward()
        losses += [out.lm_loss.detach(), out.aux_loss.detach()]
    result = {f"loss {i}": loss for i, loss in enumerate(losses)}
    result |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    for i, layer in enumerate(find_moe_layers(model)):
        assert layer.counters[True]["tokens"] == 2 * 24
        result |= {f"{i} {name}": t for name, t in layer.step_sums.items()}
    gate_updater.post_optimizer_step()
    return result | {f"buffer {name}": b for name, b in model.named_buffers()}


@pytest.mark.parametrize(
    "gate, options",
    [
        ("topk", {"balance_scope": "global-batch", "loss_coeff": 0.5, "jitter": 0.1}),
        ("moepp", {"balance_scope": "global-batch", "loss_coeff": 0.5}),
        (
            "deepseek_v3",
            {"bias_update_speed": 0.1, "balance_scope": "global-batch", "loss_coeff": 0.5},
        ),
        ("remoe", {"lambda_init": 0.1}),
        ("peer", {}),
    ],
)
def test_recompute_changes_nothing(gate, options):
    """Without early stop the recomputed pass runs the full block, as it does where something after
    the gate needs it."""
    torch.manual_seed(0)
    plain = train(gate, False, options)
    torch.manual_seed(0)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        recomputed = train(gate, True, options)
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        other = recomputed[name]
        assert value is None and other is None or torch.equal(value, other), name


def test_retained_graph_recomputes_twice():
    model = build_model(
        MODEL,
        MoEConfig(num_experts=4),
        {},
        vocab_size=64,
        seed=1,
        groups=Groups(),
        recompute=True,
    )
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    first, second = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
