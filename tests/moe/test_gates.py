"""Generic tests of every registered gate: the contract, the layer, capacity, sharding, options."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from helpers.moe_layers import (
    D,
    E,
    exact_shares,
    has_topk,
    make_carry,
    make_input,
    make_layer,
    reference_expert,
    reference_layer,
)
from helpers.spawn import groups_for
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import (
    Gate,
    GateContext,
    available_gates,
    create_gate,
    gate_class,
)
from megatron.moe.routing import GateInput

ALL = available_gates()
CAPACITY_1 = {"moe_train_capacity_factor": 1.0, "moe_min_capacity": 1}


def second_layer(name, groups=None, **moe):
    """The second MoE layer of a model, whose gate receives a carry (MoE++)."""
    return make_layer(name, groups, layer=1, **moe)


def case(layer, tokens, spread=1.0):
    """Hidden states and context of some tokens.

    With a small spread all tokens are nearly equal, with a spread of 0 they are equal.
    """
    x, ids = make_input(tokens)
    carry = make_carry(layer.gate, tokens)
    if spread != 1:
        x = x[:, :1].lerp(x, spread)
        ids = ids[:, :1].repeat(1, tokens)
        carry = carry[:1].lerp(carry, spread)
    return x.requires_grad_(), FFNContext(ids, carry)


def part(context, rows):
    """The context of some of the tokens."""
    return FFNContext(context.token_ids_BS[:, rows], context.carry[rows])


def route(layer, x, context):
    """The routing of the layer's gate."""
    sequence = torch.zeros(x.shape[1], dtype=torch.int64)
    return layer.gate(GateInput(x[0], context.token_ids_BS[0], sequence, context.carry))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "tokens, num_experts, scale",
    [(5, E, 1.0), (1, E, 1.0), (0, E, 1.0), (5, 1, 1.0), (13, E, 1e4)],
)
def test_contract_on_extreme_input(name, tokens, num_experts, scale):
    """One token, none, one expert, k = E and logits of +-1e4: the routing keeps the contract, and
    values and gradients are finite."""
    options = {"topk": 1} if num_experts == 1 and has_topk(name) else {}
    for k_all in (False, True):
        if k_all and has_topk(name):
            options = {"topk": num_experts}
        gate = create_gate(
            name,
            hidden_size=D,
            num_experts=num_experts,
            layer=1,
            num_moe_layers=2,
            vocab_size=50,
            **options,
            init_std=0.5,
        )
        x, ids = make_input(tokens, scale=scale)
        for dtype in (torch.float32, torch.bfloat16):
            x_TD = x[0].to(dtype).requires_grad_()
            carry = make_carry(gate, tokens, scale=scale).requires_grad_()
            out = gate(GateInput(x_TD, ids[0], torch.zeros(tokens, dtype=torch.int64), carry))
            out.check(tokens, num_experts + len(gate.zero_computation_experts))
            assert torch.isfinite(out.weight_A).all() and torch.isfinite(out.aux_loss)
            total = out.weight_A.sum() + out.aux_loss
            if total.requires_grad:
                total.backward()
                assert x_TD.grad is not None, "no gradient for the tokens"
                assert all(
                    t.grad is None or torch.isfinite(t.grad).all()
                    for t in (x_TD, carry, *gate.parameters())
                )


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


