"""Top-k gate: the formula, the routers of published models, and refused options."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.moe_layers import reference_topk
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups


def draw(tokens, seed=0, hidden=6):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def reference(c, x, W):
    """Return `reference_topk` of x W^T, one product at a time."""
    return reference_topk(
        c, [[sum(w[d] * row[d] for d in range(len(row))) for w in W] for row in x]
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
)
def test_gate_matches_formula(seed, k, score, norm):
    """Experts, weights, loss, and the gradients of x and the router through both."""
    if k == 1 and norm:
        return
    gate = create_gate(
        "topk",
        hidden_size=6,
        num_experts=5,
        seed=seed,
        init_std=0.5,
        topk=k,
        score_function=score,
        norm_topk_prob=norm,
        routed_scaling_factor=1.5,
        loss_coeff=0.3,
        z_loss_coeff=0.1,
    )
    x = draw(4, seed).requires_grad_()
    out = gate(GateInput(x))
    x64, W64 = (
        x.detach().double().requires_grad_(),
        gate.router.weight.detach().double().requires_grad_(),
    )
    weights, aux, margin = reference(gate.config, x64, W64)
    if margin < 1e-6:
        return  # a tie in fp32
    assert out.aux_loss.item() == pytest.approx(float(aux.detach()), rel=1e-4)
    seen, ours, theirs = [{} for _ in x], 2 * out.aux_loss, 2 * aux
    for t, e, w in zip(out.token_A.tolist(), out.expert_A.tolist(), out.weight_A):
        seen[t][e] = float(w.detach())
        ours, theirs = (
            ours + math.sin(1 + 3 * t + 7 * e) * w,
            theirs + math.sin(1 + 3 * t + 7 * e) * weights[t][e],
        )
    assert seen == [
        pytest.approx({e: float(w.detach()) for e, w in row.items()}, rel=1e-4)
        for row in weights
    ]
    got, want = (
        torch.autograd.grad(ours, (x, gate.router.weight)),
        torch.autograd.grad(theirs, (x64, W64)),
    )
    for name, a, b in zip(("x", "router"), got, want):
        torch.testing.assert_close(
            a, b.float(), atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def of_transformers(model, k, norm):
    """Return transformers' (router for 8 experts and hidden size 6, balance loss of logits)."""
    transformers = pytest.importorskip(
        "transformers", reason="the reference implementation is not installed"
    )
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    name = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe"}[model]
    number = "num_local_experts" if model == "mixtral" else "num_experts"
    own = {} if model == "mixtral" else {"norm_topk_prob": norm}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=6, num_experts_per_tok=k, **{number: 8}, **own
    )
    return getattr(module, f"{name}TopKRouter")(config), module.load_balancing_loss_func


@pytest.mark.parametrize(
    "model, k, norm",
    [
        ("mixtral", 2, True),
        ("mixtral", 3, True),
        ("qwen2_moe", 4, False),
        ("qwen2_moe", 4, True),
        ("olmoe", 8, False),
        ("olmoe", 1, False),
        ("olmoe", 3, True),
    ],
)
def test_routing_matches_transformers(model, k, norm):
    """Mixtral, Qwen2-MoE and OLMoE with the same weights: experts, weights, loss,
    gradients.

    Their balance loss divides counts by the tokens, ours by the assignments, k per
    token: theirs is k times ours. With several layers theirs pools the layers' counts
    before it multiplies; ours averages the layers' losses.
    """
    gate = create_gate(
        "topk",
        hidden_size=6,
        num_experts=8,
        topk=k,
        norm_topk_prob=norm,
        init_std=0.5,
        loss_coeff=1.0,
    )
    theirs, balance_loss = of_transformers(model, k, norm)
    theirs.weight.data.copy_(gate.router.weight.data)
    x = draw(40)
    out, (logits, weight_Tk, expert_Tk) = gate(GateInput(x)), theirs(x)
    assert out.expert_A.view(40, k).tolist() == expert_Tk.tolist()
    torch.testing.assert_close(out.weight_A.view(40, k), weight_Tk)
    loss = balance_loss((logits,), num_experts=8, top_k=k)
    torch.testing.assert_close(k * out.aux_loss, loss)
    mix = torch.randn(40, k, generator=torch.Generator().manual_seed(1))
    (a,) = torch.autograd.grad(
        (out.weight_A.view(40, k) * mix).sum() + k * out.aux_loss, gate.router.weight
    )
    (b,) = torch.autograd.grad((weight_Tk * mix).sum() + loss, theirs.weight)
    torch.testing.assert_close(a, b)


