"""PEER: retrieval against brute force, the formula per token, query statistics, usage."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.experts.activations import activate
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.gate import create_gate, gate_class
from megatron.moe.gate_update import GateUpdater
from megatron.moe.gates.peer import retrieve, usage
from megatron.moe.metrics import MoEMetrics
from megatron.moe.peer.experts import PEERExperts
from megatron.moe.routing import GateInput, StepTotals
from megatron.parallel.groups import Groups

D = 6
NORMS = ["batch", "layer", "none"]


def make(num_experts=12, hidden_size=D, init_std=0.5, seed=0, **options):
    options = {"peer_num_heads": 2, "peer_topk": 3, "peer_query_size": 12, **options}
    return create_gate(
        "peer",
        hidden_size=hidden_size,
        num_experts=num_experts,
        init_std=init_std,
        seed=seed,
        **options,
    )


def tokens(number, seed=0, hidden_size=D):
    return torch.randn(number, hidden_size, generator=torch.Generator().manual_seed(seed))


def totals(gate, *batches):
    """Return the step totals that the layer passes after these micro-batches."""
    parts = [gate(GateInput(x)).metric_sums for x in batches]
    sums = {name: sum(part[name].double() for part in parts) for name in parts[0]}
    load = torch.zeros(gate.num_experts)
    return StepTotals(load, torch.tensor(float(sum(len(x) for x in batches))), sums, load[None])


def brute_force(scores, k):
    """Return every combination of one score per dimension."""
    every = [
        sum(combination) for combination in itertools.product(*(s.tolist() for s in scores))
    ]
    order = sorted(range(len(every)), key=lambda i: -every[i])[:k]
    return [every[i] for i in order], order


# Retrieval


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_retrieval_equals_brute_force(sizes, k, seed):
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, 1, size, generator=g, dtype=torch.float64) for size in sizes]
    value, index = retrieve(scores, k)
    assert value.shape == index.shape == (2, 1, min(k, math.prod(sizes)))
    for b in range(2):
        values, indices = brute_force([s[b, 0] for s in scores], k)
        assert index[b, 0].tolist() == indices
        assert value[b, 0].tolist() == pytest.approx(values, rel=1e-12)


def test_retrieval_keeps_k_per_dimension():
    """The best four are all in column 0: keeping ceil(sqrt(4)) rows would lose two of them."""
    rows, columns = (
        torch.tensor([4.0, 3.9, 3.8, 3.7, 0.0]),
        torch.tensor([5.0, 0.0, -1.0, -2.0, -3.0]),
    )
    best = [scores.topk(math.ceil(4**0.5)).indices.tolist() for scores in (rows, columns)]
    naive = {i * 5 + j for i in best[0] for j in best[1]}
    index = retrieve([rows, columns], 4)[1].tolist()
    assert index == brute_force([rows, columns], 4)[1] == [0, 5, 10, 15]
    assert not set(index) <= naive


@pytest.mark.parametrize("dims", [(3, 4), (5, 2, 3), (2, 3, 2, 2), (7,)])
def test_every_expert_can_be_retrieved(dims):
    """Keys and query projection are identities; one-hot vectors address expert (j_1,
    .., j_n).
    """
    part, experts = max(dims), math.prod(dims)
    gate = make(
        experts,
        hidden_size=part * len(dims),
        peer_product_key_dim=dims,
        peer_num_heads=1,
        peer_topk=1,
        peer_query_size=part * len(dims),
        peer_query_norm="none",
    )
    for linear in (gate.query, *gate.keys):
        torch.nn.init.eye_(linear.weight)
    places = list(itertools.product(*map(range, dims)))
    x = torch.stack([torch.cat([torch.eye(part)[j] for j in place]) for place in places])
    assert gate(GateInput(x)).expert_A.tolist() == list(range(experts))


@pytest.mark.parametrize(
    "experts, dims",
    [
        (1024**2, (1024, 1024)),
        (12, (3, 4)),
        (7, (1, 7)),
        (1, (1, 1)),
        (2, (1, 2)),
        (48, (6, 8)),
    ],
)
def test_default_key_sizes_are_square(experts, dims):
    assert gate_class("peer").Config().key_sizes(experts) == dims
    assert (
        gate_class("peer").Config(peer_product_key_dim=dims[::-1]).key_sizes(experts)
        == dims[::-1]
    )


# The gate


def reference(gate, x, p):
    """Return [{expert: weight} of each head] of each token, over all experts.

    Computed from the formula in fp64 scalars, with autograd to the tokens x and the
    parameters p.
    """
    c = gate.config
    dims = c.key_sizes(gate.num_experts)
    part = c.peer_query_size // len(dims)
    answer = []
    for row in x:
        query = p["query.weight"] @ row
        heads = []
        for h in range(c.peer_num_heads):
            q = query[h * c.peer_query_size : (h + 1) * c.peer_query_size]
            if c.peer_query_norm == "batch":
                mean, variance = gate.query_mean[h].double(), gate.query_variance[h].double()
                q = (q - mean) / variance.clamp_min(1e-5).sqrt()
            elif c.peer_query_norm == "layer":
                q = (q - q.mean()) / (((q - q.mean()) ** 2).mean() + 1e-5).sqrt()
            score = {}
            for e in range(gate.num_experts):
                rest, place = e, []
                for size in reversed(dims):
                    rest, j = divmod(rest, size)
                    place.insert(0, j)
                score[e] = sum(
                    p[f"keys.{i}.weight"][j] @ q[i * part : (i + 1) * part]
                    for i, j in enumerate(place)
                )
            best = sorted(score, key=lambda e: -score[e].item())
            chosen, others = best[: c.peer_topk], best[c.peer_topk :]
            clear = not others or score[chosen[-1]] - score[others[0]] > 1e-4
            raw = [
                torch.exp(score[e] - score[best[0]].detach())
                if c.score_function == "softmax"
                else 1 / (1 + torch.exp(-score[e]))
                for e in chosen
            ]
            total = sum(raw) if c.score_function == "softmax" else 1.0
            heads.append(({e: r / total for e, r in zip(chosen, raw)}, clear))
        answer.append(heads)
    return answer


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(4, 3), (2, 3, 2), (12,), (1, 12)]),
    st.integers(1, 14),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from(NORMS),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_gate_matches_formula(seed, dims, k, score, norm, heads, steps):
    """Experts, weights, and the gradients of x, the query projection and every table of
    keys.

    Catches keys that are read without gradient and never learn.
    """
    gate = make(
        seed=seed,
        peer_product_key_dim=dims,
        peer_topk=k,
        score_function=score,
        peer_query_norm=norm,
        peer_num_heads=heads,
    )
    for step in range(steps):
        gate.post_optimizer_step(totals(gate, tokens(5, seed + step) + 1))
    x = tokens(4, seed).requires_grad_()
    out = gate(GateInput(x))
    out.check(4, 12)
    k, params = min(k, 12), dict(gate.named_parameters())
    x64, *rest = (t.detach().double().requires_grad_() for t in (x, *params.values()))
    answer = reference(gate, x64, dict(zip(params, rest)))
    assert out.token_A.tolist() == [t for t in range(4) for _ in range(heads * k)]
    assert out.aux_loss == 0
    experts, weights = (
        out.expert_A.view(4, heads, k).tolist(),
        out.weight_A.view(4, heads, k).tolist(),
    )
    ours, theirs = 0.0, 0.0
    for t, per_head in enumerate(answer):
        for h, (expected, clear) in enumerate(per_head):
            if clear:  # fp32 rounding may exchange experts with nearly equal scores
                got = dict(zip(experts[t][h], weights[t][h]))
                assert got == pytest.approx(
                    {e: w.item() for e, w in expected.items()}, rel=1e-3
                )
                mix = {e: math.sin(1 + 3 * t + 5 * h + 7 * e) for e in expected}
                ours = ours + sum(
                    mix[e] * out.weight_A.view(4, heads, k)[t, h, i]
                    for i, e in enumerate(experts[t][h])
                )
                theirs = theirs + sum(mix[e] * w for e, w in expected.items())
    if any(clear for per_head in answer for _, clear in per_head):
        got, want = (
            torch.autograd.grad(ours, (x, *params.values())),
            torch.autograd.grad(theirs, (x64, *rest)),
        )
        for name, a, b in zip(("x", *params), got, want, strict=True):
            torch.testing.assert_close(
                a, b.float(), atol=1e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dims", [(4, 3), (2, 3, 2), (2, 2, 2, 2)])
def test_queries_and_keys_get_gradients(dims, score, norm):
    gate = make(
        math.prod(dims), peer_product_key_dim=dims, score_function=score, peer_query_norm=norm
    )
    out = gate(GateInput(tokens(20)))
    (
        out.weight_A
        * torch.randn(out.weight_A.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    for name, p in gate.named_parameters():
        assert p.grad is not None and (p.grad.abs().sum(-1) > 0).all(), (
            f"a row of {name} got no gradient"
        )


def test_initial_scales():
    """With queries of variance 1, each dimension's scores have variance 1."""
    gate = make(64**2, hidden_size=64, init_std=0.02, peer_query_size=128, peer_num_heads=4)
    assert gate.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for table in gate.keys:
        assert table.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert (torch.randn(500, 64) @ table.weight.t()).std().item() == pytest.approx(
            1, rel=0.1
        )


