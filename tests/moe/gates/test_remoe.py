"""ReMoE: weights from the ReLU, and a penalty that steers the sparsity from either side."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.moe_layers import E, make_input, make_layer
from helpers.routings import step_totals
from helpers.spawn import groups_for
from megatron.moe.gate import create_gate
from megatron.moe.gate_update import GateUpdater
from megatron.moe.metrics import MoEMetrics
from megatron.moe.routing import GateInput, StepTotals
from megatron.parallel.groups import Groups


def reference(gate, x, W, sequences):
    """Return {(token, expert): weight}, the loss, and the smallest |logit|, token by token."""
    k, E = gate.config.topk, len(W)
    weights, margin, R = {}, 1.0, {}
    for t in range(len(x)):
        for e in range(E):
            z = W[e] @ x[t]
            margin = min(margin, abs(z.item()))
            R[t, e] = z if z > 0 else z * 0
            if z > 0:
                weights[t, e] = z
    loss = 0
    for mine in sequences:
        T = len(mine)
        for e in range(E):
            active = sum((t, e) in weights for t in mine)
            loss = loss + E / (k * T**2) * sum(R[t, e] for t in mine) * active / len(sequences)
    return weights, gate.reg_lambda.item() * loss, margin


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_gate_matches_formula(seed, experts, rank, by_sequence):
    """Selected experts, weights, loss, and the gradients of input and router."""
    gate = create_gate(
        "remoe",
        hidden_size=4,
        num_experts=experts,
        seed=seed,
        init_std=0.8,
        topk=1 + rank % experts,
        lambda_init=0.3,
        balance_scope="sequence" if by_sequence else "micro-batch",
    )
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, gate.router.weight))
    weights, aux, margin = reference(
        gate, x64, W64, [[0, 1, 2], [3, 4]] if by_sequence else [range(5)]
    )
    if margin < 1e-5:
        return
    out = gate(GateInput(x, sequence_T=torch.tensor([0, 0, 0, 1, 1]), num_sequences=2))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(weights)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4, abs=1e-9)
    assert out.metric_means["sparsity"].item() == pytest.approx(1 - len(pairs) / (5 * experts))
    assert out.metric_means["lambda"].item() == pytest.approx(0.3)
    if not pairs:
        return
    expected_A = torch.stack([weights[pair] for pair in pairs])
    torch.testing.assert_close(out.weight_A.double(), expected_A, rtol=1e-4, atol=1e-6)
    pull_A = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad(
        (out.weight_A * pull_A).sum() + out.aux_loss, (x, gate.router.weight)
    )
    want = torch.autograd.grad((expected_A * pull_A).sum() + aux, (x64, W64))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_no_topk_and_no_renormalisation():
    """More experts than topk where more logits are positive, none where none is;
    weights scale with x.
    """
    gate = create_gate("remoe", hidden_size=4, num_experts=4, topk=1)
    with torch.no_grad():
        gate.router.weight.copy_(torch.eye(4))
    x = torch.tensor([[3.0, 0.5, 2.0, 1.0], [-1.0, -2.0, -3.0, -4.0], [0.0, 0.0, 7.0, 0.0]])
    out = gate(GateInput(x))
    assert out.token_A.tolist() == [0, 0, 0, 0, 2] and out.expert_A.tolist() == [0, 1, 2, 3, 2]
    assert out.weight_A.tolist() == [3.0, 0.5, 2.0, 1.0, 7.0]
    assert gate(GateInput(2 * x)).weight_A.tolist() == [6.0, 1.0, 4.0, 2.0, 14.0]


def step_of(gate, active, tokens, layers=1):
    """Run one optimizer step with `active` assignments in total."""
    load_LE = torch.zeros(layers, gate.num_experts)
    load_LE[0, 0] = active
    gate.post_optimizer_step(StepTotals(load_LE[0], torch.tensor(float(tokens)), {}, load_LE))
    return gate.reg_lambda.item()


def test_lambda_steps_towards_target():
    """Too dense: times 1.2; too sparse: divided by it; exactly k on average or no
    tokens: unchanged.
    """

    def gate():
        return create_gate("remoe", hidden_size=4, num_experts=4, topk=2, lambda_init=0.5)

    assert step_of(gate(), 21, 10) == pytest.approx(0.6) and step_of(
        gate(), 19, 10
    ) == pytest.approx(0.5 / 1.2)
    assert step_of(gate(), 20, 10) == 0.5 and step_of(gate(), 0, 0) == 0.5
    assert step_of(gate(), 41, 10, layers=2) == pytest.approx(0.6), "S is the mean over layers"
    assert step_of(gate(), 39, 10, layers=2) == pytest.approx(0.5 / 1.2)
    alone = gate()
    alone.post_optimizer_step(
        step_totals(torch.tensor([8.0, 5.0, 5.0, 3.0]), torch.tensor(10.0))
    )
    assert alone.reg_lambda.item() == pytest.approx(0.6)
    constant = create_gate(
        "remoe", hidden_size=4, num_experts=4, topk=2, lambda_init=0.5, lambda_factor=1.0
    )
    assert step_of(constant, 40, 10) == 0.5


def test_lambda_recovers_from_either_end():
    """After thousands of steps in one direction it is neither 0 nor infinite."""
    gate = create_gate("remoe", hidden_size=4, num_experts=4, topk=2)
    for active, bound in ((0, 1e-30), (40, 1e30)):
        for _ in range(2000):
            step_of(gate, active, 10)
        assert gate.reg_lambda.item() == pytest.approx(bound)
    assert step_of(gate, 0, 10) < 1e30


def test_k_equal_experts_needs_no_sparsity():
    """Sparsity 0 is the target: lambda never grows, and stays where all experts are active."""
    gate = create_gate("remoe", hidden_size=4, num_experts=4, topk=4, lambda_init=0.5)
    assert step_of(gate, 40, 10) == 0.5 and step_of(gate, 39, 10) == pytest.approx(0.5 / 1.2)


def two_layers(groups=None):
    """Return a dense and a sparse layer, with more than k experts per token together."""
    layers = nn.ModuleList(
        make_layer("remoe", groups, options={"lambda_init": 0.5}) for _ in range(2)
    )
    with torch.no_grad():
        for layer, active in zip(layers, (4, 1)):
            layer.gate.router.weight.zero_()
            layer.gate.router.weight[:active, 0] = 1
    return layers, GateUpdater(layers, groups or Groups())


def run_step(layers, tokens):
    x, _ = make_input(tokens)
    x[..., 0] = 1
    for layer in layers:
        layer(x)


def lambdas(layers):
    return [layer.gate.reg_lambda.item() for layer in layers]


def test_all_layers_update_equally():
    """Catches a lambda per layer: the layers are on different sides of the target."""
    layers, gate_updater = two_layers()
    run_step(layers, 6), run_step(layers, 5)  # two micro-batches
    assert lambdas(layers) == [0.5, 0.5], "nothing happens before the step is over"
    gate_updater.post_optimizer_step()
    assert lambdas(layers) == pytest.approx([0.6, 0.6])
    for layer in layers:
        layer.eval()
    run_step(layers, 6)
    gate_updater.post_optimizer_step()
    assert lambdas(layers) == pytest.approx([0.6, 0.6]), "evaluation is no step"
    got = MoEMetrics(layers, Groups()).read()
    assert got["sparsity"] == pytest.approx((0 + 3 / 4) / 2) and got["lambda"] == pytest.approx(
        0.5
    )
    assert got["sparsity_by_layer"] == pytest.approx([0, 3 / 4])


def _ranks_step():
    groups = groups_for(1)
    layers, gate_updater = two_layers(groups)
    with torch.no_grad():  # rank 0 is sparse, rank 1 dense; the mean over both has too many
        for layer in layers:
            layer.gate.router.weight.zero_()
            layer.gate.router.weight[: 1 if groups.rank == 0 else 4, 0] = 1
    run_step(layers, 5 if groups.rank == 0 else 6)
    gate_updater.post_optimizer_step()
    return lambdas(layers)


def test_all_ranks_update_equally(ranks2):
    """Catches a lambda that follows the rank's own sparsity."""
    assert ranks2.run(_ranks_step) == [pytest.approx([0.6, 0.6])] * 2