def assert_equals_reference(layer, x, context, routing, dispatched=None):
    """Compare the layer's output and gradients with a loop over (some of) the assignments.

    Returns:
        The gradients of x and of every parameter, by name.
    """
    out = layer(x, context)
    expected = reference_layer(layer, x[0], routing, dispatched)
    torch.testing.assert_close(out.y[0], expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    names, params = zip(("x", x), *layer.named_parameters())
    ours = torch.autograd.grad(
        (out.y[0] * grad).sum() + out.aux_loss, params, allow_unused=True
    )
    reference = torch.autograd.grad(
        (expected * grad).sum() + routing.aux_loss, params, allow_unused=True
    )
    for n, p, a, b in zip(names, params, ours, reference, strict=True):
        assert torch.isfinite(a).all(), n
        b = torch.zeros_like(p) if b is None else b
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
    return dict(zip(names, ours, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_layer_equals_reference(name):
    """Also, every parameter gets a gradient."""
    layer = second_layer(name)
    x, context = case(layer, 11)
    for n, grad in assert_equals_reference(layer, x, context, route(layer, x, context)).items():
        assert grad.abs().sum() > 0, f"{n} got no gradient"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.0, 1.0], ids=["dropless", "capacity 1"])
def test_equal_tokens_share_experts(name, factor):
    """Some experts get all tokens and others none; under capacity the same experts drop tokens."""
    layer = second_layer(name, moe_train_capacity_factor=factor, moe_min_capacity=1)
    x, context = case(layer, 11, spread=0.0)
    routing = route(layer, x, context)
    assert len(routing.token_A) >= 11
    if not layer.gate.sees_other_tokens:
        choices = [sorted(routing.expert_A[routing.token_A == t].tolist()) for t in range(11)]
        assert choices == choices[:1] * 11
    dispatched = within_capacity(layer, routing, 11, factor) if factor else None
    if factor and not layer.gate.sees_other_tokens:
        assert len(dispatched) < len(routing.token_A)
    assert_equals_reference(layer, x, context, routing, dispatched)


@pytest.mark.parametrize("name", ALL)
def test_initial_weights_ignore_global_seed(name):
    a = make_layer(name, seed=5)
    torch.rand(3)
    b = make_layer(name, seed=5)
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), n
    a.eval(), b.eval()
    x, ids = make_input(9)
    assert torch.equal(a(x, FFNContext(ids)).y, b(x, FFNContext(ids)).y)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name):
    a, b = make_layer(name, seed=1), make_layer(name, seed=2)
    b.load_state_dict(a.state_dict())
    x, ids = make_input(9)
    a.eval(), b.eval()
    assert torch.equal(a(x, FFNContext(ids)).y, b(x, FFNContext(ids)).y)
    assert all(
        v.dtype == torch.float32 for v in a.gate.state_dict().values() if v.is_floating_point()
    )


def within_capacity(layer, routing, tokens, factor):
    """Positions of the assignments within capacity: the highest priorities of each choice."""
    gate = layer.gate
    limits = gate.capacities(tokens, factor, 1)
    if limits is None:
        k = gate.capacity_k()
        limits = [min(tokens, max(1, math.ceil(factor * k * tokens / E)))] * E
        limits += [tokens] * len(gate.zero_computation_experts)
    priority_A = routing.priority_A
    if priority_A is None:
        priority_A = routing.weight_A.abs()
    priority = priority_A.tolist()
    dispatched = []
    for choice, limit in enumerate(limits):
        mine = [a for a, e in enumerate(routing.expert_A.tolist()) if e == choice]
        dispatched += sorted(mine, key=lambda a: (-priority[a], a))[:limit]
    return dispatched


@pytest.mark.parametrize("name", ALL)
def test_capacity_keeps_highest_priorities(name):
    """The layer under capacity equals the loop over the assignments of highest priority."""
    layer = second_layer(name, moe_train_capacity_factor=0.8, moe_min_capacity=1)
    x, context = case(layer, 11)
    routing = route(layer, x, context)
    dispatched = within_capacity(layer, routing, 11, 0.8)
    if not layer.gate.sees_other_tokens:  # gates that do balance by construction
        assert len(dispatched) < len(routing.token_A), "capacity must drop something"
    assert_equals_reference(layer, x, context, routing, dispatched)


