"""Generic tests of every registered gate: the contract, the layer, capacity, sharding, options."""

import pytest
import torch
from torch import nn

from helpers.moe_layers import (
    D,
    E,
    exact_shares,
    has_topk,
    make_input,
    make_layer,
)
from megatron.gate_checks import contract
from megatron.gate_checks import layer as layer_checks
from megatron.gate_checks.card import CAPACITY_1
from megatron.gate_checks.cases import (
    GateCase,
    layer_input,
    reference_expert,
    route,
    within_capacity,
)
from megatron.gate_checks.layer import chunked, require_equals_reference
from megatron.gate_checks.sharded import check_sharded
from megatron.moe.gate import Gate, GateContext, available_gates, create_gate
from megatron.moe.routing import GateInput

ALL = available_gates()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens, num_experts, scale", contract.EXTREME_INPUTS)
@pytest.mark.parametrize("k_all", [False, True], ids=["", "k = E"])
def test_contract_on_extreme_input(name, tokens, num_experts, scale, k_all):
    """One token, none, one expert, k = E and logits of +-1e4: the routing keeps the contract, and
    values and gradients are finite."""
    options = {"topk": num_experts or E} if k_all and has_topk(name) else {}
    case = GateCase(name, options)
    assert contract.check_extreme_input(case, tokens, num_experts, scale) is None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "check",
    [
        contract.check_experts_in_range,
        contract.check_forward_keeps_state,
        contract.check_weights_are_differentiable,
        contract.check_initial_weights,
        contract.check_state_dict,
        layer_checks.check_capacity,
        layer_checks.check_layer_equals_reference,
        layer_checks.check_micro_batches,
        layer_checks.check_recompute,
    ],
)
def test_check_passes(name, check):
    """The checks of tools/check_gate.py in one process."""
    assert check(GateCase(name)) is None


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_independent(name):
    """Gates that declare that they look at other tokens do, and the others do not."""
    case = GateCase(name)
    if not case.sees_other_tokens:
        contract.check_tokens_are_independent(case)
        return
    with pytest.raises(AssertionError, match="declares `sees_other_tokens = True`"):
        contract.check_tokens_are_independent(case)


@pytest.mark.parametrize("offset", [0.0, -48.0, -104.0, -1e4])
@pytest.mark.parametrize(
    "name, options",
    [
        ("topk", {"score_function": "sigmoid"}),
        ("cosine", {"score_function": "sigmoid", "min_temperature": 1e-5}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ],
)
def test_normalised_sigmoids_survive_underflow(name, options, offset):
    """Weights, balance loss and gradients are exact when all of a token's logits are low.

    The mistake to catch is a clamped sum of scores: at -48 weights would be too small, and at
    -104 the token and the router's gradient would be lost.
    """
    gate = create_gate(
        name,
        hidden_size=4,
        num_experts=4,
        topk=2,
        norm_topk_prob=True,
        loss_coeff=1.0,
        init_std=1.0,
        **options,
    )
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if name == "cosine":
        with torch.no_grad():
            gate.embeddings_EP.mul_(0.01).add_(torch.tensor([1.0, 0.0]))
            gate.projection.weight.copy_(torch.eye(2, 4))
            gate.temperature.fill_(1 / max(1.0, -offset))
            x.mul_(0.01).add_(torch.tensor([1.0 if offset == 0 else -1.0, 0.0, 0.0, 0.0]))
        logits = gate.cosines(x) / gate.temperature
        leaves = [x, gate.projection.weight, gate.embeddings_EP]
    else:
        with torch.no_grad():
            gate.router.weight.copy_(torch.eye(4))
            x.add_(offset)
        logits = gate.router(x)
        leaves = [x, gate.router.weight]
    out = gate(GateInput(x))
    slope = torch.zeros(3, 4)
    loss = 0.0
    best = logits.topk(2).indices
    for t, chosen in enumerate(out.expert_A.view(3, 2).tolist()):
        if name != "deepseek_v3" or offset >= -100:
            assert sorted(chosen) == sorted(best[t].tolist())
        weights, slopes = exact_shares(logits[t, chosen].tolist())
        assert out.weight_A.view(3, 2)[t].tolist() == pytest.approx(weights, rel=1e-5)
        slope[t, chosen] += torch.tensor(slopes[0]) * 3 - torch.tensor(slopes[1])
        weights, slopes = exact_shares(logits[t].tolist())
        for e in range(4):
            factor = 4 * (best == e).sum().item() / 6 / 3
            loss += factor * weights[e]
            slope[t] += factor * torch.tensor(slopes[e])
    assert out.aux_loss.item() == pytest.approx(loss, rel=1e-5)
    mix = out.weight_A.view(3, 2) * torch.tensor([3.0, -1.0])
    got = torch.autograd.grad(mix.sum() + out.aux_loss, leaves)
    want = torch.autograd.grad(logits, leaves, slope)
    for a, b in zip(got, want, strict=True):
        assert b.abs().sum() > 0 and torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.0, 1.0], ids=["dropless", "capacity 1"])
