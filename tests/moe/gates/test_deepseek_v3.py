"""DeepSeek-V3 gate: biased selection, unbiased weights, and updates of the bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from helpers.routings import step_totals
from helpers.spawn import groups_for
from megatron.moe.experts.expert_type import ExpertContext, create_experts
from megatron.moe.gate import create_gate
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer import MoELayer
from megatron.moe.routing import SCOPES, GateInput
from megatron.parallel.groups import Groups

D = 5
SIZES = [(4, 1, 1), (6, 2, 1), (6, 3, 2), (8, 4, 2), (8, 2, 2), (3, 3, 2), (7, 1, 1)]


def choose(c, biased, E):
    """Return a token's experts by falling biased score, and the margin of the closest
    decision.
    """
    size = E // c.n_group
    best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
    groups = sorted(range(c.n_group), key=lambda g: -best[g])
    margin = 1.0
    if c.topk_group < c.n_group:
        margin = best[groups[c.topk_group - 1]] - best[groups[c.topk_group]]
    left = sorted(
        (e for e in range(E) if e // size in groups[: c.topk_group]), key=lambda e: -biased[e]
    )
    if c.topk < len(left):
        margin = min(margin, biased[left[c.topk - 1]] - biased[left[c.topk]])
    return left[: c.topk], margin


def reference(gate, x, sequence):
    """Return weights {(token, expert): weight}, the loss, and the closest decision's
    margin.

    Computed in fp64, one token at a time, as in the paper: eq. 13-16 with the node
    limit, loss eq. 17-20.
    """
    c, W, b = (
        gate.config,
        gate.router.weight.detach().double().requires_grad_(),
        gate.expert_bias.tolist(),
    )
    x = x.detach().double().requires_grad_()
    E, weights, highest, shares, margin, lse = len(W), {}, [], [], 1.0, 0.0
    for t in range(len(x)):
        z = [sum(W[e, d] * x[t, d] for d in range(D)) for e in range(E)]
        lse = lse + torch.log(sum(torch.exp(v) for v in z)) ** 2 / len(x)
        s = [1 / (1 + torch.exp(-v)) for v in z]
        mine, gap = choose(c, [s[e].item() + b[e] for e in range(E)], E)
        norm = sum(s[e] for e in mine) if c.norm_topk_prob else 1.0
        weights.update({(t, e): c.routed_scaling_factor * s[e] / norm for e in mine})
        order = sorted(range(E), key=lambda e: -s[e].item())
        if c.topk < E:
            gap = min(gap, (s[order[c.topk - 1]] - s[order[c.topk]]).item())
        highest.append(order[: c.topk])
        shares.append([v / sum(s) for v in s])
        margin = min(margin, gap)
    parts = [[t for t in range(len(x)) if sequence[t] == n] for n in sorted(set(sequence))]
    if c.balance_scope != "sequence":
        parts = [list(range(len(x)))]
    loss = c.z_loss_coeff * lse
    for part in parts:
        for e in range(E):
            f = E / (c.topk * len(part)) * sum(e in highest[t] for t in part)
            loss = loss + c.loss_coeff * f * sum(shares[t][e] for t in part) / len(part) / len(
                parts
            )
    return weights, loss, margin, x, W


def make(E=8, std=0.8, seed=0, bias=None, **options):
    gate = create_gate(
        "deepseek_v3", hidden_size=D, num_experts=E, seed=seed, init_std=std, **options
    )
    if bias is not None:
        gate.expert_bias.copy_(torch.as_tensor(bias))
    return gate


@settings(max_examples=250, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(SIZES),
    st.integers(1, 8),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(SCOPES),
    st.sampled_from([0.0, 0.05, 0.5, 2.0]),
    st.sampled_from([-2.0, 0.0]),
    st.sampled_from([3, 7, 8]),
)
def test_gate_matches_formulas(seed, sizes, k, norm, sequences, scope, spread, shift, tokens):
    """Experts, weights, loss and gradients of x and router, for biases of both signs.

    Catches scores gathered along the wrong axis (as many tokens as experts, more,
    fewer), an unused bias, weights from biased scores, closed groups at 0 instead of
    -inf (all biased scores negative), a loss whose scores are not divided by their sum
    or whose loads are the biased assignments.
    """
    E, n_group, topk_group = sizes
    k = min(k, topk_group * E // n_group)
    g = torch.Generator().manual_seed(seed)
    gate = make(
        E,
        0.8,
        seed,
        torch.randn(E, generator=g) * spread + shift,
        topk=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm and k > 1,
        balance_scope=scope,
        loss_coeff=0.3,
        z_loss_coeff=0.1,
    )
    x = torch.randn(tokens, D, generator=g).requires_grad_()
    sequence = sorted(
        [
            *range(sequences),
            *torch.randint(0, sequences, (tokens - sequences,), generator=g).tolist(),
        ]
    )
    weights, loss, margin, x64, W64 = reference(gate, x, sequence)
    if margin < 1e-5:
        return
    out = gate(GateInput(x, None, torch.tensor(sequence), num_sequences=sequences))
    out.check(tokens, E)
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(weights)
    torch.testing.assert_close(
        out.weight_A.double(), torch.stack([weights[p] for p in pairs]), rtol=1e-4, atol=1e-7
    )
    ours = out.aux_loss + sum(term.loss() for term in out.balance)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    mix = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad((out.weight_A * mix).sum() + ours, (x, gate.router.weight))
    expected = torch.autograd.grad(
        sum(weights[p] * m for p, m in zip(pairs, mix.tolist())) + loss, (x64, W64)
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


# Selection


def given_scores(gate, scores):
    """Return the routing of one token with given sigmoids: the router is the identity."""
    gate.router.weight = nn.Parameter(torch.eye(len(scores)))
    return gate(GateInput(torch.tensor([scores]).logit()))


def four(topk, bias=(0.0, 0.0, 0.0, 0.0), **options):
    gate = create_gate(
        "deepseek_v3",
        hidden_size=4,
        num_experts=4,
        topk=topk,
        n_group=2,
        topk_group=1,
        **options,
    )
    gate.expert_bias.copy_(torch.tensor(bias))
    return gate


def test_groups_are_scored_by_two_best():
    """Group 1 has the larger maximum, group 0 the larger sum. V2's rule selects the
    other one.
    """
    out = given_scores(four(1, norm_topk_prob=False), [0.6, 0.6, 0.7, 0.1])
    assert out.expert_A.tolist() in ([0], [1])


def test_closed_groups_are_never_chosen():
    """Catches masking with 0: all biased scores are negative, so 0 would win."""
    out = given_scores(four(2, bias=(-1.5, -1.5, -1.2, -1.2)), [0.5, 0.4, 0.6, 0.3])
    assert sorted(out.expert_A.tolist()) == [2, 3]


def test_bias_selects_but_does_not_weigh():
    """Catches an unused bias, and weights from biased scores."""
    gate = create_gate("deepseek_v3", hidden_size=4, num_experts=4, topk=2)
    gate.expert_bias.copy_(torch.tensor([5.0, 0.0, 0.0, 4.0]))
    out = given_scores(gate, [0.1, 0.8, 0.7, 0.3])
    assert out.expert_A.tolist() == [0, 3]
    assert out.weight_A.tolist() == pytest.approx([2.5 * 0.1 / 0.4, 2.5 * 0.3 / 0.4], rel=1e-5)
    assert out.metric_means["bias_changed_fraction"].item() == 1.0
    assert out.metric_means["expert_bias_max_minus_min"].item() == 5.0


@pytest.mark.parametrize("n_group, topk_group, k", [(1, 1, 3), (4, 2, 3), (2, 1, 4), (4, 3, 6)])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_routing_matches_transformers(n_group, topk_group, k, shift):
    """An independent router with the same weights and bias gives the same experts and
    weights.
    """
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    bias = torch.randn(8) * 0.3 + shift
    gate = make(topk=k, n_group=n_group, topk_group=topk_group, bias=bias)
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D,
            num_attention_heads=1,
            n_routed_experts=8,
            num_experts_per_tok=k,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    router.weight.data, router.e_score_correction_bias.data = (
        gate.router.weight.data,
        gate.expert_bias.data,
    )
    x = torch.randn(64, D)
    out = gate(GateInput(x))
    _, weight_Tk, expert_Tk = router(x)
    theirs = torch.zeros(64, 8).scatter(1, expert_Tk, weight_Tk)
    torch.testing.assert_close(
        torch.zeros(64, 8).index_put((out.token_A, out.expert_A), out.weight_A), theirs
    )


def test_published_size():
    """DeepSeek-V3: 8 of 256 experts in at most 4 of 8 groups."""
    gate = make(E=256, topk=8, n_group=8, topk_group=4, bias=torch.randn(256) * 0.1)
    out = gate(GateInput(torch.randn(50, D)))
    assert max(len({int(e) // 32 for e in row}) for row in out.expert_A.view(50, 8)) <= 4
    torch.testing.assert_close(out.weight_A.view(50, 8).sum(1), torch.full((50,), 2.5))
    c = gate.config
    assert (c.loss_coeff, c.bias_update_speed, c.balance_scope) == (1e-4, 1e-3, "sequence")


# Loss


def test_loss_is_per_sequence_without_bias():
    gate = create_gate(
        "deepseek_v3", hidden_size=4, num_experts=4, topk=1, norm_topk_prob=False
    )
    gate.router.weight = nn.Parameter(torch.eye(4))
    x = torch.tensor([[9.0, -9, -9, -9], [9, -9, -9, -9], [-9, -9, 9, -9], [-9, -9, 9, -9]])
    apart = gate(GateInput(x, None, torch.tensor([0, 0, 1, 1]), num_sequences=2)).aux_loss
    assert apart.item() == pytest.approx(1e-4 * 4, rel=1e-2)
    assert gate(GateInput(x)).aux_loss.item() == pytest.approx(1e-4 * 2, rel=1e-2)
    gate.expert_bias.copy_(torch.tensor([-9.0, 0, 9, 9]))
    assert torch.equal(
        gate(GateInput(x, None, torch.tensor([0, 0, 1, 1]), num_sequences=2)).aux_loss, apart
    )


def test_global_batch_losses_add_up():
    """Two halves that know each other's counts have, on average, the loss of the full batch."""
    gate, x = make(topk=3, balance_scope="global-batch"), torch.randn(12, D)
    (full,), (a,), (b,) = (gate(GateInput(rows)).balance for rows in (x, x[:6], x[6:]))
    count, total = a.count_NG + b.count_NG, a.total_N + b.total_N
    assert torch.equal(count, full.count_NG) and gate(GateInput(x)).aux_loss.item() == 0
    torch.testing.assert_close((a.loss(count, total) + b.loss(count, total)) / 2, full.loss())


