"""What is specific to the top-k gate: the formula, token by token, and its refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.moe.gates import create
from megatron.moe.routing import GateInput


def dumb(gate, x):
    """One token at a time, in float64, from the formula in the paper."""
    c, W = gate.config, gate.router.weight.detach().double()
    E, T = len(W), len(x)
    weights, load, probs, lse = [], [0] * E, [0.0] * E, 0.0
    for row in x.double():
        z = [float(W[e] @ row) for e in range(E)]
        top = max(z)
        total = sum(math.exp(v - top) for v in z)
        lse += (top + math.log(total)) ** 2 / T
        softmax = c.score_function == "softmax"
        s = [math.exp(v - top) / total if softmax else 1 / (1 + math.exp(-v)) for v in z]
        chosen = sorted(range(E), key=lambda e: -s[e])[: c.topk]
        norm = sum(s[e] for e in chosen) if c.norm_topk_prob else 1.0
        weights.append({e: c.routed_scaling_factor * s[e] / norm for e in chosen})
        for e in range(E):
            load[e] += e in chosen
            probs[e] += s[e] / sum(s) / T
    balance = E * sum(load[e] / (T * c.topk) * probs[e] for e in range(E))
    return weights, c.loss_coeff * balance + c.z_loss_coeff * lse


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(["softmax", "sigmoid"]), st.booleans())
def test_against_the_formula(seed, k, score, norm):
    if k == 1 and norm:
        return
    gate = create("topk", hidden_size=6, num_experts=5, seed=seed, init_std=0.5, topk=k, score_function=score,
                  norm_topk_prob=norm, routed_scaling_factor=1.5, loss_coeff=0.3, z_loss_coeff=0.1)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    out = gate(GateInput(x))
    weights, aux = dumb(gate, x)
    ours = [{} for _ in range(7)]
    for t, e, w in zip(out.token_A.tolist(), out.expert_A.tolist(), out.weight_A.tolist()):
        ours[t][e] = w
    for a, b in zip(ours, weights, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert out.aux_loss.item() == pytest.approx(aux, rel=1e-4)


def test_top1_softmax_keeps_the_probability_and_its_gradient():
    gate = create("topk", hidden_size=6, num_experts=4, topk=1, init_std=1.0)
    out = gate(GateInput(torch.randn(5, 6)))
    assert (out.weight_A < 1).all()
    out.weight_A.sum().backward()
    assert gate.router.weight.grad.abs().sum() > 0


def test_jitter_acts_in_training_only():
    gate = create("topk", hidden_size=6, num_experts=4, jitter=0.5, init_std=1.0)
    x = torch.randn(5, 6)
    gate.eval()
    assert torch.equal(gate(GateInput(x)).weight_A, gate(GateInput(x)).weight_A)
    gate.train()
    assert not torch.equal(gate(GateInput(x)).weight_A, gate(GateInput(x)).weight_A)


def test_same_choice_as_deepspeed_top2():
    """Against a gate users trust, on the same logits: experts and (renormalised) weights."""
    from deepspeed.moe.sharded_moe import topkgating

    gate = create("topk", hidden_size=8, num_experts=4, topk=2, norm_topk_prob=True, init_std=0.7)
    x = torch.randn(16, 8)
    out = gate(GateInput(x))
    _, combine_TEC, *_ = topkgating(x @ gate.router.weight.t(), 2, capacity_factor=4.0, min_capacity=16,
                                    drop_tokens=False)
    dense = torch.zeros(16, 4).index_put((out.token_A, out.expert_A), out.weight_A)
    torch.testing.assert_close(dense, combine_TEC.sum(-1))


@pytest.mark.parametrize("options, message", [
    ({"topk": 0}, "--topk is 0"),
    ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
    ({"score_function": "tanh"}, "--score-function is 'tanh'; allowed: softmax sigmoid"),
    ({"topk": 1, "norm_topk_prob": True}, "--norm-topk-prob"),
    ({"jitter": 1.0}, "--jitter is 1.0"),
])
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        create("topk", hidden_size=6, num_experts=4, **options)
