"""Activation recomputation routes as the first forward pass did, whatever its logits are.

The recomputed gate sees other tokens: their logits differ by about 1e-3, which changes the
choice of many tokens here, because all logits are small.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from helpers.engines import GLOBAL_BATCH, Run, config_of, micro_batches
from helpers.moe_layers import E, make_carry, make_input, make_layer, reference_layer
from helpers.spawn import groups_for
from megatron.moe.ffn import FFNContext, FFNOutput
from megatron.moe.gate import available_gates
from megatron.moe.routing import GateInput
from megatron.training.task import NextTokenLoss

ALL = available_gates()
TOKENS = 60
SCALE = 0.01
"""Magnitude of the logits; that of the perturbation is a tenth of it."""
WITHOUT_LOGITS = {"hash"}
WEIGHTS_OF_CHOICES = {"dynmoe"}
"""Gates whose weights depend on the logits through the choices only."""
ALWAYS_CHANGING = {"base", "expert_choice", "peer"}
"""Gates with so many choices, or choices in such an order, that some always change."""
CAPACITY = {"moe_train_capacity_factor": 0.6, "moe_min_capacity": 1}


def case(layer, scale=SCALE, tokens=TOKENS, seed=0):
    """Tokens and context of a layer; their scale is that of the logits."""
    x, ids = make_input(tokens, seed, scale=scale)
    carry = make_carry(layer.gate, tokens, seed, scale=scale)
    return x.requires_grad_(), FFNContext(ids, carry)


def noise(inp, size=1e-3):
    """The perturbation of the tokens [T, D]."""
    return torch.randn(inp.x_TD.shape, generator=torch.Generator().manual_seed(5)) * size


def perturb(layer, passes=(True,), size=1e-3):
    """Perturb the gate's input in the recomputed pass, or in the given passes.

    Returns:
        A list that takes the routing of every pass.
    """
    routings = []

    def add_noise(gate, args):
        (inp,) = args
        if layer._is_recompute in passes:
            inp = replace(inp, x_TD=inp.x_TD + noise(inp, size))
        return (inp,)

    layer.gate.register_forward_pre_hook(add_noise)
    layer.gate.register_forward_hook(lambda gate, args, routing: routings.append(routing))
    return routings


def run_backward(layer, x, context, recompute=True):
    """Return the output of a pass, and the gradients of x and of the parameters by name."""
    if recompute:
        # The recomputed gate runs to its end.
        with set_checkpoint_early_stop(False):
            out = checkpoint(
                layer, x, context, use_reentrant=False, context_fn=layer.recompute_contexts
            )
            return out, gradients(out, layer, x)
    out = layer(x, context)
    return out, gradients(out, layer, x)


def gradients(out, layer, x):
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    loss = (out.y * weight).sum() + out.aux_loss
    if out.carry is not None:
        loss = (
            loss
            + (out.carry * torch.linspace(-1, 1, out.carry.numel()).view_as(out.carry)).sum()
        )
    names, tensors = zip(("x", x), *layer.named_parameters())
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def assert_equal_gradients(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            value = torch.zeros_like(got[name])
        torch.testing.assert_close(
            got[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def same_assignments(one, other):
    return torch.equal(one.token_A, other.token_A) and torch.equal(one.expert_A, other.expert_A)


@pytest.mark.parametrize("capacity", [{}, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize("name", ALL)
def test_recompute_repeats_the_experts(name, capacity):
    """The assignments of the first pass, where the gate alone would choose others."""
    layer = make_layer(name, layer=1, **capacity)
    x, context = case(layer)
    routings = perturb(layer)
    run_backward(layer, x, context)
    first, second = routings
    assert same_assignments(first, second)
    if name in WITHOUT_LOGITS:
        return
    inp = GateInput(x[0], context.token_ids_BS[0], None, context.carry)
    other = layer.gate(replace(inp, x_TD=inp.x_TD + noise(inp)))
    assert not same_assignments(other, first), "the perturbation must change choices"
    is_new = not torch.equal(second.weight_A, first.weight_A)
    assert is_new or name in WEIGHTS_OF_CHOICES, "weights are computed again"


@pytest.mark.parametrize("name", [name for name in ALL if name not in ALWAYS_CHANGING])
def test_gradients_are_of_the_repeated_values(name):
    """Where the perturbation changes no choice, the gradients are those of a perturbed pass
    without recomputation. Tokens are drawn until none of them is near a tie."""
    for seed in range(20):
        layer = make_layer(name, layer=1)
        x, context = case(layer, scale=1.0, tokens=12, seed=seed)
        routings = perturb(layer)
        _, got = run_backward(layer, x, context)
        layer = make_layer(name, layer=1)
        perturbed = perturb(layer, passes=(True, False))
        _, expected = run_backward(layer, x, context, recompute=False)
        if same_assignments(routings[1], perturbed[0]):
            break
    else:
        pytest.fail("tokens are always near a tie")
    assert_equal_gradients(got, expected, rtol=1e-4, atol=1e-6)


def at_choices(score_TE, routing):
    return score_TE[routing.token_A, routing.expert_A]


def logits(gate, x_TD):
    return x_TD @ gate.router.weight.t()


def softmax(gate, x_TD, routing):
    return at_choices(logits(gate, x_TD).softmax(-1), routing)


def sigmoid(gate, x_TD, routing):
    return at_choices(logits(gate, x_TD).sigmoid(), routing)


def normalized_sigmoids(gate, x_TD, routing):
    score_Tk = sigmoid(gate, x_TD, routing).view(TOKENS, 2)
    return (gate.config.routed_scaling_factor * score_Tk / score_Tk.sum(-1, True)).flatten()


def product_keys(gate, x_TD, routing):
    """Softmax over the experts of a head, whose score is a sum of two keys' scores."""
    query = (x_TD @ gate.query.weight.t()).view(TOKENS, gate.config.peer_num_heads, -1)
    first, second = (
        part @ key.weight.t() for part, key in zip(query.chunk(2, -1), gate.keys, strict=True)
    )
    expert_THk = routing.expert_A.view(*first.shape[:2], -1)
    size = second.shape[-1]
    score_THk = first.gather(-1, expert_THk // size) + second.gather(-1, expert_THk % size)
    return score_THk.softmax(-1).flatten()


def switch_loss(probs_TE, expert_A, coeff):
    """coeff * E * sum_e f_e P_e over all tokens."""
    share_E = torch.zeros(E)
    for expert in expert_A.tolist():
        share_E[expert] += 1 / len(expert_A)
    return coeff * E * (share_E * probs_TE.mean(0)).sum()


FORMULAS = {
    "topk": (softmax, {"loss_coeff": 0.5}),
    "deepseek_v2": (softmax, {"loss_coeff": 0.0}),
    "deepseek_v3": (normalized_sigmoids, {"loss_coeff": 0.0}),
    "expert_choice": (softmax, {}),
    "base": (sigmoid, {}),
    "peer": (product_keys, {"peer_num_heads": 2, "peer_topk": 2}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_at_pinned_choices_follow_formula(name):
    """Tokens change their choice between the passes: the gradients are those of the formula at the
    perturbed logits and the first choices, one assignment at a time. The loads of the balance
    loss are the first ones, too."""
    formula, options = FORMULAS[name]
    layer = make_layer(name, options=options)
    x, context = case(layer)
    routings = perturb(layer)
    _, got = run_backward(layer, x, context)
    first = routings[0]

    perturbed_TD = x[0] + noise(GateInput(x[0]))
    routing = replace(first, weight_A=formula(layer.gate, perturbed_TD, first))
    aux_loss = torch.zeros(())
    if options.get("loss_coeff"):
        probs_TE = logits(layer.gate, perturbed_TD).softmax(-1)
        aux_loss = switch_loss(probs_TE, first.expert_A, options["loss_coeff"])
    y = reference_layer(layer, x[0], routing)[None]
    expected = gradients(FFNOutput(y, aux_loss), layer, x)
    assert_equal_gradients(got, expected, rtol=1e-4, atol=1e-6)


def test_remoe_keeps_experts_at_the_edge():
    """An expert whose logit became negative in the repetition keeps the gradient of its logit, and
    one whose logit became positive gets none."""
    layer = make_layer("remoe")
    x, context = case(layer)
    routings = perturb(layer)
    _, got = run_backward(layer, x, context)
    logits_TE = x[0] @ layer.gate.router.weight.t()
    perturbed_TE = (x[0] + noise(GateInput(x[0]))) @ layer.gate.router.weight.t()
    pinned_TE = logits_TE > 0
    assert ((perturbed_TE > 0) != pinned_TE).sum() > 5
    # The value of relu, with the derivative of the first side.
    value_TE = perturbed_TE + (perturbed_TE.clamp_min(0) - perturbed_TE).detach()
    token_A, expert_A = pinned_TE.nonzero(as_tuple=True)
    assert torch.equal(routings[1].expert_A, expert_A)
    weight_A = value_TE[token_A, expert_A]
    load_E = pinned_TE.float().mean(0)
    mean_E = (value_TE * pinned_TE).mean(0)
    coeff = layer.gate.reg_lambda / layer.gate.config.topk
    aux_loss = coeff * E * (load_E * mean_E).sum()
    routing = replace(routings[0], weight_A=weight_A)
    y = reference_layer(layer, x[0], routing)[None]
    expected = gradients(FFNOutput(y, aux_loss), layer, x)
    assert_equal_gradients(got, expected, rtol=1e-4, atol=1e-6)


def test_capacity_drops_the_same_assignments():
    """The survivors are those of the first pass; weights of the repetition rank others first."""
    layer = make_layer("topk", options={"loss_coeff": 0.0}, **CAPACITY)
    x, context = case(layer)
    routings = perturb(layer)
    _, got = run_backward(layer, x, context)
    priorities = [routing.weight_A.detach().tolist() for routing in routings]
    capacity = int(layer.counters[True]["dispatched_C"].max())
    survivors = []
    for priority in priorities:
        kept = []
        for e in range(E):
            mine = [a for a, b in enumerate(routings[0].expert_A.tolist()) if b == e]
            kept += sorted(mine, key=lambda a: (-priority[a], a))[:capacity]
        survivors.append(kept)
    assert set(survivors[0]) != set(survivors[1]), "the perturbation must change the survivors"

    weight_A = softmax(layer.gate, x[0] + noise(GateInput(x[0])), routings[0])
    routing = replace(routings[0], weight_A=weight_A)
    y = reference_layer(layer, x[0], routing, survivors[0])[None]
    expected = gradients(FFNOutput(y, torch.zeros(())), layer, x)
    assert_equal_gradients(got, expected, rtol=1e-4, atol=1e-6)


def _sharded(name, moe):
    """Gradients of this rank's part of the tokens, experts sharded over two ranks."""
    return _one_rank(name, groups_for(2), groups_for(2).rank, moe)


def _one_rank(name, groups, part, moe):
    layer = make_layer(name, groups, layer=1, **moe)
    x, context = case(layer)
    mine = slice(part * TOKENS // 2, (part + 1) * TOKENS // 2)
    x = x[:, mine].detach().requires_grad_()
    context = FFNContext(context.token_ids_BS[:, mine], context.carry[mine])
    routings = perturb(layer)
    out, grads = run_backward(layer, x, context)
    same = same_assignments(*routings)
    return out.y.detach(), grads, same


@pytest.mark.parametrize(
    "name, moe",
    [("topk", CAPACITY), ("remoe", {}), ("moepp", CAPACITY), ("peer", {}), ("peer", CAPACITY)],
)
def test_sharded_experts_repeat_the_plan(name, moe, ranks2):
    """Two ranks that share the experts get the gradients of one rank with all experts."""
    parts = [_one_rank(name, None, part, moe) for part in range(2)]
    results = ranks2.run(_sharded, name, moe)
    for (y, grads, same), (y_one, grads_one, _) in zip(results, parts, strict=True):
        assert same
        torch.testing.assert_close(y, y_one)
        torch.testing.assert_close(grads["x"], grads_one["x"], rtol=1e-4, atol=1e-6)
    for key in grads_one:
        total = sum_of_parts([part[1][key] for part in parts], concatenate=False)
        got = sum_of_parts([r[1][key] for r in results], key.startswith("experts."))
        if key != "x":
            torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-6)


def sum_of_parts(tensors, concatenate):
    if tensors[0] is None:
        return torch.zeros(())
    return torch.cat(tensors) if concatenate else sum(tensors)


def _trained(gate, stage):
    """Whether all layers of an engine repeated their experts, and its losses stayed finite."""
    config = config_of(gate, 2, stage)
    config = replace(config, train=replace(config.train, recompute_activations=True))
    run = Run(config)
    layers = run.engine.gate_updater.layers
    run.engine.model.recompute = True
    seen = [perturb(layer, size=0.3) for layer in layers]
    run.engine.step(micro_batches(0, run.groups), NextTokenLoss(), 0.02, 0.0)
    pairs = []
    for routings in seen:
        half = GLOBAL_BATCH // run.groups.world_size
        assert len(routings) == 2 * half
        pairs += zip(routings[::2], routings[1::2], strict=True)
    return [same_assignments(first, second) for first, second in pairs]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("gate", ["deepseek_v3", "moepp", "peer"])
def test_engine_repeats_the_experts(gate, stage, ranks2):
    """Two ranks under ZeRO 2 and 3, with a carry, zero-computation experts and PEER."""
    for same in ranks2.run(_trained, gate, stage):
        assert all(same) and len(same) == 4


def test_gate_that_cannot_be_repeated_is_named():
    """A gate whose choice depends on how often it ran: refused by name, not trained wrongly."""
    layer = make_layer("topk")
    x, context = case(layer)
    forward = layer.gate.forward
    calls = []

    def forgetful(inp):
        calls.append(None)
        routing = forward(inp)
        return replace(routing, expert_A=(routing.expert_A + len(calls)) % E)

    layer.gate.forward = forgetful
    with pytest.raises(AssertionError, match="gate topk assigns other experts when activation"):
        run_backward(layer, x, context)
