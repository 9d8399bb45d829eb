"""Expert biases of top-k gates: selection, rules, state, and which gates have any."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers.moe_layers import make_input, make_layer
from helpers.routings import step_totals
from megatron.config import cli
from megatron.moe import gate_update
from megatron.moe.gate import available_gates, create_gate, gate_config_class
from megatron.moe.gate_bias import BIAS_RULES, BiasRule
from megatron.moe.gate_update import GateUpdater
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups

BIASED = ["topk", "deepseek_v2", "deepseek_v3"]
D, E = 6, 8


def make(name, **options):
    options = {"topk": 3, "bias_rule": "sign", **options}
    return create_gate(name, hidden_size=D, num_experts=E, init_std=0.8, **options)


def scores(z, function):
    """Scores of a token's logits, in plain Python."""
    if function == "softmax":
        total = sum(math.exp(v) for v in z)
        return [math.exp(v) / total for v in z]
    if function == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in z]
    return [math.sqrt(math.log1p(math.exp(v))) for v in z]


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("bias_on", ["score", "logit"])
@pytest.mark.parametrize("norm", [False, True])
def test_bias_selects_with_every_score(name, function, bias_on, norm):
    """Experts by s + b or z + b, weights by s: against one token at a time."""
    gate = make(
        name,
        score_function=function,
        bias_on=bias_on,
        norm_topk_prob=norm,
        routed_scaling_factor=1.5,
    )
    gate.expert_bias.copy_(0.5 * torch.randn(E, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(2))
    out = gate(GateInput(x))
    out.check(40, E)
    bias = gate.expert_bias.double().tolist()
    differs = 0
    for t, z in enumerate((x.double() @ gate.router.weight.double().t()).tolist()):
        s = scores(z, function)
        base = z if bias_on == "logit" else s
        order = sorted(range(E), key=lambda e: -(base[e] + bias[e]))
        chosen = out.expert_A.view(40, 3)[t].tolist()
        assert chosen == order[:3]
        total = sum(s[e] for e in chosen) if norm else 1.0
        assert out.weight_A.view(40, 3)[t].tolist() == pytest.approx(
            [1.5 * s[e] / total for e in chosen], rel=1e-5
        )
        differs += set(chosen) != set(sorted(range(E), key=lambda e: -s[e])[:3])
    assert differs > 5, "the bias changes nothing"
    changed = out.metric_means["bias_changed_fraction"].item()
    assert 0 < changed < 1


@pytest.mark.parametrize("name", BIASED)
def test_sign_rule_moves_bias_by_speed(name):
    gate = make(name, bias_update_speed=0.25)
    gate.post_optimizer_step(step_totals(torch.tensor([9.0, 1, 4, 4, 4, 4, 4, 2]), None))
    assert gate.expert_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]


@pytest.mark.parametrize("name", BIASED)
def test_rule_none_has_no_bias(name):
    """Neither a buffer, so that checkpoints of topk and deepseek_v2 stay as they were, nor
    metrics, nor an update."""
    gate = make(name, bias_rule="none")
    assert list(gate.state_dict()) == ["router.weight"] and gate.expert_bias is None
    gate.post_optimizer_step(step_totals(torch.ones(E), None))
    x = torch.randn(9, D)
    out = gate(GateInput(x))
    assert "bias_changed_fraction" not in out.metric_means
    other = make(name)
    other.load_state_dict(gate.state_dict(), strict=False)
    assert torch.equal(other(GateInput(x)).expert_A, out.expert_A)
    assert torch.equal(other(GateInput(x)).weight_A, out.weight_A)


def test_defaults_keep_the_rules_of_the_papers():
    for name in BIASED:
        expected = "sign" if name == "deepseek_v3" else "none"
        assert gate_config_class(name)().bias_rule == expected


