"""Expert types and layer options against the MoE blocks of transformers, in fp32.

Their real classes with tiny random configurations, by value and by gradient.
"""

import importlib

import pytest
import torch
from torch import nn

from helpers.routings import make_routing
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.expert_type import ExpertContext, create_experts
from megatron.moe.gate import Gate, GateContext
from megatron.moe.routing import Routing
from megatron.parallel.groups import Groups

E, D, H, K, T = 4, 8, 12, 2, 7


def transformers_module(model):
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def randomize(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.6)
    return module.float()


class GivenRouting(Gate):
    """Routing of every token to the experts and weights that a function of the tokens returns."""

    Config = dict

    def __init__(self, choose):
        super().__init__({}, GateContext(D, E))
        self.choose = choose

    @classmethod
    def experts_per_token(cls, config, num_experts):
        return num_experts, num_experts

    def forward(self, inp):
        expert_TK, weight_TK = self.choose(inp.x_TD)
        token_A = torch.arange(len(expert_TK)).repeat_interleave(expert_TK.shape[1])
        return Routing(
            token_A, expert_TK.flatten(), weight_TK.flatten(), torch.zeros(()), token_major=True
        )


def make_layer(choose, activation, shared=0, **moe):
    """Our layer with the routing of a function."""
    return make_moe_layer(
        GivenRouting(choose),
        ModelConfig(num_layers=1, hidden_size=D, activation=activation, num_attention_heads=1),
        MoEConfig(num_experts=E, moe_ffn_hidden_size=H, moe_shared_experts=shared, **moe),
        layer=0,
        seed=0,
        groups=Groups(),
    )


def assert_same(ours, theirs, names):
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().sum() > 0, f"the test does not reach {name}"
        torch.testing.assert_close(
            a, b, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def copy_weights(module, weights):
    for name, weight in weights.items():
        parameter = module.get_parameter(name)
        assert parameter.shape == weight.shape, name
        parameter.data.copy_(weight)


def test_swiglu_clamped_equals_gpt_oss_experts():
    """Values and gradients, with the interleaved gate_up layout as the type documents it."""
    module = transformers_module("gpt_oss")
    from transformers import GptOssConfig

    config = GptOssConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K
    )
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    config._experts_implementation = "eager"
    theirs = randomize(module.GptOssExperts(config))
    with torch.no_grad():
        theirs.gate_up_proj.mul_(8)  # a quarter of the pre-activations is clamped
    ours = create_experts("swiglu_clamped", ExpertContext(E, D, H))

    def as_ours(gate_up, gate_up_bias, down, down_bias):
        return {
            "w1": gate_up[:, :, 0::2].transpose(1, 2),
            "w3": gate_up[:, :, 1::2].transpose(1, 2),
            "w2": down.transpose(1, 2),
            "b1": gate_up_bias[:, 0::2],
            "b3": gate_up_bias[:, 1::2],
            "b2": down_bias,
        }

    stacks = (
        theirs.gate_up_proj,
        theirs.gate_up_proj_bias,
        theirs.down_proj,
        theirs.down_proj_bias,
    )
    copy_weights(ours, as_ours(*stacks))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(T, D, generator=g).requires_grad_()
    weight_TK = torch.rand(T, K, generator=g).requires_grad_()
    expert_TK = torch.rand(T, E, generator=g).topk(K).indices
    y_grad = torch.randn(T, D, generator=g)
    projected = x @ theirs.gate_up_proj[0]
    assert 0.1 < (projected.abs() > 7).float().mean() < 0.9, "the limit must have an effect"
    expected = theirs(x, expert_TK, weight_TK)
    expected_grads = torch.autograd.grad(expected, (x, weight_TK, *stacks), y_grad)

    tokens = torch.arange(T).repeat_interleave(K).tolist()
    routing = make_routing(tokens, expert_TK.flatten().tolist(), weight_TK.flatten())
    rows = build_dispatch_plan(routing, T, E).routed
    y = ours(x, routing.weight_A[rows.source_index_S], rows)
    weights = dict(ours.named_parameters())
    grads = torch.autograd.grad(y, (x, weight_TK, *weights.values()), y_grad)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    theirs_by_name = as_ours(*expected_grads[2:])
    wanted = [*expected_grads[:2], *(theirs_by_name[name] for name in weights)]
    scale = max(float(grad.abs().max()) for grad in wanted)
    assert_same(
        [grad / scale for grad in grads],
        [grad / scale for grad in wanted],
        ["x", "weight", *weights],
    )