# Bias


def test_one_update_matches_manual_result():
    gate = make(E=4, bias=[0.5, 0.0, 0.0, -0.5], bias_update_speed=0.25)
    gate.post_optimizer_step(
        step_totals(torch.tensor([10.0, 5.0, 1.0, 4.0]), torch.tensor(10.0))
    )  # mean 5
    assert gate.expert_bias.tolist() == [0.25, 0.0, 0.25, -0.25]
    gate.post_optimizer_step(step_totals(torch.zeros(4), torch.tensor(0.0)))
    assert gate.expert_bias.tolist() == [0.25, 0.0, 0.25, -0.25], "a step without tokens"


def test_equal_loads_change_no_bias():
    """The mean of large fp32 counts is rounded; the sign of the rounding is not an
    imbalance.
    """
    gate = make(E=7)
    gate.post_optimizer_step(step_totals(torch.full((7,), 16777213.0), torch.tensor(1e8)))
    assert not gate.expert_bias.any()


def test_bias_is_a_saved_fp32_buffer():
    gate = make(bias=torch.linspace(-1, 1, 8))
    assert gate.expert_bias.dtype == torch.float32 and not gate.expert_bias.requires_grad
    assert [n for n, _ in gate.named_parameters()] == ["router.weight"]
    other = make(seed=1)
    other.load_state_dict(gate.state_dict())
    x = torch.randn(20, D)
    assert torch.equal(other.expert_bias, gate.expert_bias)
    assert torch.equal(other(GateInput(x)).expert_A, gate(GateInput(x)).expert_A)