@pytest.mark.parametrize("name", BIASED)
def test_weights_have_no_gradient_through_bias(name):
    """The router learns from the unbiased scores of the experts that the bias selects."""
    gate = make(name, norm_topk_prob=False, score_function="sigmoid")
    gate.expert_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    x = torch.randn(5, D)
    gate(GateInput(x)).weight_A.sum().backward()
    weight = gate.router.weight.detach().clone().requires_grad_()
    scores_TE = (x @ weight[:3].t()).sigmoid()
    (gate.config.routed_scaling_factor * scores_TE.sum()).backward()
    torch.testing.assert_close(gate.router.weight.grad, weight.grad)
    assert not gate.expert_bias.requires_grad


class CountingRule(BiasRule):
    """A rule that uses what it counts in forward passes."""

    def step_sums(self, config, bias_E, score_TE):
        return {"low": (score_TE < 0.5).sum(0).float()}

    def update(self, config, bias_E, step):
        bias_E.copy_(step.step_sums["low"])


def test_rule_receives_sums_of_forward_passes(monkeypatch):
    """A rule may count more than loads: summed over micro-batches, in training only."""
    monkeypatch.setitem(BIAS_RULES, "counting", CountingRule())
    layer = make_layer("topk", options={"bias_rule": "counting", "score_function": "sigmoid"})
    updater = GateUpdater(nn.ModuleList([layer]), Groups())
    expected = torch.zeros(4)
    for seed in (1, 2):
        x, _ = make_input(7, seed)
        layer.train()(x)
        layer.eval()(x)
        expected += ((x[0] @ layer.gate.router.weight.t()).sigmoid() < 0.5).sum(0)
    updater.post_optimizer_step()
    assert torch.equal(layer.gate.expert_bias, expected)


def test_base_rule_must_be_overridden():
    with pytest.raises(NotImplementedError, match="bias rule BiasRule has no update"):
        BiasRule().update(None, torch.zeros(2), None)


@pytest.mark.parametrize("options, reduces", [({}, 0), ({"bias_rule": "sign"}, 1)])
def test_gate_without_state_reduces_nothing(options, reduces, monkeypatch):
    """A top-k gate without bias needs no all-reduce after a step."""
    calls = []
    original = gate_update.all_reduce_layer_sums
    monkeypatch.setattr(
        gate_update,
        "all_reduce_layer_sums",
        lambda *args: calls.append(1) or original(*args),
    )
    layer = make_layer("topk", options=options)
    updater = GateUpdater(nn.ModuleList([layer]), Groups())
    layer(make_input(5)[0])
    updater.post_optimizer_step()
    assert len(calls) == reduces


@pytest.mark.parametrize("name", ["topk", "deepseek_v3", "remoe"])
def test_frozen_gate_is_not_updated(name):
    """State that outlives a step stays when none of the gate's parameters is trained."""
    options = {"bias_rule": "sign"} if name == "topk" else {}
    frozen, trained = (make_layer(name, options=options) for _ in range(2))
    for p in frozen.gate.parameters():
        p.requires_grad_(False)
    before = {n: b.clone() for n, b in frozen.gate.named_buffers()}
    updater = GateUpdater(nn.ModuleList([frozen, trained]), Groups())
    for layer in (frozen, trained):
        layer(make_input(30)[0] + 1)
    updater.post_optimizer_step()
    moved = dict(trained.gate.named_buffers())
    assert any(not torch.equal(moved[n], before[n]) for n in before)
    assert all(torch.equal(b, before[n]) for n, b in frozen.gate.named_buffers())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--bias-rule foo", "--bias-rule is 'foo'; allowed: none sign quantile"),
        ("--bias-on foo", "--bias-on is 'foo'; allowed: score logit"),
        (
            "--bias-update-speed 0.1",
            "--bias-update-speed is 0.1; it has an effect only with --bias-rule sign, not none",
        ),
        ("--bias-on logit", "--bias-on is 'logit'; it has an effect only with --bias-rule"),
        (
            "--bias-rule sign --bias-update-speed -1",
            "--bias-update-speed is -1.0; allowed: 0 or more",
        ),
    ],
)
def test_invalid_bias_options_are_refused(flags, message):
    words = ["--num-experts", "4", "--gate", "topk", *flags.split()]
    with pytest.raises(ValueError) as error:
        cli.parse(words, gate_config_class, available_gates)
    assert str(error.value).startswith(message)
