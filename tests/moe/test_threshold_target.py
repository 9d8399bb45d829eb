"""A threshold that follows the mean number of experts per token, and the entropy loss."""

import math

import pytest
import torch
from torch import nn

from helpers.moe_layers import make_input, make_layer
from helpers.routings import step_totals
from helpers.spawn import groups_for
from megatron.moe.gate import create_gate
from megatron.moe.gate_update import GateUpdater
from megatron.moe.losses import entropy_loss
from megatron.moe.routing import GateInput, StepTotals


def make_gate(**options):
    defaults = {"hidden_size": 8, "num_experts": 16, "init_std": 0.5, "threshold_target": 4.0}
    return create_gate("threshold", **{**defaults, **options})


def test_update_matches_formula():
    """u += gain (e + (e - e') / 2), e = 1 - n / target; no tokens, no change."""
    gate = make_gate(threshold=0.8, threshold_gain=0.05, num_experts=4, threshold_target=2.0)
    logit, previous = math.log(4), 0.0
    for load in ([8.0, 2, 2, 0], [1.0, 4, 5, 10], [5.0, 5, 5, 5]):
        gate.post_optimizer_step(step_totals(torch.tensor(load), torch.tensor(5.0)))
        error = 1 - sum(load) / 5 / 2
        logit += 0.05 * (error + (error - previous) / 2)
        previous = error
        assert gate.controller.threshold_logit.item() == pytest.approx(logit)
    before = gate.controller.threshold_logit.clone()
    gate.post_optimizer_step(step_totals(torch.zeros(4), torch.tensor(0.0)))
    assert torch.equal(gate.controller.threshold_logit, before)
    load_LE = torch.tensor([[4.0, 4, 4, 4], [0.0, 2, 2, 0]])  # mean over both layers: 2
    gate.controller.previous_error.zero_()
    gate.post_optimizer_step(StepTotals(load_LE[0], torch.tensor(5.0), {}, load_LE))
    assert torch.equal(gate.controller.threshold_logit, before), "the mean is over layers"


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("target", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_mean_reaches_target(spread, target, start):
    """From either end, for nearly uniform and for sharp routers: within 5 % and steady."""
    gate = make_gate(threshold=start, threshold_target=target)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.router.weight.mul_(spread)
    means = []
    for _ in range(200):
        out = gate(GateInput(torch.randn(256, 8, generator=g)))
        load_E = torch.bincount(out.expert_A, minlength=16).float()
        gate.post_optimizer_step(step_totals(load_E, torch.tensor(256.0)))
        means.append(len(out.token_A) / 256)
    last = torch.tensor(means[-50:])
    assert last.mean().item() == pytest.approx(target, rel=0.05), means[::10]
    assert last.std() < 0.1 * target


def test_selection_uses_the_moving_threshold():
    """The experts are those of a constant threshold of the same value."""
    gate = make_gate()
    gate.controller.threshold_logit.fill_(math.log(0.6 / 0.4))
    same = make_gate(threshold=0.6, threshold_target=0.0)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    out, expected = gate(GateInput(x)), same(GateInput(x))
    assert torch.equal(out.expert_A, expected.expert_A)
    assert torch.equal(out.weight_A, expected.weight_A)
    assert out.metric_means["threshold"].item() == pytest.approx(0.6)
    assert "threshold" not in expected.metric_means


def test_state_exists_with_a_target_only():
    gate = make_gate()
    names = ["controller.previous_error", "controller.threshold_logit"]
    assert sorted(n for n, _ in gate.named_buffers()) == names and gate.has_state
    assert all(b.dtype == torch.float32 for b in gate.buffers())
    constant = make_gate(threshold_target=0.0)
    assert not list(constant.buffers()) and not constant.has_state
    other = make_gate()
    gate.controller.threshold_logit.fill_(0.5)
    other.load_state_dict(gate.state_dict())
    assert other.controller.threshold_logit == 0.5


def _thresholds(tokens_of_rank):
    """The thresholds of two layers of a rank after a step."""
    groups = groups_for(1)
    options = {"threshold_target": 2.0, "threshold_gain": 0.5}
    layers = nn.ModuleList(make_layer("threshold", groups, options=options) for _ in range(2))
    with torch.no_grad():
        layers[1].gate.router.weight.zero_()
    for layer in layers:
        layer(make_input(tokens_of_rank[groups.rank], seed=groups.rank)[0])
    updater = GateUpdater(layers, groups)
    updater.post_optimizer_step()
    for layer in layers.eval():
        layer(make_input(5)[0])
    updater.post_optimizer_step()
    return [layer.gate.controller.threshold_logit.item() for layer in layers]


def test_all_copies_agree(ranks2):
    """All layers and ranks move alike, whatever their own loads; evaluation moves nothing."""
    one, two = ranks2.run(_thresholds, [3, 9])
    assert one == two and one[0] == one[1] != pytest.approx(math.log(9))


def test_entropy_loss_matches_formula():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, generator=g).requires_grad_()
    wide = z.detach().double().requires_grad_()
    p = wide.softmax(-1)
    expected = -sum(p[t, e] * torch.log(p[t, e]) for t in range(5) for e in range(4)) / 5
    assert entropy_loss(z).item() == pytest.approx(expected.item())
    got = torch.autograd.grad(entropy_loss(z), z)[0]
    torch.testing.assert_close(got.double(), torch.autograd.grad(expected, wide)[0])
    assert entropy_loss(torch.zeros(3, 8)).item() == pytest.approx(math.log(8))
    assert entropy_loss(torch.tensor([[1e4, 0.0]])).item() == 0
    assert entropy_loss(torch.zeros(0, 4)) == 0


def test_entropy_coefficient_is_applied():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    plain = make_gate(loss_coeff=0.0)
    sharper = make_gate(loss_coeff=0.0, entropy_coeff=0.25)
    assert plain(GateInput(x)).aux_loss == 0
    expected = 0.25 * entropy_loss(x @ sharper.router.weight.t())
    torch.testing.assert_close(sharper(GateInput(x)).aux_loss, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold_target": 0.5}, "--threshold-target is 0.5; allowed: 0 .* at least 1"),
        ({"threshold_target": 17.0}, "--threshold-target is 17.0; allowed: at most 16,"),
        (
            {"threshold_target": 3.0, "threshold_max_experts": 2},
            "--threshold-target is 3.0; allowed: at most 2,",
        ),
        ({"threshold_gain": 0.0}, "--threshold-gain is 0.0; allowed: above 0"),
        ({"entropy_coeff": -1.0}, "--entropy-coeff is -1.0; allowed: 0 or more"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**options)
