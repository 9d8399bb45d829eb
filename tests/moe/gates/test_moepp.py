"""MoE++: zero-computation experts, their loss and capacity, and the residual of the logits."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.moe_layers import E, make_input, make_layer, reference_layer
from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.experts.types.mlp import MLPExperts
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import create_gate
from megatron.moe.metrics import MoEMetrics
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups


def reference(gate, leaves, sequences):
    """Return {(token, choice): weight}, the loss, and the closest tie, one token at a time."""
    c, E = gate.config, gate.num_experts
    x, W, carry, Wg = (leaves.get(name) for name in ("x", "router", "carry", "residual"))
    C, T = len(W), len(x)
    weights, margin, squares, probs, chosen = {}, 1.0, [], [], []
    for t in range(T):
        z = [W[i] @ x[t] for i in range(C)]
        if carry is not None and Wg is not None:
            z = [z[i] + Wg[i] @ carry[t] for i in range(C)]
        total = sum(torch.exp(v) for v in z)
        squares.append(torch.log(total) ** 2)
        p = [torch.exp(v) / total for v in z]
        order = sorted(range(C), key=lambda i: -p[i].item())
        if c.topk < C:
            margin = min(margin, (p[order[c.topk - 1]] - p[order[c.topk]]).item())
        probs.append(p)
        chosen.append(order[: c.topk])
        weights.update({(t, i): p[i] for i in order[: c.topk]})
    balance = 0
    for mine in sequences:
        for i in range(C):
            eta = 1 if i < E else c.tau
            f = sum(i in chosen[t] for t in mine) / len(mine)
            balance = balance + eta * f * sum(probs[t][i] for t in mine) / len(mine) / len(
                sequences
            )
    return weights, c.loss_coeff * balance + c.z_loss_coeff * sum(squares) / T, margin


def random_gate(seed, k, experts, kinds, tau, later, by_sequence):
    """Return a gate of random weights; `kinds` are the zero, copy and constant experts."""
    zero, copy, constant = kinds
    return create_gate(
        "moepp",
        hidden_size=4,
        num_experts=experts,
        layer=int(later),
        seed=seed,
        init_std=0.6,
        topk=min(k, experts + sum(kinds)),
        num_zero_experts=zero,
        num_copy_experts=copy,
        num_constant_experts=constant,
        tau=tau,
        loss_coeff=0.7,
        z_loss_coeff=0.1,
        balance_scope="sequence" if by_sequence else "micro-batch",
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.sampled_from([0.1, 0.75, 1.0, 1.5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_gate_matches_formula(seed, k, experts, kinds, tau, later, carried, by_sequence):
    """Choices, weights, loss, and the gradients of input, carry, router and W_g.

    In particular f sums to k, the loss has no factor C, and weights are not
    renormalised.
    """
    C = experts + sum(kinds)
    gate = random_gate(seed, k, experts, kinds, tau, later, by_sequence)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=g).requires_grad_()
    carry = torch.randn(5, C, generator=g).requires_grad_() if carried else None
    ours = {
        "x": x,
        "carry": carry,
        "router": gate.router.weight,
        "residual": gate.residual.weight if later else None,
    }
    ours = {n: t for n, t in ours.items() if t is not None}
    theirs = {n: t.detach().double().requires_grad_() for n, t in ours.items()}
    sequences = [[0, 1, 2], [3, 4]] if by_sequence else [range(5)]
    weights, aux, margin = reference(gate, theirs, sequences)
    if margin < 1e-5:
        return
    sequence_T = torch.tensor([0, 0, 0, 1, 1])
    out = gate(GateInput(x, sequence_T=sequence_T, carry=carry, num_sequences=2))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist(), strict=True))
    assert sorted(pairs) == sorted(weights)
    expected_A = torch.stack([weights[pair] for pair in pairs])
    torch.testing.assert_close(out.weight_A.double(), expected_A, rtol=1e-4, atol=1e-6)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4)
    pull_A = torch.randn(len(pairs), generator=g)
    loss = (out.weight_A * pull_A).sum() + out.aux_loss
    actual = torch.autograd.grad(loss, list(ours.values()), allow_unused=True)
    loss = (expected_A * pull_A).sum() + aux
    expected = torch.autograd.grad(loss, list(theirs.values()), allow_unused=True)
    for name, a, b in zip(ours, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(
                a.double(), b, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_expert_matches_formula(dtype):
    """a_0 x + a_1 v, computed in fp32 and returned in the compute dtype."""
    path = create_gate(
        "moepp", hidden_size=6, num_experts=4, init_std=0.8
    ).zero_computation_experts[0]
    x = torch.randn(5, 6, dtype=dtype).requires_grad_()
    W, v = (p.detach().double().requires_grad_() for p in (path.mix.weight, path.vector))
    x64 = x.detach().double().requires_grad_()
    rows = []
    for row in x64:
        a, b = (torch.exp(W[i] @ row) for i in (0, 1))
        rows.append(a / (a + b) * row + b / (a + b) * v)
    y, expected = path(x), torch.stack(rows)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance)
    grad = torch.randn(5, 6)
    got = torch.autograd.grad((y.float() * grad).sum(), (x, path.mix.weight, path.vector))
    want = torch.autograd.grad((expected * grad).sum(), (x64, W, v))
    for a, b in zip(got, want):
        torch.testing.assert_close(
            a.double(), b, rtol=2e-2, atol=5e-2 if dtype != torch.float32 else 1e-5
        )


def steer(layer, choice, strength=9.0):
    """Make every token whose first feature is 1 prefer one choice."""
    with torch.no_grad():
        layer.gate.router.weight.zero_()
        layer.gate.router.weight[choice, 0] = strength


def test_zero_computation_experts_are_run():
    """Each alone gives the output of its formula. Catches a layer that never calls them."""
    layer = make_layer("moepp", options={"topk": 1, "num_constant_experts": 1})
    x, _ = make_input(5)
    x[..., 0] = 1
    p = math.exp(9) / (math.exp(9) + E + 2)
    constant = layer.gate.zero_computation_experts[0]
    expected = {E: p * constant(x[0]), E + 1: p * x[0], E + 2: torch.zeros(5, 8)}
    for choice, value in expected.items():
        steer(layer, choice)
        torch.testing.assert_close(layer(x).y[0], value)
    assert not torch.equal(expected[E], expected[E + 1])


def test_order_and_number_of_experts():
    """Constant, copy, zero; the number of constant experts is that of table 2 and
    equation 10.
    """
    layer = make_layer(
        "moepp",
        options={"num_zero_experts": 2, "num_copy_experts": 1, "num_constant_experts": 3},
    )
    kinds = [type(path).__name__ for path in layer.gate.zero_computation_experts]
    assert kinds == ["Constant"] * 3 + ["Identity"] + ["ZeroExpert"] * 2
    for experts, constants in ((1, 1), (8, 1), (16, 2), (32, 6)):
        gate = create_gate("moepp", hidden_size=4, num_experts=experts)
        assert (
            len(gate.zero_computation_experts) - 2 == constants
            and len(gate.router.weight) == experts + constants + 2
        )


def count_rows(layer):
    """Return a layer, and the rows that reach its MLP experts and each zero-computation
    expert.
    """
    seen = {"experts": 0, "paths": [0] * len(layer.gate.zero_computation_experts)}
    layer.experts.register_forward_pre_hook(
        lambda m, args: seen.update(experts=seen["experts"] + sum(args[2].counts()))
    )
    for i, path in enumerate(layer.gate.zero_computation_experts):
        path.register_forward_pre_hook(
            lambda m, args, i=i: seen["paths"].__setitem__(i, seen["paths"][i] + len(args[0]))
        )
    return seen


def test_zero_computation_saves_work():
    """Only MLP choices reach the MLPs, zero experts get no rows, and the metrics report it."""
    layer = make_layer("moepp", options={"num_zero_experts": 2})
    x, _ = make_input(40)
    seen = count_rows(layer)
    layer(x)
    expert_A = layer.gate(GateInput(x[0])).expert_A
    assert isinstance(layer.experts, MLPExperts) and len(expert_A) == 80
    assert seen["experts"] == (expert_A < E).sum() < 80
    assert seen["paths"] == [(expert_A == E).sum(), (expert_A == E + 1).sum(), 0, 0]
    assert (expert_A >= E + 2).sum() > 0, "zero experts were chosen"
    got = MoEMetrics(nn.ModuleList([layer]), Groups()).read()
    share = {
        name: ((expert_A >= a) & (expert_A < b)).sum().item() / 80
        for name, a, b in (
            ("constant", E, E + 1),
            ("copy", E + 1, E + 2),
            ("zero", E + 2, E + 4),
        )
    }
    assert got["zero_computation_fraction"] == pytest.approx(1 - seen["experts"] / 80)
    assert {n: got[f"{n}_fraction"] for n in share} == pytest.approx(share)


def _sent(kind):
    """Return the token rows that this rank sends to the all-to-all, and its gate's choices."""
    groups = groups_for(2)
    layer = make_layer("moepp", groups)
    x, _ = make_input(20, seed=groups.rank)
    x[..., 0] = 1
    if kind != "mixed":
        steer(layer, E + kind, 50.0)
        with torch.no_grad():
            layer.gate.router.weight[E + (kind + 1) % 3, 0] = 40.0
    x.requires_grad_()
    rows, original = [], dist.all_to_all_single

    def all_to_all_single(output, given, *args, **kwargs):
        if given.dim() == 2 and given.shape[1] == 8:
            rows.append(len(given))
        return original(output, given, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single
    try:
        layer(x).y.sum().backward()
    finally:
        dist.all_to_all_single = original
    return rows, layer.gate(GateInput(x[0])).expert_A.tolist()


@pytest.mark.parametrize("kind", ["mixed", 0, 1, 2])
def test_zero_computation_rows_stay_local(kind, ranks2):
    """Only rows of MLP choices are sent, to the experts and back, in forward and backward."""
    answers = ranks2.run(_sent, kind)
    assigned = [sum(e < E for e in chosen) for _, chosen in answers]
    for (rows, chosen), mine in zip(answers, assigned):
        assert len(chosen) == 40 and rows == [mine, rows[1], mine, rows[1]]
    assert sum(rows[1] for rows, _ in answers) == sum(assigned)
    assert 0 < sum(assigned) < 80 if kind == "mixed" else sum(assigned) == 0


def test_unused_experts_have_gradients():
    """ZeRO 2 reduces gradients in buckets: one that exists on some ranks only breaks it."""
    layer = make_layer("moepp", options={"num_constant_experts": 2})
    x, _ = make_input(5)
    x[..., 0] = 1
    steer(layer, 0)
    layer(x).y.sum().backward()
    grads = {n: p.grad for n, p in layer.gate.zero_computation_experts.named_parameters()}
    assert len(grads) == 4 and all(g is not None and not g.any() for g in grads.values())


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_tau_shifts_load(tau):
    """With the balance loss alone, zero-computation experts get about 1 / tau times the
    tokens.
    """
    gate = create_gate(
        "moepp",
        hidden_size=16,
        num_experts=4,
        seed=1,
        init_std=0.02,
        topk=2,
        num_constant_experts=2,
        tau=tau,
        loss_coeff=1.0,
    )
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 3  # acts as a bias
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.2)
    local = []
    for step in range(120):
        out = gate(GateInput(x))
        optimizer.zero_grad()
        out.aux_loss.backward()
        optimizer.step()
        if step >= 60:
            local.append((out.expert_A >= 4).float().mean().item())
    assert sum(local) / len(local) == pytest.approx(4 / (tau * 4 + 4), abs=0.06)


