"""FLOPs by formula against torch's counter, which sees every matrix product of a real model.

Experts run on the reference backend and attention on the plain one, since the counter knows the
operations of neither in-place products nor fused attention on a CPU. PEER's look-ups are
embedding bags, for which the tests give it a formula.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from megatron.model import attend
from megatron.model.builder import build_run_config_model
from megatron.model.flops import FLOP_PARTS, ExpertUse, ModelFlops
from megatron.model.meta_device import meta_device
from megatron.moe.experts.expert_type import available_expert_types
from megatron.moe.gate import available_gates
from megatron.moe.gate_flops import Flops
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups
from megatron.pretrain import parse_flags

HIDDEN = 16
LENGTH = 24
EXPERTS = 4
VOCABULARY = 64
SHAPE = (
    f"--num-layers 3 --hidden-size {HIDDEN} --num-attention-heads 4 --seq-length {LENGTH} "
    f"--vocab-size {VOCABULARY} --make-vocab-size-divisible-by 1 --init-method-std 0.3"
)
MOE = f"--num-experts {EXPERTS} --moe-ffn-hidden-size 24 --moe-backend reference"
PEER = "--peer-num-experts 64 --peer-num-heads 3 --peer-topk 4 --peer-query-size 8 --gate peer"
MLA = (
    "--attention mla --kv-lora-rank 8 --qk-rope-head-dim 4 --qk-nope-head-dim 6 --v-head-dim 5"
)


def look_ups(table_shape, index_shape, *args, out_shape, **kwargs):
    """Operations of an embedding bag with weights: two for each number that is read."""
    return 2 * index_shape[0] * table_shape[1]


def gradient_of_weights(grad_shape, table_shape, index_shape, *args, out_shape, **kwargs):
    return 2 * index_shape[0] * table_shape[1]


BAGS = {
    torch.ops.aten._embedding_bag: look_ups,
    torch.ops.aten._embedding_bag_forward_only: look_ups,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: gradient_of_weights,
}


def build(flags, device="cpu"):
    config = parse_flags(flags.split())
    if device == "meta":
        with meta_device():
            return build_run_config_model(config, VOCABULARY)
    return build_run_config_model(config, VOCABULARY)


def run(model, *, backward, mapping=None):
    """Count one sequence; returns FLOPs per token and the use of the experts in this pass."""
    length = model.config.seq_length
    ids = torch.randint(0, VOCABULARY, (1, length + 1))
    with (
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
        sdpa_kernel(SDPBackend.MATH),
        set_checkpoint_early_stop(False),
        torch.set_grad_enabled(backward),
    ):
        out = model(ids[:, :-1], ids[:, 1:])
        if backward:
            out.loss.backward()
    metrics = MoEMetrics(model, Groups()).read() if find_moe_layers(model) else {}
    use = ExpertUse.of_metrics(metrics) or ExpertUse((), ())
    return counter.get_total_flops() / length, use


def compare(flags, mapping=None, constant=0):
    """Compare a training pass and one without gradients with the formula, exactly.

    Args:
        constant: operations per sequence in the forward pass that do not depend on the tokens.
    """
    model = build(flags)
    flops = ModelFlops.of(build(flags, "meta"))
    assert flops == ModelFlops.of(model), "counted on meta as on the CPU"
    measured, use = run(model, backward=False, mapping=mapping)
    assert flops.per_token(use).forward == pytest.approx(measured - constant / LENGTH, rel=1e-9)
    measured, use = run(model, backward=True, mapping=mapping)
    total = flops.per_token(use).total + flops.recomputed(use)
    assert total == pytest.approx(measured - 3 * constant / LENGTH, rel=1e-9)
    return flops.parts(use)


@pytest.mark.parametrize("gate", available_gates())
def test_gates_equal_the_counter(gate):
    if gate == "peer":
        parts = compare(f"{SHAPE} {PEER} --moe-backend reference", BAGS)
        assert parts["routed experts"].forward == 12 * 2 * 2 * HIDDEN
        return
    options = ""
    constant = 0
    if gate == "moepp":
        options = "--num-zero-experts 0 --num-copy-experts 0"
    if gate == "dynmoe":  # the loss of the embeddings multiplies them by each other
        constant = 3 * 2 * EXPERTS**2 * HIDDEN
    parts = compare(f"{SHAPE} {MOE} --gate {gate} {options}", constant=constant)
    assert parts["routed experts"].total > 0
    if gate == "moepp":
        assert parts["zero-computation experts"].total > 0
    if gate == "hash":
        assert parts["router"] == Flops()


@pytest.mark.parametrize(
    "flags",
    [
        "--gate moepp",
        "--gate topk --topk 2 --num-null-experts 2",
        "--gate longcat",
        "--gate topk --moe-train-capacity-factor 0.5 --moe-min-capacity 1",
        "--gate topk --router-bias --router-norm --simbal-coeff 0.01",
        "--gate deepseek_v2 --n-group 2 --topk-group 1",
        "--gate hash --learned-weights",
        "--gate tcmoe --topk 2 --num-null-experts 3",
    ],
)
def test_options_of_gates_are_within_one_percent(flags):
    """Means over unlike zero-computation experts, and products of weights alone, are left out."""
    model = build(f"{SHAPE} {MOE} {flags}")
    measured, use = run(model, backward=True)
    assert ModelFlops.of(model).per_token(use).total == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--swiglu --untie-embeddings-and-output-weights",
        "--num-query-groups 2 --kv-channels 6 --qk-norm head --add-qkv-bias",
        "--position-embedding-type learned --normalization LayerNorm",
        "--attention-sinks",
        "--window-size 5",
        "--seq-length 150 --window-size 5 --window-layers 1",
        "--seq-length 200 --window-size 70 --attention-sinks",
        "--seq-length 100 --window-size 70 --num-query-groups 1 --attention-sinks",
        MLA,
        f"{MLA} --q-lora-rank 12 --add-qkv-bias",
        "--recompute-activations",
    ],
)
def test_attention_and_dense_layers_equal_the_counter(flags):
    parts = compare(f"{SHAPE} {flags}")
    assert parts["dense ffn"].total > 0 and parts["attention scores"].total > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-shared-experts 2 --moe-shared-expert-gate --swiglu",
        "--moe-latent-size 8",
        "--moe-first-k-dense 1 --recompute-activations",
        "--expert-linear-bias --swiglu",
        "--moe-weight-on-input --gate topk",
    ],
)
def test_expert_options_equal_the_counter(flags):
    compare(f"{SHAPE} {MOE} {flags}")


@pytest.mark.parametrize("name", available_expert_types())
def test_expert_types_equal_the_counter(name):
    """A row is multiplied once by each matrix of its expert."""
    compare(f"{SHAPE} {MOE} --expert-type {name}")


def test_mixed_gates_equal_the_counter():
    parts = compare(
        f"{SHAPE.replace('--num-layers 3', '--num-layers 5')} {MOE} "
        "--gate dense@0,hash@1,moepp@2+4,threshold@3 --moepp.num-zero-experts 0 "
        "--moepp.num-copy-experts 0"
    )
    assert set(parts) == set(FLOP_PARTS)


def test_frozen_weights_have_no_gradient_products():
    flags = f"{SHAPE} {MOE} --gate topk --untie-embeddings-and-output-weights"
    model = build(flags)
    for name, parameter in model.named_parameters():
        is_frozen = "experts" in name or "o_proj" in name or "gate" in name or "lm_head" in name
        parameter.requires_grad_(not is_frozen)
    measured, use = run(model, backward=True)
    assert ModelFlops.of(model).per_token(use).total == pytest.approx(measured, rel=1e-9)


def test_slices_of_experts_count_as_all():
    config = parse_flags(f"{SHAPE} {MOE} --moe-expert-parallel-size 2".split())
    half = build_run_config_model(config, VOCABULARY, Groups(rank=1, world_size=2, ep_size=2))
    full = build_run_config_model(config, VOCABULARY)
    assert ModelFlops.of(half) == ModelFlops.of(full)


def test_counting_leaves_model_and_randomness():
    model = build(f"{SHAPE} {MOE} --gate topk --jitter 0.1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    ModelFlops.of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("length, window", [(1, 0), (7, 0), (7, 1), (7, 3), (7, 7), (7, 20)])
def test_visible_pairs_equal_a_count(length, window):
    expected = sum(
        key <= query and (not window or query - key < window)
        for query in range(length)
        for key in range(length)
    )
    assert attend.visible_pairs(length, window) == expected


def test_visible_scores_leave_out_padding():
    """Heads of MLA are padded to the wider of keys (10) and values (5) only when computed."""
    flops = ModelFlops.of(build(f"{SHAPE} {MLA}"))
    pairs = LENGTH * (LENGTH + 1) // 2
    assert flops.visible_scores.forward == 3 * 4 * 2 * pairs * (10 + 5) / LENGTH
    assert flops.fixed["attention scores"].forward == 3 * 4 * 2 * LENGTH**2 * (10 + 10) / LENGTH
    flops = ModelFlops.of(build(f"{SHAPE} --window-size 5"))
    pairs = LENGTH * 5 - 10
    assert flops.visible_scores.backward == 2 * 3 * 4 * 2 * pairs * (4 + 4) / LENGTH


def test_sequence_length_can_differ():
    model = build(SHAPE)
    flops = ModelFlops.of(model, 2 * LENGTH)
    doubled = ModelFlops.of(model).fixed["attention scores"] * 2
    assert flops.fixed["attention scores"] == doubled


def test_metrics_use_the_measured_experts():
    flops = ModelFlops.of(build(f"{SHAPE} {MOE} --gate threshold"))
    row = {"experts_per_token_by_layer": [1.0, 2.5, 4.0]}
    per_token = flops.per_token(flops.use([1.0, 2.5, 4.0])).total
    assert flops.training_metrics(row, 5e6) == {
        "flops_per_token": per_token,
        "tflops_per_s": pytest.approx(per_token * 5e-6),
    }
    assert flops.training_metrics({}, 5e6) == {}, "the experts per token are not known"
    assert flops.training_metrics({"experts_per_token_by_layer": [1.0, None, 2.0]}, 5e6) == {}
    expert = 3 * 2 * 2 * HIDDEN * 24
    more = flops.per_token(flops.use([2.0, 2.5, 4.0])).total
    assert more - per_token == pytest.approx(expert)


def test_fixed_gates_need_no_measurement():
    flops = ModelFlops.of(build(f"{SHAPE} {MOE} --gate topk --topk 3"))
    expected = flops.per_token(flops.use(3)).total
    assert flops.training_metrics({}, 1.0)["flops_per_token"] == expected
    assert ModelFlops.of(build(SHAPE)).training_metrics({}, 1.0)["flops_per_token"] > 0


def test_use_separates_zero_computation():
    row = {
        "experts_per_token_by_layer": [2.0, 4.0, 1.0],
        "zero_computation_fraction_by_layer": [0.25, None, 1.0],
    }
    assert ExpertUse.of_metrics(row) == ExpertUse((1.5, 4.0, 0.0), (0.5, 0.0, 1.0))


def test_use_of_another_model_is_refused():
    flops = ModelFlops.of(build(f"{SHAPE} {MOE}"))
    with pytest.raises(ValueError, match="for 2 MoE layers; allowed: .* each of the 3 of this"):
        flops.parts(ExpertUse((1.0, 1.0), (0.0, 0.0)))


def test_gate_that_cannot_run_is_estimated(caplog):
    """A gate for another device is counted by its matrices, with a warning."""
    model = build(f"{SHAPE} {MOE} --gate topk --router-bias")
    expected = ModelFlops.of(model)

    class OtherDeviceGate(type(find_moe_layers(model)[0].gate)):
        def forward(self, inp):
            raise RuntimeError("needs another device")

    for layer in find_moe_layers(model):
        layer.gate.__class__ = OtherDeviceGate
    estimated = ModelFlops.of(model)
    weights = HIDDEN * EXPERTS
    assert estimated.fixed["router"] == Flops(6.0 * weights, 12.0 * weights)
    assert dataclasses.replace(estimated, fixed=expected.fixed) == expected
    assert "OtherDeviceGate are estimated from its matrices" in caplog.text


def test_parts_are_named_by_modules():
    """A layer of unknown name is `other`."""
    model = build(SHAPE)
    model.extra = nn.Linear(3, 5)
    assert ModelFlops.of(model).fixed["other"] == Flops(30.0, 60.0)
