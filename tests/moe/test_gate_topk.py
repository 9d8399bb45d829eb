"""Options of top-k gates, against the formulas in plain Python, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import make_input, make_layer, reference_layer
from megatron.config import cli
from megatron.moe.gate import available_gates, create_gate, gate_config_class
from megatron.moe.gate_functional import expert_scores, normalized_scores
from megatron.moe.routing import GateInput

D, E = 5, 6
GATES = ["topk", "deepseek_v2", "deepseek_v3"]


def reference_logits(gate, x):
    """The logits of one token in fp64 scalars with gradients."""
    c = gate.config
    weight = gate.router.weight.double()
    if c.router_norm:
        rms = torch.sqrt(sum(v * v for v in x) / D + 1e-6)
        scale = gate.router_norm.weight.double()
        x = [x[d] / rms * scale[d] / math.sqrt(D) for d in range(D)]
    z = [sum(weight[e, d] * x[d] for d in range(D)) for e in range(E)]
    if c.router_bias:
        z = [z[e] + gate.router.bias[e].double() for e in range(E)]
    z = [c.logit_scale * v for v in z]
    if c.logit_softcap:
        z = [c.logit_softcap * torch.tanh(v / c.logit_softcap) for v in z]
    return z


def reference_scores(function, z):
    if function == "softmax":
        total = sum(torch.exp(v) for v in z)
        return [torch.exp(v) / total for v in z]
    if function == "sigmoid":
        return [1 / (1 + torch.exp(-v)) for v in z]
    return [torch.sqrt(torch.log(1 + torch.exp(v))) for v in z]


def reference_choice(c, ranked):
    """The k best experts in the best groups, and the margin of the closest decision."""
    size = E // c.n_group
    groups = [ranked[g * size : (g + 1) * size] for g in range(c.n_group)]
    value = [sum(sorted(group)[-c.group_score_best :]) for group in groups]
    order = sorted(range(c.n_group), key=lambda g: -value[g])
    margin = 1.0
    if c.topk_group < c.n_group:
        margin = value[order[c.topk_group - 1]] - value[order[c.topk_group]]
    left = [e for e in range(E) if e // size in order[: c.topk_group]]
    left.sort(key=lambda e: -ranked[e])
    if c.topk < len(left):
        margin = min(margin, ranked[left[c.topk - 1]] - ranked[left[c.topk]])
    return left[: c.topk], margin


def randomize(gate, generator):
    """Give all parameters and the bias random values."""
    for name, tensor in gate.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name == "router.weight":
            tensor.copy_(0.8 * noise)
        else:
            tensor.copy_(0.4 * noise + (1.0 if "norm" in name or "scale" in name else 0.0))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(GATES),
    st.fixed_dictionaries(
        {
            "score_function": st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
            "bias_rule": st.sampled_from(["none", "sign"]),
            "bias_on": st.sampled_from(["score", "logit"]),
            "group_score_best": st.sampled_from([1, 2]),
            "router_bias": st.booleans(),
            "router_norm": st.booleans(),
            "expert_scale": st.booleans(),
            "logit_scale": st.sampled_from([1.0, 0.6]),
            "logit_softcap": st.sampled_from([0.0, 1.5]),
            "norm_floor": st.sampled_from([0.0, 0.7]),
            "norm_topk_prob": st.booleans(),
        }
    ),
    st.sampled_from([(1, 1), (2, 1), (3, 2)]),
    st.integers(1, 3),
)
def test_options_match_formulas(seed, name, options, sizes, k):
    """Choices, weights, and gradients of x and every parameter, for all options together."""
    n_group, topk_group = sizes
    options = {**options, "n_group": n_group, "topk_group": topk_group, "topk": k}
    options["norm_topk_prob"] &= k > 1
    gate = create_gate(
        name, hidden_size=D, num_experts=E, routed_scaling_factor=1.5, loss_coeff=0.0, **options
    )
    c = gate.config
    generator = torch.Generator().manual_seed(seed)
    randomize(gate, generator)
    bias = [0.0] * E
    if gate.expert_bias is not None:
        bias = gate.expert_bias.tolist()
    x = torch.randn(3, D, generator=generator).requires_grad_()
    rows = []
    for t in range(len(x)):
        z = reference_logits(gate, [x[t, d].double() for d in range(D)])
        s = reference_scores(c.score_function, z)
        base = z if c.bias_rule == "sign" and c.bias_on == "logit" else s
        ranked = [float(base[e].detach()) + bias[e] for e in range(E)]
        chosen, margin = reference_choice(c, ranked)
        if margin < 1e-5:
            return  # a tie in fp32
        divisor = 1.0
        if c.norm_topk_prob:
            divisor = sum(s[e] for e in chosen).clamp_min(c.norm_floor)
        for e in chosen:
            scale = gate.expert_scale_E[e].double() if c.expert_scale else 1.0
            rows.append((t, e, 1.5 * scale * s[e] / divisor))
    out = gate(GateInput(x))
    out.check(len(x), E)
    assert list(zip(out.token_A.tolist(), out.expert_A.tolist())) == [r[:2] for r in rows]
    expected_A = torch.stack([row[2] for row in rows])
    torch.testing.assert_close(out.weight_A.double(), expected_A, rtol=2e-5, atol=1e-6)
    mix_A = torch.randn(len(rows), generator=generator)
    inputs = [x, *gate.parameters()]
    ours = torch.autograd.grad((out.weight_A * mix_A).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((expected_A * mix_A).sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, -60.0, -104.0, -1e4, 60.0, 1e4])
def test_sqrtsoftplus_is_exact_for_extreme_logits(offset):
    """Scores, normalised scores and gradients are finite where softplus underflows or is z."""
    z = (torch.tensor([[0.3, -1.2, 2.0]]) + offset).requires_grad_()
    score_TE = expert_scores(z, "sqrtsoftplus")
    share_TE = normalized_scores(z, "sqrtsoftplus")
    z64 = z.detach().double()
    log_score = 0.5 * torch.where(z64 < -500, z64, torch.log(torch.log1p(z64.exp())))
    log_score = torch.where(z64 > 500, 0.5 * z64.log(), log_score)
    torch.testing.assert_close(score_TE.double(), log_score.exp(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(share_TE.double(), log_score.softmax(-1), rtol=1e-3, atol=1e-6)
    (gradient,) = torch.autograd.grad(share_TE[0, 0] + score_TE.sum(), z)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", GATES)
def test_layer_with_all_options_equals_reference(name):
    """The layer trains all new parameters, and its output is that of the assignments."""
    options = {"router_bias": True, "router_norm": True, "expert_scale": True}
    options |= {"logit_softcap": 2.0, "bias_rule": "sign", "score_function": "sqrtsoftplus"}
    layer = make_layer(name, options=options)
    x, _ = make_input(9)
    out = layer(x)
    routing = layer.gate(GateInput(x[0]))
    torch.testing.assert_close(
        out.y[0], reference_layer(layer, x[0], routing), rtol=1e-4, atol=1e-5
    )
    (out.y.square().sum() + out.aux_loss).backward()
    names = {n for n, _ in layer.gate.named_parameters()}
    assert names == {"router.weight", "router.bias", "router_norm.weight", "expert_scale_E"}
    assert all(p.grad.abs().sum() > 0 for p in layer.gate.parameters())


@pytest.mark.parametrize("name", GATES)
def test_options_change_nothing_by_default(name):
    """Gates without them have the tensors that they had, and new parameters start neutral."""
    plain = create_gate(name, hidden_size=D, num_experts=E, topk=2)
    expected = ["expert_bias", "router.weight"] if name == "deepseek_v3" else ["router.weight"]
    assert sorted(plain.state_dict()) == expected
    neutral = create_gate(
        name, hidden_size=D, num_experts=E, topk=2, router_bias=True, expert_scale=True
    )
    x = torch.randn(7, D)
    a = plain(GateInput(x))
    b = neutral(GateInput(x))
    assert torch.equal(a.expert_A, b.expert_A) and torch.equal(a.weight_A, b.weight_A)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--score-function tanh", "--score-function is 'tanh'; allowed: softmax sigmoid sqrts"),
        ("--logit-scale 0", "--logit-scale is 0.0; allowed: a positive number"),
        ("--logit-softcap -1", "--logit-softcap is -1.0; allowed: 0 (no limit) or more"),
        ("--norm-topk-prob --norm-floor -1", "--norm-floor is -1.0; allowed: 0 (no bound) or"),
        ("--n-group 2 --group-score-best 3", "--group-score-best is '3'; allowed: 1 2"),
        (
            "--group-score-best 2",
            "--group-score-best is 2; it has an effect only with --n-group",
        ),
        (
            "--norm-floor 0.5",
            "--norm-floor is 0.5; it has an effect only with --norm-topk-prob",
        ),
    ],
)
def test_invalid_options_are_refused(flags, message):
    words = ["--num-experts", "4", "--gate", "topk", *flags.split()]
    with pytest.raises(ValueError) as error:
        cli.parse(words, gate_config_class, available_gates)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_score_best": 3}, "--group-score-best is 3; allowed: 1 or 2"),
        ({"bias_rule": "foo"}, "--bias-rule is 'foo'; allowed: none sign"),
    ],
)
def test_create_gate_refuses_invalid_options(options, message):
    with pytest.raises(ValueError) as error:
        create_gate("topk", hidden_size=D, num_experts=E, **options)
    assert str(error.value).startswith(message)
