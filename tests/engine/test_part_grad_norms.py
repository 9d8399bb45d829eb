"""Gradient norms of the parts of the model, against gradients of plain torch."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest

from helpers import engines
from helpers.engines import config_of
from megatron.parallel.groups import Groups

PARTS = {
    "self_attn": "attention",
    ".experts.": "routed_experts",
    ".shared.": "shared_experts",
    ".gate.": "router",
    ".mlp.": "dense_ffn",
    "norm": "norms",
    "embed_tokens": "embedding",
}
"""Part by a piece of a parameter's name; the first match counts"""
STEPS = 2


def part(name):
    return next(value for piece, value in PARTS.items() if piece in f".{name}")


@cache
def reference(gate):
    """The norm of each part and of all in the first step, in one process."""
    model = engines.build(config_of(gate, 1, 1))
    for batch in engines.micro_batches(0, Groups()):
        out = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
        (out.loss / engines.GLOBAL_BATCH).backward()
    squares = {}
    for name, parameter in model.named_parameters():
        for value in parameter.grad.flatten().tolist():
            squares[part(name)] = squares.get(part(name), 0.0) + value * value
    norms = {name: math.sqrt(square) for name, square in squares.items()}
    return norms, math.sqrt(sum(squares.values()))


def measure(config, logged=(True,), frozen="(?!)"):
    """Train in a rank; after each step, norms of parts and of all."""
    run = engines.Run(config, frozen=frozen)
    rows = []
    try:
        for step, is_logged in enumerate(logged):
            batches = engines.micro_batches(step, run.groups)
            run.engine.step(batches, loss(), 0.02, 0.0, is_logged)
            rows.append((run.engine.part_grad_norms(), run.engine.grad_norm()))
        return rows
    finally:
        run.close()


def loss():
    from megatron.training.task import NextTokenLoss

    return NextTokenLoss()


TOPOLOGIES = [
    ("topk", 1, 1, 1, "fp32"),
    ("topk", 2, 2, 1, "fp32"),
    ("topk", 2, 2, 2, "fp32"),
    ("topk", 2, 1, 3, "fp32"),
    ("topk", 2, 2, 1, "bf16"),
    ("topk", 4, 2, 3, "fp32"),
    ("", 2, 1, 0, "fp32"),
]
MORE = [("topk", 2, 1, 1, "fp32"), ("topk", 2, 2, 3, "fp32"), ("topk", 4, 2, 1, "fp32")]
MORE += [("topk", 1, 1, stage, "fp32") for stage in (2, 3)]
MORE += [("topk", 2, 2, stage, "bf16") for stage in (2, 3)]
MORE += [("", 1, 1, 0, "fp32"), ("", 1, 1, 0, "bf16")]
TOPOLOGIES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize("gate, ranks, ep_size, stage, precision", TOPOLOGIES)
def test_parts_equal_plain_torch(gate, ranks, ep_size, stage, precision, request):
    """Clipping is undone, and no element counts twice or is missing.

    In bf16 each of about 10 roundings changes a value by up to 2^-9.
    """
    config = config_of(gate, ep_size, stage, precision)
    tolerance = 0.03 if precision == "bf16" else 2e-5
    expected, expected_norm = reference(gate)
    assert expected_norm > 2 * config.optimizer.clip_grad
    for rows in request.getfixturevalue(f"ranks{ranks}").run(measure, config):
        ((norms, norm),) = rows
        got = {name.removeprefix("grad_norm/"): value for name, value in norms.items()}
        assert got == pytest.approx(expected, rel=tolerance)
        assert math.hypot(*got.values()) == pytest.approx(norm, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_parts_are_exact_with_offloaded_optimizer(stage, ranks2, tmp_path):
    """DeepSpeed keeps the gradients that the optimizer gets in buffers of the CPU."""
    path = tmp_path / "ds.json"
    values = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    path.write_text(json.dumps(values))
    config = config_of("topk", 2, stage)
    config = replace(config, deepspeed=replace(config.deepspeed, deepspeed_config=str(path)))
    expected, _ = reference("topk")
    for ((norms, _),) in ranks2.run(measure, config):
        got = {name.removeprefix("grad_norm/"): value for name, value in norms.items()}
        assert got == pytest.approx(expected, rel=2e-5)


def test_only_logged_steps_are_measured(ranks1):
    (rows,) = ranks1.run(measure, config_of("topk", 1, 1), (False, True, False))
    assert [bool(norms) for norms, _ in rows] == [False, True, False]
    assert all(norm > 0 for _, norm in rows)


def test_parts_without_trained_weights_are_absent(ranks2):
    frozen = r"self_attn|\.gate\."
    for ((norms, _),) in ranks2.run(measure, config_of("topk", 2, 2), (True,), frozen):
        assert "grad_norm/attention" not in norms and "grad_norm/router" not in norms
        assert norms["grad_norm/routed_experts"] > 0


def _skipped(config):
    """The norms after a step that was skipped, and after the next one."""
    run = engines.Run(config)
    try:
        rows = []
        for scale in (float("nan"), 1.0):
            batches = engines.micro_batches(0, run.groups)
            for batch in batches:
                batch.loss_mask_BS.mul_(scale)
            run.engine.step(batches, loss(), 0.02, 0.0)
            rows.append(run.engine.part_grad_norms())
        return rows
    finally:
        run.close()


@pytest.mark.parametrize("gate, stage", [("", 0), ("topk", 2)])
def test_skipped_step_has_no_parts(ranks1, gate, stage):
    ((skipped, norms),) = ranks1.run(_skipped, config_of(gate, 1, stage))
    assert norms["grad_norm/attention"] > 0 and skipped == {}


def _without_support(config, path):
    path.write_text('{"zero_optimization": {"round_robin_gradients": true}}')
    deepspeed = replace(config.deepspeed, deepspeed_config=str(path))
    from megatron.engine.engine import Engine
    from megatron.log import get_logger

    messages = []
    get_logger().warning, original = lambda *args: messages.append(args), get_logger().warning
    try:
        groups = Groups()
        engine = Engine(
            engines.build(config), config.optimizer, deepspeed, config.train, groups
        )
        for _ in range(2):
            engine.step(engines.micro_batches(0, groups), loss(), 0.02, 0.0)
        return engine.part_grad_norms(), engine.grad_norm(), len(messages)
    finally:
        get_logger().warning = original


def test_option_that_moves_gradients_disables_parts(ranks1, tmp_path):
    """The run trains, with one warning, and the other metrics are there."""
    path = tmp_path / "ds.json"
    ((norms, norm, warnings),) = ranks1.run(_without_support, config_of("topk", 1, 2), path)
    assert norms == {} and norm > 0 and warnings == 1