def test_capacities_match_formula():
    """gamma tau k T / (tau E + N) for MLPs, without tau for the others, within [minimum, T]."""
    gate = create_gate(
        "moepp", hidden_size=4, num_experts=8, topk=2, tau=0.5, num_constant_experts=2
    )
    assert (
        gate.capacities(100, 1.1, 4) == [14] * 8 + [28] * 4
    )  # 1.1 * 200 / 8 = 27.5, half of it 13.75
    assert gate.capacities(100, 1.1, 20) == [20] * 8 + [28] * 4
    assert gate.capacities(10, 9.0, 4) == [10] * 12
    assert gate.capacities(0, 1.1, 4) == [0] * 12


def test_capacity_limits_zero_computation_experts():
    layer = make_layer(
        "moepp", options={"topk": 1}, moe_train_capacity_factor=1.0, moe_min_capacity=1
    )
    x, _ = make_input(30)
    x[..., 0] = 1
    limit = math.ceil(30 / (0.75 * E + 3))
    for choice in (E, E + 1, E + 2):
        steer(layer, choice)
        layer.counters[True].clear()
        layer(x)
        assert (
            layer.counters[True]["assigned_C"][choice] == 30
            and layer.counters[True]["dispatched_C"][choice] == limit
        )
    steer(layer, E + 1)
    routing = layer.gate(GateInput(x[0]))
    torch.testing.assert_close(
        layer(x).y[0], reference_layer(layer, x[0], routing, range(limit))
    )