def test_lambda_is_a_saved_fp32_buffer():
    a, b = make_layer("remoe"), make_layer("remoe")
    step_of(a.gate, 100, 1)
    b.load_state_dict(a.state_dict())
    assert (
        b.gate.reg_lambda.item() == pytest.approx(1.2e-8)
        and b.gate.reg_lambda.dtype == torch.float32
    )
    assert "gate.reg_lambda" in a.state_dict() and [
        n for n, _ in a.gate.named_parameters()
    ] == ["router.weight"]


def test_fully_dense_routing_works():
    """Early in training every R is positive: k = E rows per token, with and without
    capacity.
    """
    for factor in (0.0, 1.0):
        layer = make_layer(
            "remoe", options={"topk": 1}, moe_train_capacity_factor=factor, moe_min_capacity=1
        )
        with torch.no_grad():
            layer.gate.router.weight.abs_()
        x, _ = make_input(12)
        x = x.abs().requires_grad_()
        out = layer(x)
        (out.y.sum() + out.aux_loss).backward()
        assert all(
            p.grad is not None and torch.isfinite(p.grad).all()
            for p in [x, *layer.parameters()]
        )
        got = MoEMetrics(nn.ModuleList([layer]), Groups()).read()
        assert got["experts_per_token_before_capacity"] == E and got["experts_per_token"] == (
            1 if factor else E
        )
        assert len(got["experts_per_token_histogram"]) == E + 1 and got["sparsity"] == 0


