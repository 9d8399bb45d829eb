"""Auxiliary losses over MoE layers: a router's gradient has the scale of Megatron's coefficient.

All MoE layers of the model under test have the same input and the same router: their experts and
attention return zeros. So each router's gradient is that of one layer's losses.

Shape suffixes: T tokens, D hidden, E experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import engines
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups

E = 4
COEFF = 0.3
Z_COEFF = 0.2
VOCAB = 50
OPTIONS = {
    "topk": {"topk": 2, "z_loss_coeff": Z_COEFF},
    "threshold": {"threshold": 0.5, "z_loss_coeff": Z_COEFF},
}


def model_of(num_layers: int, gate: str, reduction: str = "sum", recompute: bool = False):
    """Return a model whose blocks add nothing to the residual stream."""
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        seq_length=12,
        ffn_hidden_size=8,
        init_method_std=1.0,
    )
    model = build_model(
        config,
        MoEConfig(num_experts=E, gate=gate, moe_aux_loss_reduction=reduction),
        {gate: {"loss_coeff": COEFF, **OPTIONS[gate]}},
        vocab_size=VOCAB,
        seed=3,
        groups=Groups(),
        recompute=recompute,
    )
    layers = find_moe_layers(model)
    with torch.no_grad():
        for block, layer in zip(model.layers, layers, strict=True):
            block.self_attn.o_proj.weight.zero_()
            layer.experts.w2.zero_()
            layer.gate.router.weight.copy_(layers[0].gate.router.weight)
    return model, [layer.gate for layer in layers]


def tokens(number: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(number))


def megatron_losses(x_TD, weight_ED, gate: str) -> torch.Tensor:
    """Return balance loss and z-loss of one layer, with Megatron's normalization, in fp64.

    XMoE's balance loss counts first choices, so that its k is 1.
    """
    logits_TE = x_TD @ weight_ED.t()
    probs_TE = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
    k = 2 if gate == "topk" else 1
    num_tokens = len(x_TD)
    tokens_per_expert = [0] * E
    for row in probs_TE.tolist():
        for expert in sorted(range(E), key=lambda e: -row[e])[:k]:
            tokens_per_expert[expert] += 1
    sums_E = probs_TE.sum(0)
    product = sum(sums_E[e] * tokens_per_expert[e] for e in range(E))
    balance = product * E * COEFF / (k * num_tokens * num_tokens)
    z = (logits_TE.exp().sum(-1).log() ** 2).sum() / num_tokens
    return balance + Z_COEFF * z


def reference(model, weight_ED, ids, gate: str) -> tuple[float, torch.Tensor]:
    """Return the losses of one layer and the gradient of its router."""
    h_TD = F.embedding(ids[:, :-1], model.embed_tokens.weight).flatten(0, 1).double()
    norm = model.layers[0].post_attention_layernorm
    x_TD = h_TD / (h_TD.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    weight_ED = weight_ED.detach().double().requires_grad_()
    loss = megatron_losses(x_TD.detach(), weight_ED, gate)
    loss.backward()
    return loss.item(), weight_ED.grad.float()


@pytest.mark.parametrize("gate", ["topk", "threshold"])
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("num_layers", [1, 4, 12])
def test_router_gradient_has_megatrons_scale(num_layers, reduction, recompute, gate):
    """It does not depend on the number of layers with sum, and is divided by it with mean."""
    model, gates = model_of(num_layers, gate, reduction, recompute)
    ids = tokens()
    loss, expected = reference(model, gates[0].router.weight, ids, gate)
    divisor = num_layers if reduction == "mean" else 1
    out = model(ids[:, :-1], ids[:, 1:])
    assert out.aux_loss.item() == pytest.approx(num_layers * loss / divisor, rel=1e-4)
    out.loss.backward()
    assert expected.abs().max() > 0.01
    for layer_gate in gates:
        torch.testing.assert_close(
            layer_gate.router.weight.grad, expected / divisor, rtol=1e-4, atol=1e-6
        )
    metrics = MoEMetrics(model, Groups()).read()
    assert metrics["moe_aux_loss_by_layer"] == pytest.approx([loss] * num_layers, rel=1e-4)
    assert metrics["moe_aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_micro_batches_add_up(reduction):
    """The gradient of two micro-batches is the sum of theirs, as for every other loss."""
    model, gates = model_of(4, "topk", reduction)
    total = torch.zeros_like(gates[0].router.weight)
    for number in (0, 1):
        ids = tokens(number)
        total += reference(model, gates[0].router.weight, ids, "topk")[1]
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    divisor = 4 if reduction == "mean" else 1
    for layer_gate in gates:
        torch.testing.assert_close(
            layer_gate.router.weight.grad, total / divisor, rtol=1e-4, atol=1e-6
        )


def step_and_evaluate(reduction: str) -> dict[str, float]:
    """Run one step of four micro-batches and an evaluation in a rank."""
    from megatron.training.task import NextTokenLoss

    run = engines.Run(config(reduction))
    try:
        batches = engines.micro_batches(0, run.groups)
        losses = run.engine.step(batches, NextTokenLoss(), 0.0, 0.0)
        return {
            "norm": run.engine.grad_norm(),
            "aux": float(losses["aux_loss"]),
            "train": run.engine.metrics.read(),
            "losses": run.engine.evaluate(batches, NextTokenLoss(), 0.0),
            "eval": run.engine.metrics.read(training=False),
        }
    finally:
        run.close()


def config(reduction: str):
    base = engines.config_of("topk", 1, 1)
    moe = replace(base.moe, moe_aux_loss_reduction=reduction)
    return replace(base, moe=moe, gate_options={"topk": {"loss_coeff": 2.0}})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("world", ["ranks1", "ranks2"])
def test_engine_keeps_scale_and_metrics(world, reduction, request):
    """Gradient norm, losses and metrics of four micro-batches, on one rank and on two."""
    results = request.getfixturevalue(world).run(step_and_evaluate, reduction)
    model = engines.build(config(reduction))
    aux_losses = []
    for batch in engines.micro_batches(0, Groups()):
        out = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
        aux_losses.append(out.aux_loss.item())
        (out.loss / engines.GLOBAL_BATCH).backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    norm = float(sum(squares)) ** 0.5
    mean = sum(aux_losses) / len(aux_losses)
    assert mean > 1.9 * (2 if reduction == "sum" else 1), "two layers, coefficient 2"
    assert sum(r["aux"] for r in results) / len(results) == pytest.approx(mean, rel=1e-4)
    for result in results:
        assert result["norm"] == pytest.approx(norm, rel=1e-3)
        for metrics in (result["train"], result["eval"]):
            by_layer = metrics["moe_aux_loss_by_layer"]
            assert len(by_layer) == 2
            expected = sum(by_layer) / (2 if reduction == "mean" else 1)
            assert metrics["moe_aux_loss"] == pytest.approx(expected, rel=1e-6)
            assert metrics["moe_aux_loss"] == pytest.approx(mean, rel=1e-4)
        assert result["losses"]["aux_loss"] == pytest.approx(mean, rel=1e-4)