def test_weight_on_input_equals_llama4_block():
    """Sigmoid of the best logit on the input of the best expert, and the shared expert."""
    module = transformers_module("llama4")
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=D,
        intermediate_size=H,
        num_local_experts=E,
        num_experts_per_tok=1,
        hidden_act="silu",
    )
    theirs = randomize(module.Llama4TextMoe(config))

    def choose(x_TD):
        best = (x_TD @ theirs.router.weight.T).max(-1, keepdim=True)
        return best.indices, best.values.sigmoid()

    layer = make_layer(choose, "swiglu", shared=1, moe_weight_on_input=True)

    def as_ours(gate_up, down):
        gate, up = gate_up.transpose(1, 2).chunk(2, dim=1)
        return {"w1": gate, "w3": up, "w2": down.transpose(1, 2)}

    stacks = (theirs.experts.gate_up_proj, theirs.experts.down_proj)
    copy_weights(layer.experts, as_ours(*stacks))
    shared = dict(theirs.shared_expert.named_parameters())
    copy_weights(layer.shared, shared)
    x = torch.randn(T, D, requires_grad=True)
    y_grad = torch.randn(T, D)
    their_weights = (x, theirs.router.weight, *stacks, *shared.values())
    expected = theirs(x)[0]
    expected_grads = torch.autograd.grad(expected, their_weights, y_grad)
    y = layer(x[None]).y[0]
    own = dict(layer.experts.named_parameters())
    own_shared = [layer.shared.get_parameter(name) for name in shared]
    grads = torch.autograd.grad(
        y, (x, theirs.router.weight, *own.values(), *own_shared), y_grad
    )
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    by_name = as_ours(*expected_grads[2:4])
    wanted = [*expected_grads[:2], *(by_name[name] for name in own), *expected_grads[4:]]
    assert_same(grads, wanted, ["x", "router", *own, *shared])
    on_output = make_layer(choose, "swiglu", shared=1)
    on_output.load_state_dict(layer.state_dict())
    assert not torch.allclose(on_output(x[None]).y[0], expected, atol=1e-3)


def test_latent_size_equals_nemotron_h_block():
    """Its router, shared expert and projections around the experts, which see N features."""
    module = transformers_module("nemotron_h")
    from transformers import NemotronHConfig

    N = 4
    config = NemotronHConfig(
        hidden_size=D,
        moe_intermediate_size=H,
        moe_shared_expert_intermediate_size=H,
        moe_latent_size=N,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        mlp_hidden_act="silu",
        mlp_bias=False,
    )
    config._experts_implementation = "eager"
    theirs = randomize(module.NemotronHMoE(config))

    def choose(x_TD):
        _, weight_TK, expert_TK = theirs.gate(x_TD)
        return expert_TK, weight_TK

    layer = make_layer(choose, "silu", shared=1, moe_latent_size=N)
    assert layer.experts.w1.shape == (E, H, N) and layer.experts.w2.shape == (E, N, H)
    names = {
        "experts.w1": "experts.up_proj",
        "experts.w2": "experts.down_proj",
        "shared.up_proj.weight": "shared_experts.up_proj.weight",
        "shared.down_proj.weight": "shared_experts.down_proj.weight",
        "fc1_latent_proj.weight": "fc1_latent_proj.weight",
        "fc2_latent_proj.weight": "fc2_latent_proj.weight",
    }
    copy_weights(layer, {ours: theirs.get_parameter(name) for ours, name in names.items()})
    x = torch.randn(T, D, requires_grad=True)
    y_grad = torch.randn(T, D)
    router = theirs.gate.weight
    expected = theirs(x)
    their_weights = [theirs.get_parameter(name) for name in names.values()]
    expected_grads = torch.autograd.grad(expected, (x, router, *their_weights), y_grad)
    y = layer(x[None]).y[0]
    weights = [layer.get_parameter(name) for name in names]
    grads = torch.autograd.grad(y, (x, router, *weights), y_grad)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert_same(grads, expected_grads, ["x", "router", *names])


def test_gate_of_the_comparison_sees_hidden_states():
    """The gate's input is x [D], whatever the experts take."""
    seen = []

    def choose(x_TD):
        seen.append(x_TD.shape)
        return torch.zeros(len(x_TD), 1, dtype=torch.int64), torch.ones(len(x_TD), 1)

    layer = make_layer(choose, "silu", moe_latent_size=3)
    layer(torch.randn(1, T, D))
    assert seen == [(T, D)]
    assert isinstance(layer.fc1_latent_proj, nn.Linear) and layer.fc1_latent_proj.bias is None
