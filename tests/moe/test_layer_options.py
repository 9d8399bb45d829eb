"""Layer options: experts in a latent space, and routing weights on the experts' inputs."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from helpers.moe_layers import D, E, make_input, make_layer, reference_expert
from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import build_model
from megatron.moe.ffn import FFNContext
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups

N = 4


def reference_output(layer, x_TD, routing, *, latent=False, weight_on_input=False):
    """The layer's output, one assignment at a time."""
    total = [torch.zeros(D) for _ in x_TD]
    for t, e, w in zip(routing.token_A, routing.expert_A, routing.weight_A, strict=True):
        t = int(t)
        e = int(e)
        if e >= E:  # zero-computation experts see hidden states and give hidden states
            zero_computation = layer.gate.zero_computation_experts[e - E]
            total[t] = total[t] + w * zero_computation(x_TD[t : t + 1])[0]
            continue
        row = x_TD[t]
        if latent:
            row = layer.fc1_latent_proj.weight @ row
        if weight_on_input:
            out = reference_expert(layer, e, w * row)
        else:
            out = w * reference_expert(layer, e, row)
        if latent:
            out = layer.fc2_latent_proj.weight @ out
        total[t] = total[t] + out
    return torch.stack(total) + layer.shared(x_TD[None]).y[0]


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("latent", [None, N])
@pytest.mark.parametrize(
    "name, options", [("topk", {"topk": 2}), ("moepp", {"topk": 3}), ("tcmoe", {"topk": 3})]
)
def test_layer_equals_reference_per_assignment(name, options, latent, weight_on_input):
    """Values and all gradients, with shared and zero-computation experts and signed weights."""
    layer = make_layer(
        name,
        shared=1,
        options=options,
        moe_latent_size=latent,
        moe_weight_on_input=weight_on_input,
    )
    x, ids = make_input(7)
    parameters = dict(layer.named_parameters())
    x.requires_grad_()
    routing = layer.gate(GateInput(x[0], ids[0], torch.zeros(7, dtype=torch.int64)))
    assert (routing.expert_A < E).any()
    expected = reference_output(
        layer, x[0], routing, latent=latent is not None, weight_on_input=weight_on_input
    )
    y = layer(x, FFNContext(ids)).y[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y_grad = torch.randn(7, D)
    inputs = [x, *parameters.values()]
    grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    wanted = grad(expected, inputs, y_grad)
    got = grad(y, inputs, y_grad)
    for key, ours, theirs in zip(["x", *parameters], got, wanted, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def _widths_sent(latent):
    """Output and gradients of a sharded layer, and the shapes that it sends."""
    groups = groups_for(2)
    layer = make_layer("topk", groups, moe_latent_size=latent)
    for i, projection in enumerate(layer.latent_projections):
        shape = projection.weight.shape
        g = torch.Generator().manual_seed(i)
        projection.weight.data.copy_(torch.randn(shape, generator=g) * 0.5)
    x, _ = make_input(5, seed=groups.rank)
    original = dist.all_to_all_single
    shapes = []

    def all_to_all_single(output, input, *args, **kwargs):
        shapes.append(tuple(input.shape))
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single
    try:
        y = layer(x).y
        y.square().sum().backward()
    finally:
        dist.all_to_all_single = original
    gradients = [projection.weight.grad for projection in layer.latent_projections]
    return y.detach(), gradients, {shape[1] for shape in shapes if len(shape) == 2}


@pytest.mark.parametrize("latent", [None, N])
def test_latent_rows_are_sent_to_other_ranks(latent, ranks2):
    """Rows of N features are sent in both directions and passes; the projections stay local."""
    outputs = []
    for rank in range(2):
        layer = make_layer("topk", moe_latent_size=latent)
        for i, projection in enumerate(layer.latent_projections):
            g = torch.Generator().manual_seed(i)
            drawn = torch.randn(projection.weight.shape, generator=g) * 0.5
            projection.weight.data.copy_(drawn)
        y = layer(make_input(5, seed=rank)[0]).y
        y.square().sum().backward()
        outputs.append((y, [p.weight.grad for p in layer.latent_projections]))
    counts = 2  # [ranks, experts of a rank]: the exchange of row counts
    for got, expected in zip(ranks2.run(_widths_sent, latent), outputs, strict=True):
        y, gradients, widths = got
        assert widths - {counts} == {latent or D}
        torch.testing.assert_close(y, expected[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def build(rank=0, ep_size=1):
    model = ModelConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=64,
        init_method_std=0.04,
    )
    moe = MoEConfig(num_experts=2, moe_latent_size=48, moe_expert_parallel_size=ep_size)
    groups = Groups(rank=rank, world_size=ep_size, ep_size=ep_size)
    return build_model(model, moe, {}, vocab_size=10, seed=3, groups=groups)


def test_latent_projections_start_as_other_matrices():
    """The way in as any projection, the way out as output projections; equal on all ranks."""
    layer = build().layers[0].mlp
    assert layer.fc1_latent_proj.weight.std().item() == pytest.approx(0.04, rel=0.1)
    assert layer.fc2_latent_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
    other = build(rank=1, ep_size=2).layers[0].mlp
    assert torch.equal(layer.fc1_latent_proj.weight, other.fc1_latent_proj.weight)
    assert torch.equal(layer.experts.w1[1:], other.experts.w1)


def test_recompute_changes_no_gradient():
    """Blocks with biased experts in a latent space, run twice: equal bit by bit."""
    model = ModelConfig(
        num_layers=2, hidden_size=D, num_attention_heads=1, ffn_hidden_size=12, seq_length=8
    )
    moe = MoEConfig(
        num_experts=E,
        expert_type="swiglu_clamped",
        moe_latent_size=N,
        moe_weight_on_input=True,
        moe_shared_experts=1,
    )
    tokens = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        gpt = build_model(
            model, moe, {}, vocab_size=20, seed=1, groups=Groups(), recompute=recompute
        )
        gpt(tokens, tokens).loss.backward()
        gradients.append({name: p.grad for name, p in gpt.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert gradients[0]["layers.1.mlp.experts.b1"].abs().sum() > 0
