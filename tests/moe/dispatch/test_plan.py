"""The dispatch plan against loops: order, capacity, zero-computation experts, device syncs."""

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
    assert capacity_from_factor(100, 8, 100.0, 4) == 100  # at most the number of tokens
    assert capacity_from_factor(100, 8, 1.25, 4, k=2) == 32  # ceil(31.25)
    assert capacity_from_factor(100, 8, 8.0, 4, k=2) == 100
    assert capacity_from_factor(96, 64, 4 / 3, 1, k=6) == 12  # 12.000000000000002 in floats
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
def test_plan_equals_loop(triples, capacity, choices, token_major):
    """6 choices, some of them zero-computation experts, and 7 tokens. Weights of few values make
    ties common."""
    num_experts, num_zero_computation = choices
    if token_major:
        triples = sorted(triples, key=lambda t: t[0])
    tokens = [t for t, _, _ in triples]
    experts = [e for _, e, _ in triples]
    weights = [w for _, _, w in triples]
    routing = make_routing(
        tokens, experts, torch.tensor(weights, dtype=torch.float32), token_major=token_major
    )
    plan = build_dispatch_plan(routing, 7, num_experts, num_zero_computation, capacity)
    dispatched = []
    for expert in range(6):
        mine = [a for a in range(len(triples)) if experts[a] == expert]
        if capacity is not None and expert < num_experts:
            mine = sorted(mine, key=lambda a: (-abs(weights[a]), a))[:capacity]
        dispatched.append(mine)
    assert plan.assigned_C.tolist() == [experts.count(e) for e in range(6)]
    assert plan.dispatched_C.tolist() == [len(d) for d in dispatched]
    assert plan.dispatched_T.tolist() == [
        sum(tokens[a] == t for d in dispatched for a in d) for t in range(7)
    ]
    assert plan.zero_computation_counts == [len(d) for d in dispatched[num_experts:]]
    assert plan.splits is None
    assert_rows(plan.routed, dispatched[:num_experts], tokens)
    if num_zero_computation == 0:
        assert plan.zero_computation is None
    else:
        assert_rows(plan.zero_computation, dispatched[num_experts:], tokens)


def assert_rows(permuted, groups, tokens):
    """Check that the rows are these assignments, expert by expert, in both orders."""
    assert permuted.counts() == [len(g) for g in groups]
    length = sum(permuted.counts())
    num_entries = len(permuted.source_index_S)
    assert permuted.source_index_S.unique().numel() == num_entries
    assert num_entries == len(permuted.token_S) >= length
    parts = permuted.source_index_S[:length].split(permuted.counts())
    assert [sorted(part.tolist()) for part in parts] == [sorted(g) for g in groups]
    assert permuted.token_S.tolist() == [tokens[a] for a in permuted.source_index_S.tolist()]
    offsets = permuted.token_offsets_T1.tolist()
    assert offsets[0] == 0 and offsets[-1] == length
    for t in range(7):
        rows = permuted.unpermute_index_S[offsets[t] : offsets[t + 1]].tolist()
        assert sorted(rows) == [s for s in range(length) if permuted.token_S[s] == t]


def test_zero_experts_have_no_rows():
    """2 routed and 3 zero-computation experts, the last of which returns zeros. Each choice may
    have its own capacity."""
    routing = make_routing(
        [0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 3, 3, 1, 4, 4, 2], torch.arange(9.0)
    )
    plan = build_dispatch_plan(routing, 3, 2, 3, num_zero_output=1)
    assert plan.dispatched_C.tolist() == [3, 1, 1, 2, 2]
    assert plan.dispatched_T.tolist() == [3, 3, 3]
    assert plan.zero_computation_counts == [1, 2, 0]
    assert plan.zero_computation.source_index_S.tolist() == [8, 3, 4]
    assert plan.zero_computation.counts() == [1, 2]
    plan = build_dispatch_plan(
        routing, 3, 2, 3, torch.tensor([2, 9, 0, 1, 1]), num_zero_output=1
    )
    assert plan.assigned_C.tolist() == [3, 1, 1, 2, 2]
    assert plan.dispatched_C.tolist() == [2, 1, 0, 1, 1]
    assert plan.routed.source_index_S.tolist() == [2, 1, 5] and plan.routed.counts() == [2, 1]
    assert plan.zero_computation.counts() == [0, 1]
    assert plan.zero_computation.source_index_S.tolist() == [4]


@pytest.mark.parametrize("capacity", [None, 1])
def test_all_zero_experts_have_no_rows(capacity):
    routing = make_routing([0, 0, 1, 1], [0, 2, 1, 3])
    plan = build_dispatch_plan(routing, 2, 2, 2, capacity, num_zero_output=2)
    assert plan.zero_computation_counts == [0, 0]
    assert plan.zero_computation.counts() == []
    assert plan.zero_computation.token_offsets_T1.tolist() == [0, 0, 0]
    assert plan.dispatched_C.tolist() == [1, 1, 1, 1]
    assert plan.routed.token_S.tolist() == [0, 1]


def test_priority_overrides_weight():
    routing = make_routing([0, 1, 2], [0, 0, 0], torch.tensor([9.0, 1.0, 5.0]), [1.0, 3.0, 2.0])
    plan = build_dispatch_plan(routing, 3, 1, capacity=2)
    assert plan.routed.token_S[: plan.routed.counts()[0]].tolist() == [1, 2]


def test_unpermuted_plan_counts_only():
    routing = make_routing([2, 0, 0], [1, 1, 3])
    plan = DispatchPlan.unpermuted(routing, 3, 5)
    assert plan.routed is None and plan.zero_computation is None and plan.splits is None
    assert plan.assigned_C.tolist() == plan.dispatched_C.tolist() == [0, 2, 0, 1, 0]
    assert plan.dispatched_T.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "capacity, num_zero_computation, syncs", [(None, 0, 0), (2, 0, 0), (None, 2, 1), (2, 2, 1)]
)
def test_plan_syncs_as_documented(capacity, num_zero_computation, syncs, monkeypatch):
    """The host never synchronises when all experts are local, and once with zero-computation
    experts, with and without capacity."""
    calls = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, original=original, name=name: (
                calls.append(name) or original(self, *a)
            ),
        )
    plan = build_dispatch_plan(
        make_routing([0, 0, 1, 1], [0, 4, 0, 5]),
        2,
        6 - num_zero_computation,
        num_zero_computation,
        capacity,
    )
    monkeypatch.undo()
    assert len(calls) == syncs and plan.dispatched_C.tolist() == [2, 0, 0, 0, 1, 1]
