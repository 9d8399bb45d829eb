"""The dispatcher against dumb loops: plans, capacity, gathers and their gradients, the exchange."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.dispatch import Combine, Gather, Permute, capacity, make_plan, return_rows, send_rows
from megatron.moe.routing import Routing
from spawn import groups_for


def make_routing(tokens, experts, weights=None, priority=None):
    weights = torch.rand(len(tokens)) if weights is None else weights
    return Routing(torch.tensor(tokens, dtype=torch.int64), torch.tensor(experts, dtype=torch.int64), weights,
                   torch.tensor(0.0), None if priority is None else torch.tensor(priority))


def test_capacity_formula():
    assert capacity(100, 8, 0.0, 4) is None
    assert capacity(100, 8, 1.25, 4) == 16  # ceil(100 / 8 * 1.25) = ceil(15.625)
    assert capacity(100, 64, 1.0, 4) == 4  # the minimum
    assert capacity(100, 8, 100.0, 4) == 100  # never above the tokens
    assert capacity(3, 8, 1.0, 4) == 3
    assert capacity(0, 8, 1.0, 4) == 0


assignments = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(-3, 3)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(assignments, st.sampled_from([None, 0, 1, 2, 5]))
def test_plan_against_a_loop(triples, limit):
    """4 routed experts, 2 local paths, 7 tokens; weights of few values make ties common."""
    tokens, experts, weights = [t for t, _, _ in triples], [e for _, e, _ in triples], [w for _, _, w in triples]
    plan = make_plan(make_routing(tokens, experts, torch.tensor(weights, dtype=torch.float32)), 7, 4, 2, limit)
    kept = []
    for expert in range(6):
        mine = [a for a in range(len(triples)) if experts[a] == expert]
        if limit is not None and expert < 4:
            mine = sorted(mine, key=lambda a: (-abs(weights[a]), a))[:limit]
        kept.append(mine)
    assert plan.wanted_C.tolist() == [experts.count(e) for e in range(6)]
    assert plan.kept_C.tolist() == [len(k) for k in kept]
    assert plan.kept_T.tolist() == [sum(tokens[a] == t for k in kept for a in k) for t in range(7)]
    assert plan.local_counts == [len(k) for k in kept[4:]]
    for rows, first, last in ((plan.routed, 0, 4), (plan.local, 4, 6)):
        pieces = rows.assignment_S.split([len(k) for k in kept[first:last]])
        assert [sorted(p.tolist()) for p in pieces] == [sorted(k) for k in kept[first:last]]
        assert rows.token_S.tolist() == [tokens[a] for a in rows.assignment_S.tolist()]
        for t in range(7):
            positions = rows.by_token_S[rows.bags_T1[t]:rows.bags_T1[t + 1]].tolist()
            assert positions == [s for s in range(len(rows.token_S)) if rows.token_S[s] == t]


def test_paths_that_return_zeros_have_no_rows_and_each_choice_may_have_its_own_limit():
    """2 routed experts and 3 local paths, the last of which returns zeros."""
    routing = make_routing([0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 3, 3, 1, 4, 4, 2], torch.arange(9.0))
    plan = make_plan(routing, 3, 2, 3, num_zero_paths=1)
    assert plan.kept_C.tolist() == [3, 1, 1, 2, 2] and plan.kept_T.tolist() == [3, 3, 3]
    assert plan.local_counts == [1, 2, 0] and plan.local.assignment_S.tolist() == [8, 3, 4]
    plan = make_plan(routing, 3, 2, 3, torch.tensor([2, 9, 0, 1, 1]), num_zero_paths=1)
    assert plan.wanted_C.tolist() == [3, 1, 1, 2, 2] and plan.kept_C.tolist() == [2, 1, 0, 1, 1]
    assert plan.routed.assignment_S.tolist() == [2, 1, 5] and plan.local.assignment_S.tolist() == [4]


def test_priority_decides_who_survives():
    plan = make_plan(make_routing([0, 1, 2], [0, 0, 0], torch.tensor([9.0, 1.0, 5.0]), [1.0, 3.0, 2.0]), 3, 1, 0, 2)
    assert sorted(plan.routed.token_S.tolist()) == [1, 2]


def test_gather_and_combine_against_a_loop_with_gradients():
    torch.manual_seed(1)
    tokens, experts = [0, 0, 1, 3, 3, 3, 0], [2, 0, 1, 1, 1, 2, 2]  # token 2 has none, (3, 1) and (0, 2) repeat
    rows = make_plan(make_routing(tokens, experts), 4, 3).routed
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 5, dtype=torch.float64)

    def ours(x, w):
        return Combine.apply(Gather.apply(x, rows) * 2, w[rows.assignment_S], rows)

    expected = [torch.zeros(5, dtype=torch.float64) for _ in range(4)]
    for a, t in enumerate(tokens):
        expected[t] = expected[t] + w[a] * (x[t] * 2)
    expected = torch.stack(expected)
    torch.testing.assert_close(ours(x, w), expected)
    torch.testing.assert_close(torch.autograd.grad(ours(x, w), (x, w), grad),
                               torch.autograd.grad(expected, (x, w), grad))
    assert torch.autograd.gradcheck(ours, (x, w))


def test_bf16_combine_accumulates_in_fp32():
    """512 equal terms: a bf16 running sum would stop growing at 256."""
    rows = make_plan(make_routing([0] * 512, [0] * 512), 1, 1).routed
    y = Combine.apply(torch.ones(512, 8, dtype=torch.bfloat16), torch.ones(512), rows)
    assert y.tolist() == [[512.0] * 8]


def test_no_rows():
    rows = make_plan(make_routing([], []), 3, 4).routed
    x = torch.randn(3, 5, requires_grad=True)
    w = torch.empty(0, requires_grad=True)
    y = Combine.apply(Gather.apply(x, rows), w, rows)
    assert y.tolist() == torch.zeros(3, 5).tolist()
    y.sum().backward()
    assert x.grad.abs().sum() == 0 and w.grad.shape == (0,)


def test_permute_gradient():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, order, order.argsort()), (x,))


def _exchange(ep_size, case):
    """Tag every row with (rank, expert, n); check what arrives, send it back multiplied, check the gradient."""
    groups = groups_for(ep_size)
    g = torch.Generator().manual_seed(100 * case + groups.rank)
    num_experts = 2 * ep_size
    kept = torch.randint(0, 4, (num_experts,), generator=g)
    if case == 1 and groups.rank == 0:
        kept.zero_()  # this rank sends nothing
    if case == 2:
        kept.zero_()
        kept[-1] = 3  # everyone to the last expert
    rows = torch.tensor([[groups.rank, e, n] for e in range(num_experts) for n in range(int(kept[e]))],
                        dtype=torch.float64).reshape(-1, 3).requires_grad_()
    received, exchange = send_rows(rows, kept, groups.ep_group)
    back = return_rows(received * (1 + groups.rank), exchange, groups.ep_group)
    back.square().sum().backward()
    return {"kept": kept.tolist(), "sent": rows.detach(), "received": received.detach(), "counts": exchange.counts,
            "back": back.detach(), "grad": rows.grad}


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_exchange_against_a_loop(world, case, request):
    answers = request.getfixturevalue(f"ranks{world}").run(_exchange, world, case)
    for rank, a in enumerate(answers):
        expected, counts = [], []
        for expert in (2 * rank, 2 * rank + 1):
            rows = [[src, expert, n] for src in range(world) for n in range(answers[src]["kept"][expert])]
            expected += rows
            counts.append(len(rows))
        assert a["received"].tolist() == expected and a["counts"] == counts
        owner = 1 + a["sent"][:, 1] // 2
        torch.testing.assert_close(a["back"], a["sent"] * owner.unsqueeze(1))
        torch.testing.assert_close(a["grad"], 2 * a["sent"] * owner.unsqueeze(1) ** 2)


def test_no_communication_when_experts_are_not_sharded():
    rows = torch.randn(5, 3)
    sent, exchange = send_rows(rows, torch.tensor([2, 3]), None)
    assert sent is rows and exchange.counts == [2, 3] and return_rows(rows, exchange, None) is rows
