"""Losses that a gate returns by name, and those of its logits: added, logged and reduced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.moe_layers import E, make_input, make_layer
from helpers.outside_gates import restored_registry
from megatron.moe import Gate, LossConfig, Routing, RoutingScores, linear_fp32
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.gate_update import GateUpdater
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups


@pytest.fixture
def gate():
    """Register a gate that returns logits, and two named losses if `extra` is set."""
    with restored_registry():

        class NamedLosses(Gate, name="outside_losses"):
            Config = LossConfig
            extra = True

            def __init__(self, config, context):
                super().__init__(config, context)
                self.router = self.make_router()

            def forward(self, inp):
                logits_TE = linear_fp32(inp.x_TD, self.router)
                weight_T, expert_T = logits_TE.softmax(-1).max(-1)
                token_T = torch.arange(len(expert_T))
                losses = {}
                if self.extra:
                    losses = {
                        "mean": logits_TE.mean(),
                        "square": 0.5 * logits_TE.square().mean(),
                    }
                return Routing(
                    token_T,
                    expert_T,
                    weight_T,
                    logits_TE.sum() * 0 + 0.25,
                    logits_TE=logits_TE,
                    losses=losses,
                )

        yield NamedLosses


def expected_losses(layer, x_TD, coeff):
    """The same losses in float64, one token at a time."""
    logits = [layer.gate.router.weight.double() @ x for x in x_TD.double()]
    z_loss = sum(torch.log(sum(torch.exp(v) for v in z)) ** 2 for z in logits) / len(logits)
    values = torch.cat(logits)
    return {
        "moe_z_loss": coeff * z_loss,
        "moe_mean": sum(values) / len(values),
        "moe_square": 0.5 * sum(v * v for v in values) / len(values),
    }


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_are_added_and_logged(gate, reduction):
    """Value, router's gradient, and metrics of two layers by name."""
    layers = [
        make_layer("outside_losses", seed=i, options={"z_loss_coeff": 0.1}) for i in (0, 1)
    ]
    model = nn.ModuleList(layers)
    model.aux_loss_reduction = reduction
    metrics = MoEMetrics(model, Groups())
    x, _ = make_input(7)
    by_layer = []
    for layer in layers:
        expected = expected_losses(layer, x[0], 0.1)
        total = 0.25 + sum(expected.values())
        aux_loss = layer(x).aux_loss
        assert aux_loss.item() == pytest.approx(total.item(), rel=1e-5)
        (got,) = torch.autograd.grad(aux_loss, layer.gate.router.weight)
        (want,) = torch.autograd.grad(total, layer.gate.router.weight)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        by_layer.append({**expected, "moe_aux_loss": total})
    row = metrics.read()
    for name in by_layer[0]:
        values = [losses[name].item() for losses in by_layer]
        assert row[f"{name}_by_layer"] == pytest.approx(values, rel=1e-5)
        divisor = 1 if reduction == "sum" else 2
        assert row[name] == pytest.approx(sum(values) / divisor, rel=1e-5)


def test_logits_have_no_rows_for_padding(gate):
    """The losses and gradients of a padded batch are those of its tokens alone."""
    x, ids = make_input(7)
    padding_BS = torch.tensor([[False, True, False, False, True, False, True]])
    results = []
    for tokens, padding in ((x, padding_BS), (x[:, ~padding_BS[0]], None)):
        layer = make_layer("outside_losses", options={"z_loss_coeff": 0.1})
        aux_loss = layer(tokens, FFNContext(layout=TokenLayout(padding))).aux_loss
        aux_loss.backward()
        results.append((aux_loss, layer.gate.router.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_layers_may_have_different_losses(gate):
    """A name that one layer lacks is reduced over the others."""
    layers = [make_layer(name, options={"z_loss_coeff": 0.1}) for name in ("topk", gate.name)]
    metrics = MoEMetrics(nn.ModuleList(layers), Groups())
    for layer in layers:
        layer(make_input(5)[0])
    row = metrics.read()
    assert row["moe_square_by_layer"] == [None, row["moe_square"]]


def test_zero_coefficient_has_no_z_loss(gate, monkeypatch):
    monkeypatch.setattr(gate, "extra", False)
    layer = make_layer("outside_losses")
    assert layer(make_input(5)[0]).aux_loss.item() == 0.25
    assert not [name for name in layer.counters[True] if name.startswith("loss/z")]


def test_second_z_loss_is_refused(gate, monkeypatch):
    """A gate whose logits the layer has must not add the loss by the same name."""
    layer = make_layer("outside_losses", options={"z_loss_coeff": 0.1})
    forward = type(layer.gate).forward

    def with_own(self, inp):
        routing = forward(self, inp)
        routing.losses["z_loss"] = routing.aux_loss
        return routing

    monkeypatch.setattr(gate, "forward", with_own)
    with pytest.raises(AssertionError, match="the layer adds the z-loss"):
        layer(make_input(5)[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logits_TE": torch.zeros(3)}, r"logits_TE has shape \(3,\); allowed: \(3, experts\)"),
        ({"logits_TE": torch.zeros(2, E)}, r"logits_TE has shape \(2, 4\); allowed: \(3, exp"),
        ({"scores": RoutingScores(torch.zeros(2, E))}, r"scores.ranked_TC has shape \(2, 4\)"),
        ({"scores": RoutingScores(share_TC=torch.zeros(3, E).half())}, "scores.share_TC is"),
        (
            {"scores": RoutingScores(selected_Tk=torch.zeros(3, 2))},
            "scores.selected_Tk is torch.float32; allowed: torch.int64",
        ),
        ({"logits_TE": torch.zeros(3, E).half()}, "logits_TE is torch.float16; allowed"),
        ({"losses": {"a b": torch.zeros(())}}, "losses has the name 'a b'; allowed: a Python"),
        ({"losses": {"aux_loss": torch.zeros(())}}, "losses has the name 'aux_loss'"),
        ({"losses": {"a": torch.zeros(1)}}, "loss 'a' must be a 0-d fp32 tensor, got 1-d"),
        ({"losses": {"a": torch.zeros(()).double()}}, "0-d fp32 tensor, got 0-d torch.float64"),
        ({"losses": {"a": torch.tensor(torch.nan)}}, "the loss 'a' has 1 of 1 values that are"),
    ],
)
def test_check_refuses_wrong_losses(fields, message):
    index = torch.arange(3)
    routing = Routing(index, index, torch.ones(3), torch.zeros(()), **fields)
    with pytest.raises(AssertionError, match=message):
        routing.check(3, E)


def test_updater_is_not_disturbed(gate):
    """The sums of a step have no losses; a gate without state is not updated."""
    layer = make_layer("outside_losses", options={"z_loss_coeff": 0.1})
    layer(make_input(5)[0])
    assert not [name for name in layer.step_sums if name.startswith("loss/")]
    GateUpdater(nn.ModuleList([layer]), Groups()).post_optimizer_step()
    assert layer.step_sums == {}