def test_equal_tokens_share_experts(name, factor):
    """Some experts get all tokens and others none; under capacity the same experts drop tokens."""
    layer = GateCase(name).layer(moe_train_capacity_factor=factor, moe_min_capacity=1)
    x, context = layer_input(layer, 11, spread=0.0)
    routing = route(layer, x, context)
    assert len(routing.token_A) >= 11
    if not layer.gate.sees_other_tokens:
        choices = [sorted(routing.expert_A[routing.token_A == t].tolist()) for t in range(11)]
        assert choices == choices[:1] * 11
    dispatched = within_capacity(layer, routing, 11, factor) if factor else None
    if factor and not layer.gate.sees_other_tokens:
        assert len(dispatched) < len(routing.token_A)
    require_equals_reference(layer, x, context, routing, dispatched)


@pytest.mark.parametrize("name", ALL)
def test_capacity_drops_assignments(name):
    """Gates that balance by construction drop nothing."""
    layer = GateCase(name).layer(moe_train_capacity_factor=0.8, moe_min_capacity=1)
    x, context = layer_input(layer, 11)
    routing = route(layer, x, context)
    if not layer.gate.sees_other_tokens:
        dispatched = within_capacity(layer, routing, 11, 0.8)
        assert len(dispatched) < len(routing.token_A), "capacity must drop something"


@pytest.mark.parametrize("name", ALL)
def test_gates_follow_load_before_capacity(name):
    """Biases and lambdas follow the load before capacity.

    The mistake to catch is the load after capacity, which looks balanced exactly when the
    router is not.
    """
    layer = GateCase(name).layer(moe_train_capacity_factor=0.001, moe_min_capacity=1)
    x, context = layer_input(layer, 11)
    assigned = torch.bincount(route(layer, x, context).expert_A, minlength=E)[:E].tolist()
    layer(x, context)
    assert layer.step_sums["load_E"].tolist() == assigned and layer.step_sums["tokens"] == 11
    assert layer.counters[True]["dispatched_C"][:E].sum() <= E < sum(assigned)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "world, chunks, spread, moe",
    [
        (2, [6, 5], 1.0, {}),
        (2, [11, 0], 1.0, {}),
        (4, [3, 0, 7, 1], 1.0, {}),
        (2, [6, 5], 1.0, CAPACITY_1),
        (2, [6, 5], 0.01, {}),
        (2, [6, 5], 0.01, CAPACITY_1),
    ],
    ids=[
        "2",
        "2, one empty",
        "4, one empty",
        "2, capacity 1",
        "2, near ties",
        "2, near ties, capacity 1",
    ],
)
def test_sharded_equals_one_rank(name, world, chunks, spread, moe, request):
    """Outputs, input gradients and parameter gradients on 2 and 4 ranks agree with one rank,
    dropless, under capacity, and when all tokens go to the same experts. These tokens are
    nearly equal, not equal: rounding would decide which of equal ones are dropped."""
    case = GateCase(name)
    if not moe and not case.sees_other_tokens:
        y, _, _ = chunked(case, chunks, spread, moe)
        layer = case.layer()
        torch.testing.assert_close(
            layer(*layer_input(layer, 11, spread)).y[0], y, atol=1e-5, rtol=1e-5
        )
    ranks = request.getfixturevalue(f"ranks{world}")
    check_sharded(case, ranks, chunks, spread, moe)


def test_zero_computation_experts_ignore_capacity():
    """A gate with two zero-computation experts in a layer with capacity 1."""

    class Local(Gate):
        def __init__(self):
            super().__init__(None, GateContext(D, 2))
            self.zero_computation_experts = nn.ModuleList([nn.Identity(), Negative()])

        def forward(self, inp):
            from megatron.moe.routing import Routing

            n = len(inp.x_TD)
            token = torch.arange(n).repeat(3)
            expert = torch.cat(
                [torch.full((n,), 2), torch.full((n,), 3), torch.zeros(n, dtype=torch.int64)]
            )
            return Routing(token, expert, torch.ones(3 * n), torch.tensor(0.0))

    layer = make_layer("topk", num_experts=2, moe_train_capacity_factor=0.1, moe_min_capacity=1)
    layer.gate = Local()
    x, _ = make_input(6)
    y = layer(x).y[0]
    expert = reference_expert(layer, 0, x[0])
    torch.testing.assert_close(
        y, x[0] - 3 * x[0] + expert * (torch.arange(6) == 0).unsqueeze(1)
    )


class Negative(nn.Module):
    def forward(self, x):
        return -3 * x


def test_capacity_factor_depends_on_mode():
    """Training and evaluation have their own capacity factors."""
    layer = make_layer(
        "topk", moe_train_capacity_factor=0.25, moe_eval_capacity_factor=0.0, moe_min_capacity=1
    )
    x, _ = make_input(32)
    layer(x)
    layer.eval()
    layer(x)
    training, evaluation = (layer.counters[mode] for mode in (True, False))
    assert training["dispatched_C"].max() <= 4 < training["assigned_C"].max()
    assert torch.equal(evaluation["dispatched_C"], evaluation["assigned_C"])


def test_dropped_token_gets_zeros():
    """Only the residual connection carries a dropped token."""
    layer = make_layer("topk", moe_train_capacity_factor=0.01, moe_min_capacity=1)
    x, _ = make_input(32)
    y = layer(x).y[0]
    assert (y.abs().sum(-1) == 0).sum() >= 32 - E


def test_shared_experts_add_an_mlp():
    with_shared = make_layer("topk", shared=2)
    without = make_layer("topk")
    for p in with_shared.shared.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    assert with_shared.shared.up_proj.weight.shape == (24, D)
    x, _ = make_input(7)
    torch.testing.assert_close(with_shared(x).y, without(x).y + with_shared.shared(x).y)
