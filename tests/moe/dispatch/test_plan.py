"""The plan against dumb loops: order, capacity, local paths, and that it waits for the device as seldom as it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.routings import make_routing
from megatron.moe.dispatch.plan import DispatchPlan, build_dispatch_plan, capacity_from_factor


def test_capacity_formula():
    assert capacity_from_factor(100, 8, 0.0, 4) is None
    assert capacity_from_factor(100, 8, 1.25, 4) == 16  # ceil(100 / 8 * 1.25) = ceil(15.625)
    assert capacity_from_factor(100, 64, 1.0, 4) == 4  # the minimum
    assert capacity_from_factor(100, 8, 100.0, 4) == 100  # never above the tokens
    assert capacity_from_factor(3, 8, 1.0, 4) == 3
    assert capacity_from_factor(0, 8, 1.0, 4) == 0


assignments = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(-3, 3)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(
    assignments,
    st.sampled_from([None, 0, 1, 2, 5]),
    st.sampled_from([(6, 0), (4, 2)]),
    st.booleans(),
)
def test_plan_against_a_loop(triples, limit, choices, token_major):
    """6 choices, some of them local paths, 7 tokens; weights of few values make ties common."""
    num_experts, num_local = choices
    triples = sorted(triples, key=lambda t: t[0]) if token_major else triples
    tokens, experts, weights = (
        [t for t, _, _ in triples],
        [e for _, e, _ in triples],
        [w for _, _, w in triples],
    )
    routing = make_routing(
        tokens, experts, torch.tensor(weights, dtype=torch.float32), token_major=token_major
    )
    plan = build_dispatch_plan(routing, 7, num_experts, num_local, limit)
    kept = []
    for expert in range(6):
        mine = [a for a in range(len(triples)) if experts[a] == expert]
        if limit is not None and expert < num_experts:
            mine = sorted(mine, key=lambda a: (-abs(weights[a]), a))[:limit]
        kept.append(mine)
    assert plan.assigned_C.tolist() == [experts.count(e) for e in range(6)]
    assert plan.dispatched_C.tolist() == [len(k) for k in kept]
    assert plan.dispatched_T.tolist() == [
        sum(tokens[a] == t for k in kept for a in k) for t in range(7)
    ]
    assert plan.zero_computation_counts == [len(k) for k in kept[num_experts:]]
    assert plan.splits is None and (plan.zero_computation is None) == (num_local == 0)
    for rows, groups in (
        (plan.routed, kept[:num_experts]),
        (plan.zero_computation, kept[num_experts:]),
    ):
        if rows is not None:
            check_rows(rows, groups, tokens)


def check_rows(rows, groups, tokens):
    """The rows are these assignments, group by group, and the token-wise view is of the same rows."""
    assert rows.counts() == [len(g) for g in groups]
    length = sum(rows.counts())
    assert (
        rows.source_index_S.unique().numel()
        == len(rows.source_index_S)
        == len(rows.token_S)
        >= length
    )
    pieces = rows.source_index_S[:length].split(rows.counts())
    assert [sorted(p.tolist()) for p in pieces] == [sorted(g) for g in groups]
    assert rows.token_S.tolist() == [tokens[a] for a in rows.source_index_S.tolist()]
    assert rows.token_offsets_T1[0] == 0 and rows.token_offsets_T1[-1] == length
    for t in range(7):
        positions = rows.unpermute_index_S[
            rows.token_offsets_T1[t] : rows.token_offsets_T1[t + 1]
        ].tolist()
        assert sorted(positions) == [s for s in range(length) if rows.token_S[s] == t]


def test_paths_that_return_zeros_have_no_rows_and_each_choice_may_have_its_own_limit():
    """2 routed experts and 3 local paths, the last of which returns zeros."""
    routing = make_routing(
        [0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 3, 3, 1, 4, 4, 2], torch.arange(9.0)
    )
    plan = build_dispatch_plan(routing, 3, 2, 3, num_zero_output=1)
    assert plan.dispatched_C.tolist() == [3, 1, 1, 2, 2] and plan.dispatched_T.tolist() == [
        3,
        3,
        3,
    ]
    assert plan.zero_computation_counts == [
        1,
        2,
        0,
    ] and plan.zero_computation.source_index_S.tolist() == [8, 3, 4]
    assert plan.zero_computation.counts() == [1, 2]
    plan = build_dispatch_plan(
        routing, 3, 2, 3, torch.tensor([2, 9, 0, 1, 1]), num_zero_output=1
    )
    assert plan.assigned_C.tolist() == [3, 1, 1, 2, 2] and plan.dispatched_C.tolist() == [
        2,
        1,
        0,
        1,
        1,
    ]
    assert plan.routed.source_index_S.tolist() == [2, 1, 5] and plan.routed.counts() == [2, 1]
    assert plan.zero_computation.counts() == [
        0,
        1,
    ] and plan.zero_computation.source_index_S.tolist() == [4]


def test_local_paths_that_all_return_zeros():
    for limit in (None, 1):
        plan = build_dispatch_plan(
            make_routing([0, 0, 1, 1], [0, 2, 1, 3]), 2, 2, 2, limit, num_zero_output=2
        )
        assert (
            plan.zero_computation_counts == [0, 0]
            and plan.zero_computation.counts() == []
            and plan.zero_computation.token_offsets_T1.tolist() == [0, 0, 0]
        )
        assert plan.dispatched_C.tolist() == [1, 1, 1, 1] and plan.routed.token_S.tolist() == [
            0,
            1,
        ]


def test_priority_decides_who_survives():
    plan = build_dispatch_plan(
        make_routing([0, 1, 2], [0, 0, 0], torch.tensor([9.0, 1.0, 5.0]), [1.0, 3.0, 2.0]),
        3,
        1,
        0,
        2,
    )
    assert plan.routed.token_S[: plan.routed.counts()[0]].tolist() == [1, 2]


def test_a_list_that_needs_no_order():
    routing = make_routing([2, 0, 0], [1, 1, 3])
    plan = DispatchPlan.unpermuted(routing, 3, 5)
    assert plan.routed is None and plan.zero_computation is None and plan.splits is None
    assert plan.assigned_C.tolist() == plan.dispatched_C.tolist() == [0, 2, 0, 1, 0]
    assert plan.dispatched_T.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "limit, num_local, most", [(None, 0, 0), (2, 0, 0), (None, 2, 1), (2, 2, 1)]
)
def test_how_often_the_host_waits(limit, num_local, most, monkeypatch):
    """Never when all experts are here, and once for the rows of local paths, capacity or not."""
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, original=original, name=name: (
                waits.append(name) or original(self, *a)
            ),
        )
    plan = build_dispatch_plan(
        make_routing([0, 0, 1, 1], [0, 4, 0, 5]), 2, 6 - num_local, num_local, limit
    )
    monkeypatch.undo()
    assert len(waits) == most and plan.dispatched_C.tolist() == [2, 0, 0, 0, 1, 1]
