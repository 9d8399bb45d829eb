"""Expert types: formulas, gradients, initial weights, and the registry that outsiders use."""

from dataclasses import dataclass, replace

import pytest
import torch

from helpers.expert_types import (
    VARIANTS,
    make_experts,
    randomize_vectors,
    reference_experts,
)
from helpers.moe_layers import make_input, make_layer
from helpers.outside_gates import restored_registry
from helpers.routings import make_routing
from helpers.spawn import groups_for
from megatron.moe.dispatch.permute import GatherWeights
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.experts.expert_type import (
    ExpertContext,
    ExpertType,
    available_expert_types,
    create_experts,
    expert_config_class,
)
from megatron.moe.experts.grouped_linear import add_expert_bias

E, D, H, T = 4, 8, 12, 6
BACKENDS = ("reference", "cpu", "grouped_mm", "triton")
# Expert 3 has no rows, and token 2 has no expert.
ASSIGNMENTS = [(0, 1), (0, 2), (1, 2), (3, 0), (3, 1), (4, 1), (5, 0), (5, 2)]


@pytest.fixture
def own_registry():
    """Forget the types that a test registers."""
    with restored_registry():
        yield


def rows_of(assignments, capacity=None, weight=None):
    tokens = [t for t, _ in assignments]
    experts = [e for _, e in assignments]
    routing = make_routing(tokens, experts, weight)
    return build_dispatch_plan(routing, T, E, capacity=capacity).routed