def test_carry_gradient_reaches_earlier_router():
    """The carry is the logits."""
    first, second = (
        create_gate("moepp", hidden_size=6, num_experts=4, layer=i, init_std=0.5)
        for i in (0, 1)
    )
    x, later = torch.randn(7, 6), torch.randn(7, 6)
    out = first(GateInput(x.bfloat16()))
    assert out.carry.dtype == torch.float32 and not hasattr(first.residual, "weight")
    torch.testing.assert_close(out.carry, x.bfloat16().float() @ first.router.weight.t())
    next_out = second(GateInput(later, carry=out.carry))
    expected = later @ second.router.weight.t() + out.carry @ second.residual.weight.t()
    torch.testing.assert_close(next_out.carry, expected)
    next_out.weight_A.sum().backward()
    assert (
        first.router.weight.grad.abs().sum() > 0 and second.residual.weight.grad.abs().sum() > 0
    )
    alone = second(GateInput(later))
    torch.testing.assert_close(alone.carry, later @ second.router.weight.t())


def run_model(recompute, cut=False):
    """Run a model with a dense block between two MoE layers; return gradients and gate
    calls.
    """
    config = ModelConfig(
        num_layers=3,
        hidden_size=8,
        num_attention_heads=2,
        seq_length=6,
        ffn_hidden_size=12,
        init_method_std=0.4,
    )
    moe = MoEConfig(num_experts=4, gate="moepp", moe_layers=(0, 2), moe_ffn_hidden_size=8)
    model = build_model(
        config,
        moe,
        {"moepp": {"loss_coeff": 0.5}},
        vocab_size=20,
        seed=1,
        groups=Groups(),
        recompute=recompute,
    )
    tokens = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    gates, seen = [model.layers[i].mlp.gate for i in (0, 2)], []
    for gate in gates:
        gate.register_forward_hook(lambda gate, args, out: seen.append((args[0], out)))
    if cut:
        gates[1].register_forward_pre_hook(
            lambda gate, args: GateInput(
                args[0].x_TD, carry=args[0].carry.detach(), num_sequences=2
            )
        )
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    return (
        model,
        seen[:2],
        {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        },
    )