def make_layer(seed=0, groups=None, **options):
    options = {"bias_update_speed": 0.02, "topk": 2, **options}
    return MoELayer(
        make(seed=seed, **options),
        create_experts("mlp", ExpertContext(8, D, 4)),
        8,
        groups=groups or Groups(),
    )


def skewed(rows=40, seed=0, shift=1.0):
    """Return hidden states that share a direction, so that a few experts are preferred
    by all.
    """
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(1, rows, D, generator=g) * 0.5 + shift).requires_grad_()


def test_load_spread_falls_from_skewed_start():
    """Maximum over mean load falls, and then stays within the effect of one bias step."""
    gate, x, spreads = make(bias_update_speed=0.01, topk=2), skewed(200)[0], []
    for _ in range(120):
        load = torch.bincount(gate(GateInput(x)).expert_A, minlength=8).float()
        gate.post_optimizer_step(step_totals(load, torch.tensor(200.0)))
        spreads.append((load.max() / load.mean()).item())
    assert spreads[0] > 2 and spreads[0] > spreads[10] > spreads[20] > spreads[40]
    assert max(spreads[60:]) < 1.25


def test_speed_zero_equals_no_bias():
    """For any loads, experts, weights and loss stay those of a gate without updates."""
    layer, fresh, x = make_layer(bias_update_speed=0.0), make_layer(), skewed()
    gate_updater = GateUpdater(nn.ModuleList([layer]), Groups())
    for _ in range(3):
        layer(x)
        gate_updater.post_optimizer_step()
    assert not layer.gate.expert_bias.any()
    assert torch.equal(layer(x).y, fresh(x).y)