@pytest.mark.parametrize("name", ALL)
def test_gates_follow_load_before_capacity(name):
    """Biases and lambdas follow the load before capacity.

    The mistake to catch is the load after capacity, which looks balanced exactly when the
    router is not.
    """
    layer = second_layer(name, moe_train_capacity_factor=0.001, moe_min_capacity=1)
    x, context = case(layer, 11)
    assigned = torch.bincount(route(layer, x, context).expert_A, minlength=E)[:E].tolist()
    layer(x, context)
    assert layer.step_sums["load_E"].tolist() == assigned and layer.step_sums["tokens"] == 11
    assert layer.counters[True]["dispatched_C"][:E].sum() <= E < sum(assigned)


def chunked(name, chunks, spread=1.0, **moe):
    """Run each rank's tokens as a micro-batch on one rank.

    Returns:
        Outputs, the gradient of x, and the gradients of the parameters by name.
    """
    layer = second_layer(name, **moe)
    x, context = case(layer, sum(chunks), spread)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    outputs = []
    start = 0
    for size in chunks:
        mine = slice(start, start + size)
        out = layer(x[:, mine], part(context, mine))
        ((out.y * weight[:, mine]).sum() + out.aux_loss).backward(retain_graph=True)
        outputs.append(out.y[0].detach())
        start += size
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in layer.named_parameters()
    }
    return torch.cat(outputs), x.grad[0], grads


def _sharded(name, ep_size, chunks, spread, moe):
    """Outputs and gradients of this rank; gradients add up over ranks."""
    groups = groups_for(ep_size)
    layer = second_layer(name, groups, **moe)
    start = sum(chunks[: groups.rank])
    x, context = case(layer, sum(chunks), spread)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    mine = slice(start, start + chunks[groups.rank])
    x = x[:, mine].detach().requires_grad_()
    out = layer(x, part(context, mine))
    ((out.y * weight[:, mine]).sum() + out.aux_loss).backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in layer.named_parameters()
    }
    return {"y": out.y[0].detach(), "x": x.grad[0], "grads": grads}


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
    y, x_grad, grads = chunked(name, chunks, spread, **moe)
    assert all(torch.isfinite(t).all() for t in (y, x_grad, *grads.values()))
    if not moe and not gate_class(name).sees_other_tokens:
        layer = second_layer(name)
        torch.testing.assert_close(
            layer(*case(layer, 11, spread)).y[0], y, atol=1e-5, rtol=1e-5
        )
    results = request.getfixturevalue(f"ranks{world}").run(
        _sharded, name, world, chunks, spread, moe
    )
    torch.testing.assert_close(torch.cat([a["y"] for a in results]), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.cat([a["x"] for a in results]), x_grad, atol=1e-5, rtol=1e-5
    )
    for n, expected in grads.items():
        parts = [a["grads"][n] for a in results]
        total = torch.cat(parts) if n.startswith("experts.") else sum(parts)
        torch.testing.assert_close(
            total, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ALL)
def test_recompute_changes_no_state(name):
    """Buffers change in post_optimizer_step only. With recompute, outputs, gradients and
    counters are those without."""
    results = []
    for recompute in (False, True):
        layer = second_layer(name)
        x, context = case(layer, 11)
        before = {n: b.clone() for n, b in layer.named_buffers()}
        layer.eval()(x, context)
        layer.train()
        if recompute:
            # With early stop the recomputed pass would end before it updates the counters.
            with set_checkpoint_early_stop(False):
                out = checkpoint(
                    layer, x, context, use_reentrant=False, context_fn=layer.recompute_contexts
                )
        else:
            out = layer(x, context)
        (out.y.sum() + out.aux_loss).backward()
        assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
        results.append(
            {
                "y": out.y.detach(),
                "x": x.grad,
                **{n: p.grad for n, p in layer.named_parameters()},
                **{f"counted {n}": t for n, t in layer.counters[True].items()},
                **{f"step {n}": t for n, t in layer.step_sums.items()},
            }
        )
    assert results[0].keys() == results[1].keys() and results[0]["counted tokens"] == 11
    for n, value in results[0].items():
        assert value is None and results[1][n] is None or torch.equal(value, results[1][n]), n


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
