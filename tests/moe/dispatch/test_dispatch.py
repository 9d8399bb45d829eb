"""Permuting rows and the all-to-all between ranks, against loops: values and gradients."""

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


@pytest.mark.parametrize("capacity", [None, 2])
def test_permute_and_unpermute_equal_loop(capacity):
    torch.manual_seed(1)
    # Token 2 has no expert, and (3, 1) and (0, 2) repeat.
    tokens = [0, 0, 1, 3, 3, 3, 0]
    experts = [2, 0, 1, 1, 1, 2, 2]
    weights = torch.tensor([3.0, 2, 5, 4, 1, 6, 7])
    permuted = build_dispatch_plan(
        make_routing(tokens, experts, weights), 4, 3, capacity=capacity
    ).routed
    # Capacity drops the assignment of smallest weight at experts 1 and 2.
    dispatched = [a for a in range(7) if capacity is None or a not in (0, 4)]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = weights.double().requires_grad_()
    grad = torch.randn(4, 5, dtype=torch.float64)

    def ours(x, w):
        return UnpermuteTokens.apply(
            PermuteTokens.apply(x, permuted) * 2, GatherWeights.apply(w, permuted), permuted
        )

    expected = [torch.zeros(5, dtype=torch.float64) for _ in range(4)]
    for a in dispatched:
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
    plain = UnpermuteTokens.apply(PermuteTokens.apply(x, permuted), None, permuted)
    torch.testing.assert_close(
        plain, torch.stack([x[t] * sum(tokens[a] == t for a in dispatched) for t in range(4)])
    )
    assert torch.autograd.gradcheck(
        lambda x: UnpermuteTokens.apply(PermuteTokens.apply(x, permuted), None, permuted), (x,)
    )


def test_dropped_weights_have_no_gradient():
    """Experts may leave anything in the gradients of padding rows."""
    weights = torch.tensor([1.0, 2, 3], requires_grad=True)
    rows = build_dispatch_plan(
        make_routing([0, 1, 2], [0, 0, 1], weights), 3, 2, capacity=1
    ).routed
    weight_S = GatherWeights.apply(weights, rows)
    assert weight_S[:2].tolist() == [2, 3]
    weight_S.backward(torch.tensor([5.0, 7.0, float("nan")]))
    assert weights.grad.tolist() == [0, 5, 7]


def test_bf16_unpermute_accumulates_in_fp32():
    """Of 512 equal terms a running sum in bf16 would stop growing at 256."""
    rows = build_dispatch_plan(make_routing([0] * 512, [0] * 512), 1, 1).routed
    for weights in (None, torch.ones(512)):
        y = UnpermuteTokens.apply(torch.ones(512, 8, dtype=torch.bfloat16), weights, rows)
        assert y.tolist() == [[512.0] * 8]


def test_no_rows_give_zeros():
    rows = build_dispatch_plan(make_routing([], []), 3, 4).routed
    x = torch.randn(3, 5, requires_grad=True)
    w = torch.empty(0, requires_grad=True)
    y = UnpermuteTokens.apply(PermuteTokens.apply(x, rows), GatherWeights.apply(w, rows), rows)
    assert y.tolist() == torch.zeros(3, 5).tolist()
    y.sum().backward()
    assert x.grad.abs().sum() == 0 and w.grad.shape == (0,)


def test_segment_sum_ignores_padding():
    x = torch.arange(6.0).view(3, 2)
    index = torch.tensor([2, 0, 1, 1])
    assert segment_sum(x, index, torch.tensor([0, 2, 2])).tolist() == [[4, 6], [0, 0]]
    weights = torch.tensor([1.0, 2, 3, 4])
    got = segment_sum(x, index, torch.tensor([0, 2, 3]), weights)
    assert got.tolist() == [[4, 7], [6, 9]]
    assert segment_sum(x, index, torch.tensor([0, 0])).tolist() == [[0, 0]]