def train(recompute=False, evaluate=False, steps=3, micro_batches=2):
    """Train a layer; return the bias after each step, and the loads passed to the steps."""
    layer, biases, loads = make_layer(), [], []
    gate_updater = GateUpdater(nn.ModuleList([layer]), Groups())
    update = layer.gate.post_optimizer_step
    layer.gate.post_optimizer_step = lambda step: (
        loads.append((step.load_E.tolist(), step.num_tokens.item())),
        update(step),
    )
    for step in range(steps):
        for i in range(micro_batches):
            x = skewed(seed=10 * step + i)
            if evaluate:
                before = layer.gate.expert_bias.clone()
                layer.eval()(skewed(seed=99))
                layer.train()
                assert torch.equal(layer.gate.expert_bias, before), (
                    "an evaluation moved the bias"
                )
            if recompute:
                with set_checkpoint_early_stop(
                    False
                ):  # the recomputation includes the layer's counting
                    out = checkpoint(
                        layer, x, use_reentrant=False, context_fn=layer.recompute_contexts
                    )
            else:
                out = layer(x)
            (out.y.square().sum() + out.aux_loss).backward()
            assert torch.equal(
                layer.gate.expert_bias, biases[-1] if biases else torch.zeros(8)
            ), "a forward moved it"
        gate_updater.post_optimizer_step()
        biases.append(layer.gate.expert_bias.clone())
    return biases, loads


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("evaluate", [False, True])
def test_recompute_and_evaluation_keep_bias(recompute, evaluate):
    plain, expected = train(), train(recompute, evaluate)
    assert plain[1] == expected[1] and all(
        torch.equal(a, b) for a, b in zip(plain[0], expected[0], strict=True)
    )
    assert len(plain[1]) == 3 and all(
        tokens == 80 and sum(load) == 160 for load, tokens in plain[1]
    )
    b = torch.zeros(8)
    for bias, (load, _) in zip(*plain, strict=True):
        b = b + 0.02 * torch.sign(sum(load) / 8 - torch.tensor(load))
        assert torch.equal(b, bias), "one update per step, from the sum over micro-batches"