def test_fully_sparse_routing_works():
    layer = make_layer("remoe")
    with torch.no_grad():
        layer.gate.router.weight.abs_().neg_()
    x, _ = make_input(5)
    out = layer(x.abs())
    assert not out.y.any() and out.aux_loss == 0
    (out.y.sum() + out.aux_loss).backward()
    assert not layer.gate.router.weight.grad.any()


@pytest.mark.parametrize("start, lambda_init", [(1.0, 1e-3), (-2.0, 10.0)])
@pytest.mark.parametrize("k", [1, 3])
def test_lambda_drives_sparsity_to_target(start, lambda_init, k):
    """A router trained for positive logits with the penalty: sparsity settles at 1 - k/E."""
    gate = create_gate(
        "remoe",
        hidden_size=9,
        num_experts=8,
        topk=k,
        init_std=0.3,
        lambda_init=lambda_init,
        lambda_factor=1.05,
    )
    x = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1
    with torch.no_grad():
        gate.router.weight[:, 0] += start
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    tokens, sparsity = torch.tensor(64.0), []
    for _ in range(600):
        out = gate(GateInput(x))
        pull = (
            (x @ gate.router.weight.t() - 1).square().mean()
        )  # a task whose optimum has all logits at 1
        optimizer.zero_grad()
        (pull + out.aux_loss).backward()
        optimizer.step()
        gate.post_optimizer_step(
            step_totals(torch.bincount(out.expert_A, minlength=8).float(), tokens)
        )
        sparsity.append(out.metric_means["sparsity"].item())
    assert (sparsity[0] < 1 - k / 8) == (start > 0)
    assert sum(sparsity[-200:]) / 200 == pytest.approx(1 - k / 8, abs=0.05)


def test_global_batch_balance_is_returned():
    def gate(**options):
        return create_gate(
            "remoe", hidden_size=4, num_experts=4, lambda_init=0.3, init_std=0.5, **options
        )

    x = torch.randn(9, 4)
    out, expected = gate(balance_scope="global-batch")(GateInput(x)), gate()(GateInput(x))
    (term,) = out.balance
    assert out.aux_loss == 0 and term.loss().item() == pytest.approx(expected.aux_loss.item())
    assert term.count_NG.sum() == len(out.token_A) and term.total_N.tolist() == [9]


def test_active_experts_and_options():
    """From the target to the dense start; there is no coefficient without an effect."""
    gate = create_gate("remoe", hidden_size=4, num_experts=8, topk=3)
    assert gate.experts_per_token(gate.config, 8) == (3, 8)
    names = {f.name for f in dataclasses.fields(gate.config)}
    assert names == {"topk", "lambda_init", "lambda_factor", "balance_scope", "simbal_coeff"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
        ({"lambda_init": 0.0}, "--lambda-init is 0.0; allowed: above 0"),
        ({"lambda_factor": 0.9}, "--lambda-factor is 0.9; allowed: 1 .constant. or more"),
        (
            {"balance_scope": "world"},
            "--moe-balance-scope is 'world'; allowed: micro-batch sequence global-batch",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("remoe", hidden_size=4, num_experts=4, **options)