def test_carry_passes_through_model():
    """It passes a dense block to the second W_g, and the gradient flows back,
    recomputed or not.
    """
    model, ((first, a), (second, b)), grads = run_model(False)
    assert (
        first.carry is None and torch.equal(second.carry, a.carry) and a.carry.shape == (12, 7)
    )
    gate = model.layers[2].mlp.gate
    torch.testing.assert_close(
        b.carry, second.x_TD @ gate.router.weight.t() + a.carry @ gate.residual.weight.t()
    )
    recomputed = run_model(True)[2]
    for n, grad in grads.items():
        torch.testing.assert_close(recomputed[n], grad, msg=lambda m, n=n: f"{n}: {m}")
    cut = run_model(False, cut=True)[2]
    name = "layers.0.mlp.gate.router.weight"
    assert not torch.allclose(cut[name], grads[name], rtol=1e-3)


def test_global_batch_balance_is_returned():
    gate = create_gate(
        "moepp",
        hidden_size=4,
        num_experts=4,
        tau=0.5,
        loss_coeff=0.3,
        balance_scope="global-batch",
    )
    same = create_gate("moepp", hidden_size=4, num_experts=4, tau=0.5, loss_coeff=0.3)
    x = torch.randn(9, 4)
    out, expected = gate(GateInput(x)), same(GateInput(x))
    (term,) = out.balance
    assert out.aux_loss.item() == 0 and term.loss().item() == pytest.approx(
        expected.aux_loss.item()
    )
    assert term.count_NG.sum() == 18 and term.total_N.tolist() == [9] and not expected.balance