def test_segment_sum_ignores_padding_on_cuda(monkeypatch):
    """CUDA's embedding_bag, imitated here, extends the last bag to the end of the index: the
    padding must not be added to the last token."""

    def embedding_bag(index, rows, offsets, mode, per_sample_weights, include_last_offset):
        ends = [*offsets[1:-1].tolist(), len(index)]
        weights = per_sample_weights
        if weights is None:
            weights = torch.ones(len(index))
        return torch.stack(
            [
                (rows[index[a:b]] * weights[a:b, None]).sum(0)
                for a, b in zip(offsets.tolist(), ends)
            ]
        )

    class CudaTensor(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", embedding_bag)
    x = torch.tensor([[1.0], [2], [float("nan")]])
    index = torch.tensor([1, 0, 2, 2]).as_subclass(CudaTensor)
    for weights, expected in ((None, [[2], [1]]), (torch.tensor([3.0, 5, 1, 1]), [[6], [5]])):
        got = segment_sum(x, index, torch.tensor([0, 1, 2]), weights)
        assert got.tolist() == expected


def _exchange_tagged_rows(ep_size, case):
    """Tag each row with (rank, expert, n), send it to its expert's rank and back multiplied."""
    groups = groups_for(ep_size)
    g = torch.Generator().manual_seed(100 * case + groups.rank)
    num_experts = 2 * ep_size
    rows_per_expert = torch.randint(0, 4, (num_experts,), generator=g)
    if case == 1 and groups.rank == 0:
        rows_per_expert.zero_()  # this rank sends nothing
    if case == 2:
        rows_per_expert.zero_()
        rows_per_expert[-1] = 3  # all rows go to the last expert
    counts = rows_per_expert.tolist()
    tags = [[groups.rank, e, n] for e in range(num_experts) for n in range(counts[e])]
    rows = torch.tensor(tags, dtype=torch.float64).reshape(-1, 3).requires_grad_()
    weights = (rows.detach()[:, 2] + 10).requires_grad_()
    experts = [e for e in range(num_experts) for _ in range(counts[e])]
    splits = build_dispatch_plan(
        make_routing(list(range(len(experts))), experts),
        len(experts),
        num_experts,
        group=groups.ep_group,
    ).splits
    exchange = AllToAll(
        (rows, weights), splits.input_splits, splits.output_splits, groups.ep_group
    )
    overlapping = (rows * 0.5).sum()  # its backward overlaps with that of the all-to-all
    received, received_weights = exchange.finish()
    by_expert = sort_received_by_expert(splits)
    expert_inputs = PermuteTokens.apply(received, by_expert)
    out = UnpermuteTokens.apply(
        expert_inputs * (1 + groups.rank),
        GatherWeights.apply(received_weights, by_expert),
        by_expert,
    )
    (back,) = AllToAll(
        (out,), splits.output_splits, splits.input_splits, groups.ep_group
    ).finish()
    (back.square().sum() + overlapping).backward()
    return {
        "rows_per_expert": counts,
        "sent": rows.detach(),
        "received": expert_inputs.detach(),
        "received_counts": by_expert.counts(),
        "back": back.detach(),
        "grad": rows.grad,
        "weights": weights.detach(),
        "weights_grad": weights.grad,
    }


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_all_to_all_equals_loop(world, case, request):
    results = request.getfixturevalue(f"ranks{world}").run(_exchange_tagged_rows, world, case)
    for rank, a in enumerate(results):
        expected = []
        counts = []
        for expert in (2 * rank, 2 * rank + 1):
            rows = [
                [src, expert, n]
                for src in range(world)
                for n in range(results[src]["rows_per_expert"][expert])
            ]
            expected += rows
            counts.append(len(rows))
        assert a["received"].tolist() == expected and a["received_counts"] == counts
        factor = ((1 + a["sent"][:, 1] // 2) * a["weights"]).unsqueeze(1)
        torch.testing.assert_close(a["back"], a["sent"] * factor)
        torch.testing.assert_close(a["grad"], 2 * a["sent"] * factor**2 + 0.5)
        torch.testing.assert_close(
            a["weights_grad"], (2 * a["sent"] ** 2 * factor**2).sum(1) / a["weights"]
        )


def _log_overlap(ep_size):
    """Log the order of transfers, waits and overlapping work between two ranks."""
    groups = groups_for(ep_size)
    log = []

    class Overlapping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            log.append("work")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            log.append("work backward")
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
        overlapping = Overlapping.apply(x)
        (received,) = exchange.finish()
        (received * 2 + overlapping).sum().backward()
    finally:
        dist.all_to_all_single = original
    return log, x.grad.tolist()


def test_all_to_all_overlaps_with_work(ranks2):
    """Work between start and finish runs while rows, and in backward gradients, are in flight."""
    for log, grad in ranks2.run(_log_overlap, 2):
        assert log == ["start", "work", "wait", "start", "work backward", "wait"]
        assert grad == [[3.0] * 3] * 2


def _count_host_copies(ep_size):
    """Log tolist, item, ... of the second forward pass of a sharded layer with shared experts
    and zero-computation experts."""
    from helpers.moe_layers import make_input, make_layer

    layer = make_layer("moepp", groups_for(ep_size), shared=1, check_routing=False)
    x, _ = make_input(7)
    layer(x)
    waits = []
    originals = {}
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


def test_dispatch_copies_once_to_host(ranks2):
    """One copy holds the counts of 3 zero-computation experts and of the rows to and from 2
    ranks. The other one is for the CPU's loop over 2 experts."""
    for waits in ranks2.run(_count_host_copies, 2):
        # segment_sum reads a length, on the CPU only.
        assert [w for w in waits if w != ("__int__", 1)] == [
            ("tolist", 3 + 2 + 2),
            ("tolist", 2),
        ]