def check_against_reference(variant, activation, capacity=None, **context):
    """Compare values and all gradients with a loop over assignments in fp64."""
    g = torch.Generator().manual_seed(1)
    experts = make_experts(variant, E, D, H, activation, **context)
    x = torch.randn(T, D, generator=g).requires_grad_()
    weight = torch.rand(len(ASSIGNMENTS), generator=g).requires_grad_()
    rows = rows_of(ASSIGNMENTS, capacity, weight.detach())
    dispatched = rows.source_index_S[: sum(rows.counts())].tolist()
    stacks = dict(experts.named_parameters())
    inputs = (x, weight, *stacks.values())
    y = experts(x, GatherWeights.apply(weight, rows), rows)
    y_grad = torch.randn(T, D, generator=g)
    got = torch.autograd.grad(y, inputs, y_grad)

    copies = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x64, weight64, *stacks64 = copies
    expected_y = reference_experts(
        variant,
        dict(zip(stacks, stacks64, strict=True)),
        x64,
        weight64[dispatched],
        [ASSIGNMENTS[a] for a in dispatched],
        activation,
        context.get("weight_on_input", False),
    )
    expected = torch.autograd.grad(expected_y, copies, y_grad.double())
    torch.testing.assert_close(y.double(), expected_y, atol=1e-5, rtol=1e-5)
    names = ["x", "weight", *stacks]
    for name, ours, theirs in zip(names, got, expected, strict=True):
        assert theirs.abs().sum() > 0, f"the test does not reach {name}"
        torch.testing.assert_close(
            ours.double(), theirs, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_equal_loop_over_assignments(variant, backend, weight_on_input):
    check_against_reference(variant, "swiglu", backend=backend, weight_on_input=weight_on_input)


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "cpu", "grouped_mm"])
def test_dropped_assignments_take_no_part(variant, backend, weight_on_input):
    """A capacity leaves rows past those of the last expert."""
    check_against_reference(
        variant, "swiglu", capacity=2, backend=backend, weight_on_input=weight_on_input
    )


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "geglu"])
def test_biased_mlp_has_all_activations(activation):
    check_against_reference("mlp with biases", activation)


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows_give_zeros(variant, weight_on_input):
    """A rank whose experts have no rows has zero gradients of all parameters."""
    experts = make_experts(variant, E, D, H, weight_on_input=weight_on_input)
    x = torch.randn(T, D, requires_grad=True)
    weight = torch.rand(0, requires_grad=True)
    rows = rows_of([])
    y = experts(x, GatherWeights.apply(weight, rows), rows)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(T, D)) and torch.equal(x.grad, torch.zeros(T, D))
    for parameter in experts.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_bias_gradient_ignores_padding_rows():
    """On a GPU rows past the last expert's are not cut off, and may be NaN in gradients."""
    offsets = torch.tensor([2, 2, 3])
    y = torch.zeros(5, 2, requires_grad=True)
    bias = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    out = add_expert_bias(y, bias, offsets)
    assert out[:3].tolist() == [[1, 2], [1, 2], [5, 6]]
    grad = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [float("nan")] * 2, [7.0, 7.0]])
    out.backward(grad)
    assert bias.grad.tolist() == [[11, 22], [0, 0], [3, 4]]
    torch.testing.assert_close(y.grad, grad, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_weights_do_not_depend_on_sharding(variant):
    name, options = VARIANTS[variant]
    context = ExpertContext(E, D, H, "swiglu", init=ExpertInit(seed=3, layer=2))
    full = create_experts(name, context, **options)
    shard_init = ExpertInit(seed=3, layer=2, first_expert=2)
    shard = create_experts(name, replace(context, num_local=2, init=shard_init), **options)
    for key, stack in full.named_parameters():
        assert torch.equal(stack[2:], shard.get_parameter(key))
        assert (stack.dim() == 2) == bool((stack == 0).all())


# Sharded layers


def _sharded_layer(variant, moe):
    """Output and gradients of a sharded layer on this rank's tokens."""
    groups = groups_for(2)
    name, options = VARIANTS[variant]
    layer = make_layer("topk", groups, expert_type=name, expert_options=options, **moe)
    for parameter in layer.experts.parameters():
        if parameter.dim() == 2:
            parameter.data.fill_(0.25)
    x, _ = make_input(5, seed=groups.rank)
    y = layer(x.requires_grad_()).y
    y.square().sum().backward()
    grads = {key: p.grad for key, p in layer.experts.named_parameters()}
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("variant", ["mlp", "mlp with biases", "swiglu_clamped"])
@pytest.mark.parametrize("moe", [{}, {"moe_weight_on_input": True}])
def test_two_ranks_equal_one(variant, moe, ranks2):
    name, options = VARIANTS[variant]
    layer = make_layer("topk", expert_type=name, expert_options=options, **moe)
    for parameter in layer.experts.parameters():
        if parameter.dim() == 2:
            parameter.data.fill_(0.25)
    inputs = [make_input(5, seed=rank)[0].requires_grad_() for rank in range(2)]
    outputs = [layer(x).y for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    results = ranks2.run(_sharded_layer, variant, moe)
    for x, y, (got_y, got_grad, _) in zip(inputs, outputs, results, strict=True):
        torch.testing.assert_close(got_y, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_grad, x.grad, atol=1e-5, rtol=1e-4)
    for key, parameter in layer.experts.named_parameters():
        got = torch.cat([grads[key] for _, _, grads in results])
        torch.testing.assert_close(got, parameter.grad, atol=1e-4, rtol=1e-4)


# Types from outside


def test_outside_type_registers_itself(own_registry):
    """A type of one's own needs one class; its routing weights and sums come from the base."""

    class Scaled(ExpertType, name="scaled_for_test"):
        @dataclass(frozen=True)
        class Config:
            scale: float = 2.0
            """factor on the output"""

        def __init__(self, config, context):
            super().__init__(config, context)
            self.add_matrix("w", context.hidden_size, context.hidden_size)

        def apply_experts(self, x_TD, weight_S, rows):
            y_SD = self.config.scale * self.linear(self.gather(x_TD, rows), self.w, rows)
            return self.combine(y_SD, weight_S, rows)

    assert "scaled_for_test" in available_expert_types()
    experts = create_experts("scaled_for_test", ExpertContext(E, D, H), scale=3.0)
    assert expert_config_class("scaled_for_test") is Scaled.Config
    x = torch.randn(T, D)
    weight = torch.rand(len(ASSIGNMENTS))
    rows = rows_of(ASSIGNMENTS, weight=weight)
    expected = torch.zeros(T, D)
    for a, (t, e) in enumerate(ASSIGNMENTS):
        expected[t] += weight[a] * 3 * (experts.w[e] @ x[t])
    got = experts(x, weight[rows.source_index_S], rows)
    torch.testing.assert_close(got, expected)


def test_unknown_types_and_options_are_refused():
    context = ExpertContext(E, D, H)
    with pytest.raises(
        ValueError, match="--expert-type is 'mpl'; allowed: mlp .*swiglu_clamped"
    ):
        create_experts("mpl", context)
    with pytest.raises(ValueError, match="--expert-type is 'mpl'"):
        expert_config_class("mpl")
    with pytest.raises(
        ValueError,
        match="expert type 'mlp' has no option 'limit'; allowed: linear_bias",
    ):
        create_experts("mlp", context, limit=3)
    with pytest.raises(ValueError, match="--expert-limit is 0; allowed: a positive number"):
        create_experts("swiglu_clamped", context, limit=0)


def test_two_types_of_one_name_are_refused():
    with pytest.raises(
        ValueError,
        match=r"two expert types have the name 'mlp': megatron\.moe\.experts\.types\.mlp\."
        "MLPExperts, and .*Other; rename one",
    ):

        class Other(ExpertType, name="mlp"):
            pass


def test_missing_apply_is_an_error(own_registry):
    class Empty(ExpertType, name="empty_for_test"):
        pass

    experts = create_experts("empty_for_test", ExpertContext(E, D, H))
    with pytest.raises(NotImplementedError, match="expert type Empty has no apply_experts"):
        experts(torch.zeros(T, D), torch.zeros(0), rows_of([]))
    with pytest.raises(ValueError, match="has no option 'a'; allowed: no options"):
        create_experts("empty_for_test", ExpertContext(E, D, H), a=1)


def test_vectors_start_as_zeros():
    experts = create_experts("mlp", ExpertContext(E, D, H, "gelu"), linear_bias=True)
    assert torch.equal(experts.b1, torch.zeros(E, H)) and experts.b2.shape == (E, D)
    randomize_vectors(experts)
    assert experts.b1.abs().sum() > 0