def test_parameters_have_released_scales():
    """They depend on the seed and the layer."""
    gate, again, other = (
        create_gate("moepp", hidden_size=64, num_experts=16, layer=layer, init_std=0.02)
        for layer in (1, 1, 2)
    )
    for (n, p), q, r in zip(gate.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q) and not torch.equal(p, r), n
        assert p.std().item() == pytest.approx(
            1.0 if n.endswith("vector") else 0.02, rel=0.4
        ), n
    vectors = [path.vector for path in gate.zero_computation_experts[:2]]
    assert not torch.equal(*vectors)


def test_active_experts():
    def active(**options):
        config = type(create_gate("moepp", hidden_size=4, num_experts=4).config)(**options)
        return create_gate("moepp", hidden_size=4, num_experts=4).experts_per_token(config, 4)

    assert active() == (0, 2) and active(topk=6) == (3, 4)
    assert active(topk=2, num_zero_experts=0, num_copy_experts=0) == (1, 2)


def test_number_of_constant_experts():
    """-1 derives it from the others; 0 means none, also without any other special expert."""

    def count(num_experts=8, **options):
        gate = create_gate("moepp", hidden_size=4, num_experts=num_experts, **options)
        return len(gate.zero_computation_experts), len(gate.router.weight)

    assert count() == (3, 11) and count(32) == (8, 40)
    assert count(num_constant_experts=-1) == (3, 11)
    assert count(num_constant_experts=0) == (2, 10)
    assert count(num_constant_experts=0, num_zero_experts=0, num_copy_experts=0) == (0, 8)
    assert count(num_constant_experts=4) == (6, 14)


def test_token_may_use_every_choice():
    gate = create_gate("moepp", hidden_size=4, num_experts=2, topk=5)
    layer = make_layer("moepp", num_experts=2, options={"topk": 5})
    x, ids = make_input(4)
    layer(x, FFNContext(ids))
    assert (
        gate(GateInput(torch.randn(3, 4))).expert_A.view(3, 5).sort().values.tolist()
        == [[0, 1, 2, 3, 4]] * 3
    )
    assert layer.counters[True]["experts_per_token_histogram"].tolist() == [0, 0, 0, 0, 0, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 or more"),
        ({"topk": 8}, "--topk is 8; allowed: 1 to the number of choices, which is 7"),
        ({"num_zero_experts": -1}, "--num-zero-experts is -1; allowed: 0 or more"),
        ({"num_copy_experts": -1}, "--num-copy-experts is -1"),
        ({"num_constant_experts": -2}, "--num-constant-experts is -2; allowed: -1 or more"),
        ({"tau": 0.0}, "--tau is 0.0; allowed: above 0"),
        ({"loss_coeff": -1.0}, "--moe-loss-coeff is -1.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("moepp", hidden_size=4, num_experts=4, **options)
