"""The generic suite: every gate, picked up by name, against the contract and a dumb per-token mixture."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.moe import gates
from megatron.moe.routing import FFNContext, GateInput
from mixtures import D, E, dumb_layer, has_topk, make_input, make_layer
from spawn import groups_for

pytestmark = pytest.mark.filterwarnings("ignore:.*future:UserWarning")  # expert_choice says so once
ALL = gates.available()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens, num_experts, scale",
                         [(5, E, 1.0), (1, E, 1.0), (0, E, 1.0), (5, 1, 1.0), (13, E, 1e4)])
def test_contract_on_ordinary_and_hostile_input(name, tokens, num_experts, scale):
    """One token, none, one expert, k = E, logits of +-1e4: the answer keeps the contract and everything is finite."""
    options = {"topk": 1} if num_experts == 1 and has_topk(name) else {}
    for k_all in (False, True):
        if k_all and has_topk(name):
            options = {"topk": num_experts}
        gate = gates.create(name, hidden_size=D, num_experts=num_experts, vocab_size=50, **options, init_std=0.5)
        x, ids = make_input(tokens, scale=scale)
        for dtype in (torch.float32, torch.bfloat16):
            out = gate(GateInput(x[0].to(dtype), ids[0], torch.zeros(tokens, dtype=torch.int64)))
            out.check(tokens, num_experts + len(gate.local_paths))
            assert torch.isfinite(out.weight_A).all() and torch.isfinite(out.aux_loss)
            total = out.weight_A.sum() + out.aux_loss
            if total.requires_grad:
                total.backward()
                assert all(p.grad is None or torch.isfinite(p.grad).all() for p in gate.parameters())


@pytest.mark.parametrize("name", ALL)
def test_layer_equals_a_dumb_loop_and_gradients_reach_every_parameter(name):
    layer = make_layer(name)
    x, ids = make_input(11)
    x.requires_grad_()
    out = layer(x, FFNContext(ids))
    routing = layer.gate(GateInput(x[0], ids[0], torch.zeros(11, dtype=torch.int64)))
    expected = dumb_layer(layer, x[0], routing)
    torch.testing.assert_close(out.y[0], expected)
    grad = torch.randn(11, D, generator=torch.Generator().manual_seed(1))
    names, params = zip(("x", x), *layer.named_parameters())
    ours = torch.autograd.grad((out.y[0] * grad).sum() + out.aux_loss, params)
    dumb = torch.autograd.grad((expected * grad).sum() + routing.aux_loss, params)
    for n, a, b in zip(names, ours, dumb):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
        assert a.abs().sum() > 0, f"{n} got no gradient"


@pytest.mark.parametrize("name", ALL)
def test_repeatable_and_independent_of_global_random_state(name):
    a = make_layer(name, seed=5)
    torch.rand(3)
    b = make_layer(name, seed=5)
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), n
    a.eval(), b.eval()
    x, ids = make_input(9)
    assert torch.equal(a(x, FFNContext(ids)).y, b(x, FFNContext(ids)).y)


@pytest.mark.parametrize("name", ALL)
def test_state_round_trip(name):
    a, b = make_layer(name, seed=1), make_layer(name, seed=2)
    b.load_state_dict(a.state_dict())
    x, ids = make_input(9)
    a.eval(), b.eval()
    assert torch.equal(a(x, FFNContext(ids)).y, b(x, FFNContext(ids)).y)
    assert all(v.dtype == torch.float32 for v in a.gate.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("name", ALL)
def test_capacity_keeps_the_highest_priorities_of_each_choice(name):
    """The layer with a limit equals the dumb loop over the survivors, sorted out by hand."""
    layer = make_layer(name, moe_train_capacity_factor=0.8, moe_min_capacity=1)
    x, ids = make_input(11)
    routing = layer.gate(GateInput(x[0], ids[0], torch.zeros(11, dtype=torch.int64)))
    limits = layer.gate.capacities(11, 0.8, 1) or [3] * E + [11] * len(layer.gate.local_paths)  # ceil(11 / 4 * 0.8)
    priority = (routing.weight_A.abs() if routing.priority_A is None else routing.priority_A).tolist()
    kept = []
    for choice, limit in enumerate(limits):
        mine = [a for a, e in enumerate(routing.expert_A.tolist()) if e == choice]
        kept += sorted(mine, key=lambda a: (-priority[a], a))[:limit]
    if not layer.gate.sees_other_tokens:  # these balance by themselves
        assert len(kept) < len(priority), "the limit must be at work"
    torch.testing.assert_close(layer(x, FFNContext(ids)).y[0], dumb_layer(layer, x[0], routing, kept))


def chunked(name, chunks, **moe):
    """One rank that runs each rank's tokens as a micro-batch of its own: outputs, x.grad, parameters' grads."""
    layer = make_layer(name, **moe)
    x, ids = make_input(sum(chunks))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    outputs = []
    for a, b, w in zip(x.split(chunks, 1), ids.split(chunks, 1), weight.split(chunks, 1)):
        out = layer(a, FFNContext(b))
        ((out.y * w).sum() + out.aux_loss).backward(retain_graph=True)
        outputs.append(out.y[0].detach())
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
    return torch.cat(outputs), x.grad[0], grads


def _sharded(name, ep_size, chunks, moe):
    """Outputs and gradients of this rank; gradients add up over ranks."""
    groups = groups_for(ep_size)
    layer = make_layer(name, groups, **moe)
    start = sum(chunks[: groups.rank])
    x, ids = make_input(sum(chunks))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    mine = slice(start, start + chunks[groups.rank])
    x = x[:, mine].clone().requires_grad_()
    out = layer(x, FFNContext(ids[:, mine]))
    ((out.y * weight[:, mine]).sum() + out.aux_loss).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
    return {"y": out.y[0].detach(), "x": x.grad[0], "grads": grads}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("world, chunks, moe", [
    (2, [6, 5], {}), (2, [11, 0], {}), (4, [3, 0, 7, 1], {}),
    (2, [6, 5], {"moe_train_capacity_factor": 1.0, "moe_min_capacity": 1}),
], ids=["2", "2, one without tokens", "4, one without tokens", "2, capacity 1"])
def test_sharded_equals_one_rank(name, world, chunks, moe, request):
    """Outputs, input gradients and parameter gradients on 2 and 4 ranks, dropless and with capacity."""
    y, x_grad, grads = chunked(name, chunks, **moe)
    if not moe and not gates.gate_class(name).sees_other_tokens:
        layer = make_layer(name)
        x, ids = make_input(11)
        torch.testing.assert_close(layer(x, FFNContext(ids)).y[0], y, atol=1e-5, rtol=1e-5)
    answers = request.getfixturevalue(f"ranks{world}").run(_sharded, name, world, chunks, moe)
    torch.testing.assert_close(torch.cat([a["y"] for a in answers]), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([a["x"] for a in answers]), x_grad, atol=1e-5, rtol=1e-5)
    for n, expected in grads.items():
        parts = [a["grads"][n] for a in answers]
        whole = torch.cat(parts) if n.startswith("experts.") else sum(parts)
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_forwards_change_no_state_and_recompute_counts_nothing_twice(name):
    """Buffers move in after_step only; with recompute, outputs, gradients and counters are those without."""
    results = []
    for recompute in (False, True):
        layer = make_layer(name)
        x, ids = make_input(11)
        x.requires_grad_()
        before = {n: b.clone() for n, b in layer.named_buffers()}
        layer.eval()(x, FFNContext(ids))
        layer.train()
        if recompute:
            out = checkpoint(layer, x, FFNContext(ids), use_reentrant=False, context_fn=layer.recompute_contexts)
        else:
            out = layer(x, FFNContext(ids))
        (out.y.sum() + out.aux_loss).backward()
        assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
        results.append({"y": out.y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()},
                        **{f"counted {n}": t for n, t in layer.counters[True].items()},
                        **{f"step {n}": t for n, t in layer.step_sums.items()}})
    assert results[0].keys() == results[1].keys() and results[0]["counted tokens"] == 11
    for n, value in results[0].items():
        assert value is None and results[1][n] is None or torch.equal(value, results[1][n]), n


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_a_flag(name):
    from megatron.config.cli import parse

    for f in dataclasses.fields(gates.gate_class(name).Config):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if isinstance(default, bool):
            continue
        argv = ["--gate", name, "--num-experts", str(E), "--" + f.name.replace("_", "-"),
                "" if default == () else str(default)]
        assert parse(argv, gates.config_of, gates.available).gate_options[f.name] == default


def test_create_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="--gate is 'nope'; allowed: .*threshold.*topk"):
        gates.create("nope", hidden_size=D, num_experts=E)
    with pytest.raises(ValueError, match="gate 'topk' has no option 'threshold'; allowed: topk score_function"):
        gates.create("topk", hidden_size=D, num_experts=E, threshold=0.5)
    with pytest.raises(ValueError, match="num_experts is 0"):
        gates.create("topk", hidden_size=D, num_experts=0)


def test_a_taken_name_is_an_error():
    with pytest.raises(ValueError, match="gate name 'topk' is taken by megatron.moe.gates.topk.TopKGate"):
        class Other(gates.Gate, name="topk"):
            pass


def test_a_gate_without_forward_says_so():
    class Empty(gates.Gate):
        Config = dict

    with pytest.raises(NotImplementedError, match="gate Empty has no forward"):
        Empty({}, gates.Place(D, E))(GateInput(torch.zeros(1, D)))


def test_local_paths_stay_on_the_rank_and_are_not_counted_against_capacity():
    """A gate with two local paths (zero and copy) in a layer with capacity 1."""

    class Local(gates.Gate):
        def __init__(self):
            super().__init__(None, gates.Place(D, 2))
            self.local_paths = nn.ModuleList([nn.Identity(), Negative()])

        def forward(self, inp):
            from megatron.moe.routing import Routing

            n = len(inp.x_TD)
            token = torch.arange(n).repeat(3)
            expert = torch.cat([torch.full((n,), 2), torch.full((n,), 3), torch.zeros(n, dtype=torch.int64)])
            return Routing(token, expert, torch.ones(3 * n), torch.tensor(0.0))

    layer = make_layer("topk", num_experts=2, moe_train_capacity_factor=0.1, moe_min_capacity=1)
    layer.gate = Local()
    x, _ = make_input(6)
    y = layer(x).y[0]
    expert = layer.experts(x[0], [6, 0])
    torch.testing.assert_close(y, x[0] - 3 * x[0] + expert * (torch.arange(6) == 0).unsqueeze(1))


class Negative(nn.Module):
    def forward(self, x):
        return -3 * x


def test_capacity_factors_differ_between_training_and_evaluation():
    layer = make_layer("topk", moe_train_capacity_factor=0.5, moe_eval_capacity_factor=0.0, moe_min_capacity=1)
    x, _ = make_input(32)
    layer(x)
    layer.eval()
    layer(x)
    assert layer.counters[True]["kept_C"].max() <= 4 < layer.counters[True]["wanted_C"].max()
    assert torch.equal(layer.counters[False]["kept_C"], layer.counters[False]["wanted_C"])


def test_a_dropped_token_passes_through_the_residual_only():
    layer = make_layer("topk", moe_train_capacity_factor=0.01, moe_min_capacity=1)
    x, _ = make_input(32)
    y = layer(x).y[0]
    assert (y.abs().sum(-1) == 0).sum() >= 32 - E


def test_shared_experts_add_an_mlp_for_every_token():
    with_shared, without = make_layer("topk", shared=2), make_layer("topk")
    for p in with_shared.shared.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    assert with_shared.shared.up_proj.weight.shape == (24, D)
    x, _ = make_input(7)
    torch.testing.assert_close(with_shared(x).y, without(x).y + with_shared.shared(x).y)
