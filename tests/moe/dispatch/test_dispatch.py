"""Moving rows, against dumb loops: gathers and their gradients, the exchange between ranks."""

import pytest
import torch
import torch.distributed as dist

from helpers.routings import make_routing
from helpers.spawn import groups_for
from megatron.moe.dispatch.all_to_all import AllToAll, sort_received_by_expert
from megatron.moe.dispatch.permute import (
    GatherWeights,
    PermuteTokens,
    UnpermuteTokens,
    segment_sum,
)
from megatron.moe.dispatch.plan import build_dispatch_plan


@pytest.mark.parametrize("limit", [None, 2])
def test_gather_and_combine_against_a_loop_with_gradients(limit):
    torch.manual_seed(1)
    tokens, experts = (
        [0, 0, 1, 3, 3, 3, 0],
        [2, 0, 1, 1, 1, 2, 2],
    )  # token 2 has none, (3, 1) and (0, 2) repeat
    weights = torch.tensor([3.0, 2, 5, 4, 1, 6, 7])
    rows = build_dispatch_plan(
        make_routing(tokens, experts, weights), 4, 3, capacity=limit
    ).routed
    kept = [
        a for a in range(7) if limit is None or a not in (0, 4)
    ]  # the smallest of those at experts 1 and 2
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = weights.double().requires_grad_()
    grad = torch.randn(4, 5, dtype=torch.float64)

    def ours(x, w):
        return UnpermuteTokens.apply(
            PermuteTokens.apply(x, rows) * 2, GatherWeights.apply(w, rows), rows
        )

    expected = [torch.zeros(5, dtype=torch.float64) for _ in range(4)]
    for a in kept:
        expected[tokens[a]] = expected[tokens[a]] + w[a] * (x[tokens[a]] * 2)
    expected = torch.stack(expected)
    torch.testing.assert_close(ours(x, w), expected)
    for name, a, b in zip(
        "xw",
        torch.autograd.grad(ours(x, w), (x, w), grad),
        torch.autograd.grad(expected, (x, w), grad),
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.autograd.gradcheck(ours, (x, w))
    plain = UnpermuteTokens.apply(PermuteTokens.apply(x, rows), None, rows)
    torch.testing.assert_close(
        plain, torch.stack([x[t] * sum(tokens[a] == t for a in kept) for t in range(4)])
    )
    assert torch.autograd.gradcheck(
        lambda x: UnpermuteTokens.apply(PermuteTokens.apply(x, rows), None, rows), (x,)
    )


def test_weights_of_dropped_assignments_have_no_gradient():
    """Whatever an expert function leaves in the places that are no rows."""
    weights = torch.tensor([1.0, 2, 3], requires_grad=True)
    rows = build_dispatch_plan(
        make_routing([0, 1, 2], [0, 0, 1], weights), 3, 2, capacity=1
    ).routed
    weight_S = GatherWeights.apply(weights, rows)
    assert weight_S[:2].tolist() == [2, 3]
    weight_S.backward(torch.tensor([5.0, 7.0, float("nan")]))
    assert weights.grad.tolist() == [0, 5, 7]


def test_bf16_combine_accumulates_in_fp32():
    """512 equal terms: a bf16 running sum would stop growing at 256."""
    rows = build_dispatch_plan(make_routing([0] * 512, [0] * 512), 1, 1).routed
    for weights in (None, torch.ones(512)):
        y = UnpermuteTokens.apply(torch.ones(512, 8, dtype=torch.bfloat16), weights, rows)
        assert y.tolist() == [[512.0] * 8]


def test_no_rows():
    rows = build_dispatch_plan(make_routing([], []), 3, 4).routed
    x = torch.randn(3, 5, requires_grad=True)
    w = torch.empty(0, requires_grad=True)
    y = UnpermuteTokens.apply(PermuteTokens.apply(x, rows), GatherWeights.apply(w, rows), rows)
    assert y.tolist() == torch.zeros(3, 5).tolist()
    y.sum().backward()
    assert x.grad.abs().sum() == 0 and w.grad.shape == (0,)


def test_bags_may_end_before_the_order_does():
    x, order = torch.arange(6.0).view(3, 2), torch.tensor([2, 0, 1, 1])
    assert segment_sum(x, order, torch.tensor([0, 2, 2])).tolist() == [[4, 6], [0, 0]]
    assert segment_sum(
        x, order, torch.tensor([0, 2, 3]), torch.tensor([1.0, 2, 3, 4])
    ).tolist() == [[4, 7], [6, 9]]
    assert segment_sum(x, order, torch.tensor([0, 0])).tolist() == [[0, 0]]


def test_elsewhere_the_last_bag_would_go_to_the_end(monkeypatch):
    """CUDA's embedding_bag ignores the last offset: what lies beyond must not be added to the last token."""

    def embedding_bag(order, rows, bags, mode, per_sample_weights, include_last_offset):
        ends = [*bags[1:-1].tolist(), len(order)]
        weights = torch.ones(len(order)) if per_sample_weights is None else per_sample_weights
        return torch.stack(
            [
                (rows[order[a:b]] * weights[a:b, None]).sum(0)
                for a, b in zip(bags.tolist(), ends)
            ]
        )

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", embedding_bag)
    x = torch.tensor([[1.0], [2], [float("nan")]])
    order = torch.tensor([1, 0, 2, 2])
    for weights, expected in ((None, [[2], [1]]), (torch.tensor([3.0, 5, 1, 1]), [[6], [5]])):
        assert (
            segment_sum(
                x, order.as_subclass(Elsewhere), torch.tensor([0, 1, 2]), weights
            ).tolist()
            == expected
        )


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
    rows = (
        torch.tensor(
            [[groups.rank, e, n] for e in range(num_experts) for n in range(int(kept[e]))],
            dtype=torch.float64,
        )
        .reshape(-1, 3)
        .requires_grad_()
    )
    weights = (rows.detach()[:, 2] + 10).requires_grad_()
    experts = [e for e in range(num_experts) for _ in range(int(kept[e]))]
    splits = build_dispatch_plan(
        make_routing(list(range(len(experts))), experts),
        len(experts),
        num_experts,
        group=groups.ep_group,
    ).splits
    exchange = AllToAll(
        (rows, weights), splits.input_splits, splits.output_splits, groups.ep_group
    )
    beside = (rows * 0.5).sum()  # its backward runs while gradients travel
    received, received_weights = exchange.finish()
    arrived = sort_received_by_expert(splits)
    there = PermuteTokens.apply(received, arrived)
    out = UnpermuteTokens.apply(
        there * (1 + groups.rank), GatherWeights.apply(received_weights, arrived), arrived
    )
    (back,) = AllToAll(
        (out,), splits.output_splits, splits.input_splits, groups.ep_group
    ).finish()
    (back.square().sum() + beside).backward()
    return {
        "kept": kept.tolist(),
        "sent": rows.detach(),
        "received": there.detach(),
        "counts": arrived.counts(),
        "back": back.detach(),
        "grad": rows.grad,
        "weights": weights.detach(),
        "weights_grad": weights.grad,
    }


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_exchange_against_a_loop(world, case, request):
    answers = request.getfixturevalue(f"ranks{world}").run(_exchange, world, case)
    for rank, a in enumerate(answers):
        expected, counts = [], []
        for expert in (2 * rank, 2 * rank + 1):
            rows = [
                [src, expert, n]
                for src in range(world)
                for n in range(answers[src]["kept"][expert])
            ]
            expected += rows
            counts.append(len(rows))
        assert a["received"].tolist() == expected and a["counts"] == counts
        factor = ((1 + a["sent"][:, 1] // 2) * a["weights"]).unsqueeze(1)
        torch.testing.assert_close(a["back"], a["sent"] * factor)
        torch.testing.assert_close(a["grad"], 2 * a["sent"] * factor**2 + 0.5)
        torch.testing.assert_close(
            a["weights_grad"], (2 * a["sent"] ** 2 * factor**2).sum(1) / a["weights"]
        )


def _overlap(ep_size):
    """What happens when, between two ranks: the order of transfers, waits and the work beside them."""
    groups, log = groups_for(ep_size), []

    class Beside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            log.append("work")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            log.append("work back")
            return grad

    original = dist.all_to_all_single

    def all_to_all_single(*args, **kwargs):
        assert kwargs["async_op"]
        work = original(*args, **kwargs)
        log.append("start")

        class Work:
            def wait(self):
                log.append("wait")
                work.wait()

        return Work()

    dist.all_to_all_single = all_to_all_single
    try:
        x = torch.ones(2, 3, requires_grad=True)
        exchange = AllToAll((x,), [1, 1], [1, 1], groups.ep_group)
        beside = Beside.apply(x)
        (received,) = exchange.finish()
        (received * 2 + beside).sum().backward()
    finally:
        dist.all_to_all_single = original
    return log, x.grad.tolist()


def test_work_beside_an_exchange_overlaps_with_it_forward_and_backward(ranks2):
    for log, grad in ranks2.run(_overlap, 2):
        assert log == ["start", "work", "wait", "start", "work back", "wait"]
        assert grad == [[3.0] * 3] * 2


def _host_copies(ep_size):
    """tolist, item, ... of one forward pass of a sharded layer with shared experts and local paths, after the first."""
    from helpers.moe_layers import make_input, make_layer

    layer = make_layer("moepp", groups_for(ep_size), shared=1)
    x, _ = make_input(7)
    layer(x)
    waits, originals = [], {}
    for name in ("tolist", "item", "__bool__", "__int__"):
        originals[name] = getattr(torch.Tensor, name)
        setattr(
            torch.Tensor,
            name,
            lambda self, *a, name=name: (
                waits.append((name, self.numel())) or originals[name](self, *a)
            ),
        )
    try:
        layer(x)
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    return waits


def test_one_copy_to_the_host_for_everything(ranks2):
    """3 local paths (zero, copy, constant), rows to and from 2 ranks; then the CPU's own loop over 2 experts."""
    for waits in ranks2.run(_host_copies, 2):
        # bag_sum asks for a length, on the CPU only.
        assert [w for w in waits if w != ("__int__", 1)] == [
            ("tolist", 3 + 2 + 2),
            ("tolist", 2),
        ]
