"""Quantile balancing: the solution, its load, and its race against the sign rule."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.moe_layers import D, make_input, make_layer
from helpers.routings import step_totals
from helpers.spawn import groups_for
from megatron.moe.gate import create_gate
from megatron.moe.gate_update import GateUpdater
from megatron.moe.quantile_histogram import NUM_BINS
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups

E, K, T = 8, 2, 8192


def make_gate(rule="quantile", **options):
    options = {"topk": K, "score_function": "sigmoid", "loss_coeff": 0.0, **options}
    return create_gate(
        "topk", hidden_size=16, num_experts=E, init_std=0.3, bias_rule=rule, **options
    )


def scores_of(gate, x):
    logits = x.double() @ gate.router.weight.double().t()
    if gate.config.bias_on == "logit":
        return logits
    return logits.softmax(-1) if gate.config.score_function == "softmax" else logits.sigmoid()


def exact_solution(score_TE, bias_E, k):
    """The formula on all tokens, with sorted values instead of a histogram."""
    alpha_T = (score_TE + bias_E).sort(-1, descending=True).values[:, k]
    required_TE = alpha_T[:, None] - score_TE
    solved_E = torch.quantile(required_TE, k / score_TE.shape[1], dim=0)
    return solved_E - solved_E.mean()


def run_step(gate, *micro_batches):
    """Forward passes and the update of one optimizer step; return the loads."""
    routings = [gate(GateInput(x)) for x in micro_batches]
    load_E = torch.bincount(torch.cat([r.expert_A for r in routings]), minlength=E).float()
    step = step_totals(load_E, torch.tensor(float(sum(len(x) for x in micro_batches))))
    for name in routings[0].step_sums:
        step.step_sums[name] = sum(r.step_sums[name].double() for r in routings)
    gate.post_optimizer_step(step)
    return load_E


def variation(load_E):
    """Coefficient of variation of the loads."""
    return (load_E.std(correction=0) / load_E.mean()).item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 7},
        {"topk": 1},
        {"score_function": "softmax"},
        {"score_function": "softmax", "bias_on": "logit"},
    ],
)
def test_histogram_solution_is_exact(options):
    """Within 0.02 of the solution with sorted values, step after step, over micro-batches."""
    gate = make_gate(**options)
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        parts = [torch.randn(size, 16, generator=g) + 0.3 for size in (500, 100)]
        want = exact_solution(
            scores_of(gate, torch.cat(parts)), gate.expert_bias.double(), gate.config.topk
        )
        run_step(gate, *parts)
        torch.testing.assert_close(gate.expert_bias.double(), want, atol=0.02, rtol=0)
        assert gate.expert_bias.mean().item() == pytest.approx(0, abs=1e-6)
    assert gate.expert_bias.abs().max() > 0.01 and gate.expert_bias.dtype == torch.float32


def test_share_below_the_solution():
    """A share k / E of each expert's required biases lies below its new bias, up to a bin:
    on the same tokens that is the expert's load against the others as they were. (Many are
    equal to the old bias: those of tokens for which the expert came next.)"""
    gate = make_gate()
    x = torch.randn(T, 16, generator=torch.Generator().manual_seed(1)) + 0.3
    score_TE = scores_of(gate, x)
    alpha_T1 = score_TE.sort(-1, descending=True).values[:, K : K + 1]
    required_TE = alpha_T1 - score_TE
    run_step(gate, x)
    quantile_E = torch.quantile(required_TE, K / E, dim=0)
    solved_E = gate.expert_bias.double() + quantile_E.mean()
    # The range of the first step is [-1, 1].
    bin_width = 2 / NUM_BINS
    share_E = (required_TE < solved_E - bin_width).double().mean(0)
    assert (share_E <= K / E).all() and share_E.amax() > K / E - 0.01, share_E
    share_E = (required_TE < solved_E + bin_width).double().mean(0)
    assert (share_E >= K / E).all() and share_E.amin() < K / E + 0.01, share_E


def test_same_batch_converges_in_a_few_steps():
    """Solving for all experts at the same time needs some repetitions, not hundreds."""
    gate = make_gate()
    with torch.no_grad():
        gate.router.weight[0] += 0.5
    x = torch.randn(T, 16, generator=torch.Generator().manual_seed(1)) + 0.3
    history = [variation(run_step(gate, x)) for _ in range(12)]
    assert history[0] > 0.5 and history[-1] < 0.02, history


def race(rule):
    """Loads of 200 steps from a skewed start, at the same tokens for all rules, while the
    router drifts."""
    gate = make_gate(rule)
    g = torch.Generator().manual_seed(7)
    history = []
    with torch.no_grad():
        gate.router.weight[:2, 0] += 3.0
        for _ in range(200):
            x = torch.randn(T, 16, generator=g)
            x[:, 0] = 1.0  # what all tokens have in common
            history.append(variation(run_step(gate, x)))
            gate.router.weight += 0.01 * torch.randn(E, 16, generator=g)
    return history


def test_quantile_balances_better_than_sign():
    """The coefficient of variation of the load is at most 0.05 and below that of the sign rule
    (at its default speed) and of no rule: after 200 steps, and on average over them."""
    history = {rule: race(rule) for rule in ("none", "sign", "quantile")}
    last = {rule: sum(values[-20:]) / 20 for rule, values in history.items()}
    assert last["quantile"] <= 0.05 and last["quantile"] < last["sign"] < last["none"], last
    mean = {rule: sum(values) / 200 for rule, values in history.items()}
    assert mean["quantile"] <= 0.05 and mean["quantile"] < 0.2 * mean["sign"], mean


def test_k_equal_experts_changes_nothing():
    """All experts are chosen whatever the biases are: nothing is counted."""
    gate = make_gate(topk=E)
    x = torch.randn(9, 16)
    assert not gate(GateInput(x)).step_sums
    assert run_step(gate, x).tolist() == [9.0] * E
    assert not gate.expert_bias.any()


def test_evaluation_counts_nothing():
    gate = make_gate().eval()
    assert not gate(GateInput(torch.randn(9, 16))).step_sums


def test_step_without_tokens_changes_nothing():
    gate = make_gate()
    run_step(gate, torch.randn(64, 16))
    before = gate.expert_bias.clone()
    run_step(gate, torch.zeros(0, 16))
    assert torch.equal(gate.expert_bias, before) and before.any()


def test_unbounded_scores_are_reached():
    """Logits far outside the histogram: the biases move by 1 per step, then they balance."""
    gate = make_gate(bias_on="logit")
    with torch.no_grad():
        gate.router.weight.mul_(4)
        gate.router.weight[0, 0] += 8.0
    x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    history = [variation(run_step(gate, x)) for _ in range(25)]
    assert history[0] > 0.5 and history[-1] < 0.05, history


def _rank_step(ep_size, numbers):
    """The biases of a rank after a step with these micro-batches."""
    groups = groups_for(ep_size)
    layer = make_layer("deepseek_v3", groups, options={"bias_rule": "quantile"})
    layers = nn.ModuleList([layer])
    for number in numbers[groups.rank]:
        layer(make_input(40, seed=number)[0])
    GateUpdater(layers, groups).post_optimizer_step()
    return layer.gate.expert_bias


def test_ranks_solve_for_all_tokens(ranks2):
    """Two ranks with two micro-batches each have the biases of one rank with all tokens."""
    one, two = ranks2.run(_rank_step, 2, [[1, 2], [3, 4]])
    layer = make_layer("deepseek_v3", options={"bias_rule": "quantile"})
    x = torch.cat([make_input(40, seed=n)[0] for n in (1, 2, 3, 4)], 1)
    assert x.shape == (1, 160, D)
    layer(x)
    GateUpdater(nn.ModuleList([layer]), Groups()).post_optimizer_step()
    assert torch.equal(one, two) and one.any()
    assert torch.equal(one, layer.gate.expert_bias)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="--bias-rule is quantile with --n-group 2; quantile"):
        make_gate(n_group=2, topk_group=1)


def test_recompute_keeps_no_scores():
    """A recomputed layer counts once, and keeps the counts instead of the bin of each score."""
    num_experts = 64
    options = {"bias_rule": "quantile", "topk": K}
    layer = make_layer("topk", num_experts=num_experts, options=options)
    x, _ = make_input(4000)
    contexts = layer.recompute_contexts()
    out = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: contexts)
    counts = layer.step_sums["step/required_bias_counts"].clone()
    assert counts.sum() == 4000 * num_experts
    kept = 0
    for _, outputs in contexts[0].cache["decisions"]:
        tensors = [
            v for out in outputs for v in (out.values() if isinstance(out, dict) else [out])
        ]
        kept += sum(tensor.numel() for tensor in tensors)
    assert kept < 0.5 * 4000 * num_experts
    out.y.sum().backward()
    assert torch.equal(layer.step_sums["step/required_bias_counts"], counts)