def test_heads_share_the_keys():
    gate = make(peer_num_heads=3, peer_query_norm="none")
    assert {n: tuple(p.shape) for n, p in gate.named_parameters()} == {
        "query.weight": (36, D),
        "keys.0.weight": (3, 6),
        "keys.1.weight": (4, 6),
    }
    with torch.no_grad():  # equal queries retrieve equal experts
        gate.query.weight.copy_(gate.query.weight[:12].repeat(3, 1))
    out = gate(GateInput(tokens(5)))
    experts = out.expert_A.view(5, 3, 3)
    assert (experts == experts[:, :1]).all()
    torch.testing.assert_close(
        out.weight_A.view(5, 3, 3), out.weight_A.view(5, 3, 3)[:, :1].expand(5, 3, 3)
    )


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_are_independent(norm):
    gate = make(peer_query_norm=norm)
    gate.post_optimizer_step(totals(gate, tokens(9, 1)))
    x = tokens(5)
    full, alone = gate(GateInput(x)), gate(GateInput(x[2:3]))
    assert full.expert_A.view(5, -1)[2].tolist() == alone.expert_A.tolist()
    torch.testing.assert_close(full.weight_A.view(5, -1)[2], alone.weight_A)


@pytest.mark.parametrize(
    "number, experts, options",
    [
        (1, 12, {}),
        (0, 12, {}),
        (5, 1, {}),
        (5, 7, {}),
        (5, 12, {"peer_topk": 100}),
        (0, 1, {"peer_topk": 100}),
        (5, 12, {"peer_query_norm": "layer"}),
        (0, 12, {"peer_query_norm": "layer"}),
        (0, 7, {"peer_query_norm": "none"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_few_experts_and_bf16(number, experts, options, dtype):
    gate = make(experts, **options)
    out = gate(GateInput(tokens(number).to(dtype)))
    out.check(number, experts)
    assert len(out.token_A) == number * 2 * min(gate.config.peer_topk, experts)
    assert torch.isfinite(out.weight_A).all() and (out.weight_A > 0).all()
    step = totals(gate, tokens(number).to(dtype))
    gate.post_optimizer_step(step)
    assert all(torch.isfinite(b).all() for b in gate.buffers())
    assert out.weight_A.sum().item() == pytest.approx(number * 2, rel=1e-5)


def test_bf16_is_scored_in_fp32():
    """Also under autocast."""
    gate, x = make(), tokens(9).bfloat16()
    exact = gate(GateInput(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(GateInput(x))
    assert torch.equal(out.expert_A, exact.expert_A) and torch.equal(
        out.weight_A, exact.weight_A
    )


def test_experts_per_token():
    cls = gate_class("peer")
    assert cls.experts_per_token(cls.Config(), 1024**2) == (16, 128)
    assert cls.experts_per_token(cls.Config(), 20) == (16, 20)
    assert cls.experts_per_token(cls.Config(), 3) == (3, 3)


@pytest.mark.parametrize("score, width", [("softmax", 1), ("sigmoid", 3)])
def test_initial_variance_matches_dense_layer(score, width):
    hidden, std = 64, 0.02
    gate = make(
        32**2,
        hidden_size=hidden,
        init_std=std,
        score_function=score,
        peer_expert_hidden_size=width,
        peer_num_heads=4,
        peer_topk=8,
        peer_query_size=32,
    )
    neurons = PEERExperts(
        32**2,
        32**2,
        hidden,
        width,
        "gelu",
        init=ExpertInit(init_std=std, output_std=std * gate.output_gain(width)),
    )
    x = tokens(200, hidden_size=hidden)
    out = gate(GateInput(x))
    ours = neurons(x, out.token_A, out.expert_A, out.weight_A).std()
    g = torch.Generator().manual_seed(1)
    up, down = (torch.randn(4 * hidden, hidden, generator=g) * std for _ in range(2))
    assert 0.7 < ours / (activate("gelu", x @ up.t()) @ down).std() < 1.4


# Statistics of the queries


def test_statistics_pool_all_tokens():
    """After the first step bias correction gives the pooled mean and variance for any decay."""
    gate = make()
    batches = tokens(7, 1) + 2, tokens(3, 2) * 3, tokens(0)
    gate.post_optimizer_step(totals(gate, *batches))
    raw = (torch.cat(batches) @ gate.query.weight.detach().t()).view(10, 2, 12)
    torch.testing.assert_close(gate.query_mean, raw.mean(0))
    torch.testing.assert_close(gate.query_variance, raw.var(0, unbiased=False))
    normal = gate.normalise(raw)
    torch.testing.assert_close(normal.mean(0), torch.zeros(2, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normal.var(0, unbiased=False), torch.ones(2, 12), atol=1e-4, rtol=0
    )


def test_steps_are_weighted_by_age():
    gate, means, squares = make(), [], []
    for step in range(4):
        x = tokens(5 + step, step) + step
        raw = (x @ gate.query.weight.detach().t()).view(-1, 2, 12)
        means.append(raw.mean(0))
        squares.append(raw.square().mean(0))
        gate.post_optimizer_step(totals(gate, x))
        ages = [0.9**age for age in range(step, -1, -1)]
        mean, square = (
            sum(a * v for a, v in zip(ages, values)) / sum(ages) for values in (means, squares)
        )
        torch.testing.assert_close(gate.query_mean, mean)
        torch.testing.assert_close(
            gate.query_variance, square - mean**2
        )  # within steps and between them
    assert gate.stat_weight.item() == pytest.approx(1 - 0.9**4, rel=1e-5)


def test_first_step_does_not_normalise():
    raw = torch.randn(3, 2, 12)
    assert torch.equal(make().normalise(raw), raw)
    assert torch.equal(make(peer_query_norm="none").normalise(raw), raw)


def test_only_optimizer_steps_change_statistics():
    """Not forward passes, nor steps without tokens or with an overflow."""
    gate = make()
    gate.post_optimizer_step(totals(gate, tokens(9)))
    before = {name: b.clone() for name, b in gate.named_buffers()}
    gate(GateInput(tokens(5, 1)))
    empty, broken = totals(gate, tokens(0)), totals(gate, tokens(5) * math.inf)
    gate.post_optimizer_step(empty)
    gate.post_optimizer_step(broken)
    gate.eval()
    assert set(gate(GateInput(tokens(5, 1))).metric_sums) == {"expert_weight"}
    assert sorted(before) == ["query_mean", "query_variance", "stat_weight"]
    for name, buffer in gate.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.dtype == torch.float32
    gate.train()
    gate.post_optimizer_step(totals(gate, tokens(5, 1)))
    assert not torch.equal(gate.query_mean, before["query_mean"])


def test_layer_pools_micro_batches():
    """One update per optimizer step through the layer's counters; metrics by layer."""
    gate = make()
    model = ModelConfig(num_layers=1, hidden_size=D, num_attention_heads=1)
    layer = make_moe_layer(
        gate,
        model,
        MoEConfig(num_experts=12, gate="peer", moe_ffn_hidden_size=1),
        layer=0,
        seed=0,
        groups=Groups(),
    )
    metrics = MoEMetrics(layer, Groups())
    gate_updater = GateUpdater(layer, Groups())
    x, y = tokens(4, 1)[None], tokens(6, 2)[None]
    expected = make()
    expected.post_optimizer_step(totals(expected, x[0], y[0]))
    layer(x)
    layer(y)
    assert gate.stat_weight == 0
    gate_updater.post_optimizer_step()
    for (name, ours), buffer in zip(gate.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, msg=lambda m, name=name: f"{name}: {m}")
    record = metrics.read()
    assert 0 < record["expert_usage"] <= 1 and record["expert_unevenness_nats_by_layer"][0] > 0
    layer.eval()
    layer(x)
    assert set(metrics.read(training=False)) >= {"expert_usage", "expert_unevenness_nats"}
    gate_updater.post_optimizer_step()
    assert torch.equal(gate.stat_weight, expected.stat_weight)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_other_norms_keep_no_statistics(norm):
    gate = make(peer_query_norm=norm)
    step = totals(gate, tokens(5))
    assert set(step.metric_sums) == {"expert_weight"}
    gate.post_optimizer_step(step)
    assert not list(gate.buffers())


# Usage


def test_usage_matches_manual_results():
    share, unevenness = usage(torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert share == 0.75
    assert unevenness == pytest.approx(math.log(4) - 0.5 * math.log(4) - 0.5 * math.log(2))
    assert usage(torch.full((10,), 0.3)) == (1.0, pytest.approx(0, abs=1e-12))
    assert usage(torch.eye(8)[3]) == (1 / 8, pytest.approx(math.log(8)))
    assert usage(torch.tensor([5.0])) == (1.0, 0.0)
    assert usage(torch.zeros(4)) == (0.0, pytest.approx(math.log(4)))


@pytest.mark.parametrize("training", [True, False])
def test_expert_weights_are_summed_for_usage(training):
    gate = make().train(training)
    out = gate(GateInput(tokens(5)))
    by_hand = [0.0] * 12
    for e, w in zip(out.expert_A.tolist(), out.weight_A.tolist()):
        by_hand[e] += abs(w)
    assert out.metric_sums["expert_weight"].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert (
        not any(t.requires_grad for t in out.metric_sums.values())
        and out.metric_sums["expert_weight"].dtype == torch.float32
    )
    share, unevenness = usage(torch.tensor(by_hand))
    assert gate.summarise({name: t.double() for name, t in out.metric_sums.items()}) == {
        "expert_usage": share,
        "expert_unevenness_nats": pytest.approx(unevenness, abs=1e-6),
    }