def test_top1_softmax_keeps_its_gradient():
    """Catches dividing the one selected probability by itself: the router would not
    learn.

    Requesting it is refused, see below.
    """
    gate = create_gate("topk", hidden_size=6, num_experts=4, topk=1, init_std=1.0)
    out = gate(GateInput(draw(5)))
    assert (out.weight_A < 1).all()
    out.weight_A.sum().backward()
    assert gate.router.weight.grad.abs().sum() > 0


def test_jitter_acts_in_training_only():
    """Catches noise in evaluation, as in the published XMoE top-k. Jitter multiplies by
    1 +- eps.
    """
    gate = create_gate("topk", hidden_size=6, num_experts=4, jitter=0.5, init_std=1.0)
    x = draw(5)
    gate.eval()
    assert torch.equal(gate(GateInput(x)).weight_A, gate(GateInput(x)).weight_A)
    plain = create_gate("topk", hidden_size=6, num_experts=4, init_std=1.0)
    assert torch.equal(gate(GateInput(x)).weight_A, plain(GateInput(x)).weight_A)
    gate.train()
    assert not torch.equal(gate(GateInput(x)).weight_A, gate(GateInput(x)).weight_A)
    assert torch.equal(gate(GateInput(0 * x)).weight_A, plain(GateInput(0 * x)).weight_A)


def test_balance_scope_reaches_loss():
    def run(inp, **options):
        return create_gate(
            "topk", hidden_size=6, num_experts=4, init_std=1.0, loss_coeff=1.0, **options
        )(inp)

    x, sequence = draw(12), torch.arange(3).repeat_interleave(4)
    inp = GateInput(x, None, sequence, num_sequences=3)
    parts = [run(GateInput(x[sequence == n])).aux_loss.item() for n in range(3)]
    by_sequence = run(inp, balance_scope="sequence")
    assert (
        by_sequence.aux_loss.item() == pytest.approx(sum(parts) / 3, rel=1e-5)
        and not by_sequence.balance
    )
    full, later = (
        run(inp, z_loss_coeff=0.1),
        run(inp, z_loss_coeff=0.1, balance_scope="global-batch"),
    )
    (term,) = later.balance
    assert (later.aux_loss + term.loss()).item() == pytest.approx(
        full.aux_loss.item(), rel=1e-5
    )
    assert term.count_NG.sum() == 24 and 0 < later.aux_loss < full.aux_loss


def test_loss_counts_assignments_before_capacity():
    """Catches f_e after dropping, which looks balanced exactly when it is not."""
    losses = []
    for factor in (0.0, 0.1):
        gate = create_gate("topk", hidden_size=6, num_experts=4, init_std=1.0, loss_coeff=1.0)
        model = ModelConfig(
            num_layers=1, hidden_size=6, num_attention_heads=1, ffn_hidden_size=8
        )
        moe = MoEConfig(
            num_experts=4, gate="topk", moe_train_capacity_factor=factor, moe_min_capacity=1
        )
        layer = make_moe_layer(gate, model, moe, layer=0, seed=0, groups=Groups())
        losses.append(layer(draw(32)[None] + 1).aux_loss.item())
        assert (layer.counters[True]["dispatched_C"].sum() < 64) == bool(factor)
    assert losses[0] == losses[1] > 1.05


def test_routing_matches_deepspeed_top2():
    """An established gate with the same logits: experts and (renormalised) weights."""
    from deepspeed.moe.sharded_moe import topkgating

    gate = create_gate(
        "topk", hidden_size=8, num_experts=4, topk=2, norm_topk_prob=True, init_std=0.7
    )
    x = torch.randn(16, 8)
    out = gate(GateInput(x))
    _, combine_TEC, *_ = topkgating(
        x @ gate.router.weight.t(), 2, capacity_factor=4.0, min_capacity=16, drop_tokens=False
    )
    dense = torch.zeros(16, 4).index_put((out.token_A, out.expert_A), out.weight_A)
    torch.testing.assert_close(dense, combine_TEC.sum(-1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0"),
        ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
        ({"score_function": "tanh"}, "--score-function is 'tanh'; allowed: softmax sigmoid"),
        (
            {"topk": 1, "norm_topk_prob": True},
            "--norm-topk-prob is on with --topk 1: .*--no-norm-topk-prob",
        ),
        ({"jitter": 1.0}, "--jitter is 1.0"),
        ({"jitter": -0.1}, "--jitter is -0.1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("topk", hidden_size=6, num_experts=4, **options)