def _steps(seeds):
    """Run one optimizer step of two micro-batches on a rank; return loads and bias."""
    groups = groups_for(1)
    layer = make_layer(groups=groups)
    gate_updater = GateUpdater(nn.ModuleList([layer]), groups)
    loads = []
    for seed in seeds[groups.rank]:
        x = skewed(7, seed, shift=0.0)
        loads.append(torch.bincount(layer.gate(GateInput(x[0].detach())).expert_A, minlength=8))
        layer(x)
    gate_updater.post_optimizer_step()
    return loads, layer.gate.expert_bias.clone()


def test_update_uses_global_loads(ranks2):
    """Catches an update per rank or per micro-batch: both would give another bias here."""

    def update(loads):
        return 0.02 * torch.sign(loads.double().mean() - loads).float()

    answers = ranks2.run(_steps, [[1, 2], [3, 4]])
    loads = [load for mine, _ in answers for load in mine]
    expected = update(sum(loads))
    assert all(torch.equal(bias, expected) for _, bias in answers)
    for mine, _ in answers:
        assert not torch.equal(update(sum(mine)), expected), (
            "the ranks' own loads say something else"
        )
    assert not torch.equal(sum(update(load) for load in loads), expected)


# Edge cases


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("norm", [False, True])
def test_outputs_and_gradients_are_finite(tokens, scale, norm):
    gate = make(topk=4, n_group=4, topk_group=2, norm_topk_prob=norm, z_loss_coeff=0.1)
    x = (torch.randn(tokens, D) * scale).requires_grad_()
    out = gate(GateInput(x, None, torch.zeros(tokens, dtype=torch.int64), num_sequences=1))
    out.check(tokens, 8)
    grads = torch.autograd.grad(out.weight_A.sum() + out.aux_loss, (x, gate.router.weight))
    assert all(
        torch.isfinite(t).all()
        for t in (out.weight_A, out.aux_loss, *out.metric_means.values(), *grads)
    )


def test_single_expert_needs_no_options():
    """Nothing is selected or learned with a single expert: top-1 is then allowed."""
    gate = create_gate("deepseek_v3", hidden_size=D, num_experts=1, topk=1)
    assert gate(GateInput(torch.randn(3, D))).weight_A.tolist() == pytest.approx([2.5] * 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        (
            {"topk": 9},
            "--topk is 9; allowed: 1 to the number of experts, which is 8",
        ),
        (
            {"topk": 5, "n_group": 4, "topk_group": 2},
            "--topk is 5; allowed: 1 to .* --topk-group groups, which is 4",
        ),
        ({"n_group": 0}, "--n-group is 0; allowed: a positive divisor"),
        (
            {"n_group": 3},
            "--n-group is 3; allowed: a divisor of the number of experts, which is 8",
        ),
        ({"topk_group": 0}, "--topk-group is 0; allowed: 1 to --n-group, which is 1"),
        (
            {"n_group": 4, "topk_group": 5},
            "--topk-group is 5; allowed: 1 to --n-group, which is 4",
        ),
        ({"topk": 1}, "--norm-topk-prob is on with --topk 1.*--no-norm-topk-prob"),
        ({"bias_update_speed": -0.1}, "--bias-update-speed is -0.1; allowed: 0 or more"),
        ({"loss_coeff": -1.0}, "--moe-loss-coeff is -1.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
