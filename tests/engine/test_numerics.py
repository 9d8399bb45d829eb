"""Gradients and updates of every ZeRO stage and precision against plain torch, by name.

The reference computes each micro-batch's gradients in the compute precision, sums and averages them
in fp32, and updates fp32 master weights with torch's AdamW. Adam's first moment after the first
step is (1 - beta1) times the gradient, which is how the gradients are read from a checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers import engines
from megatron.config.schema import DeepSpeedConfig, MoEConfig, OptimizerConfig, RunConfig
from megatron.parallel.groups import Groups

STEPS = 3
TOLERANCE = 1e-6


def config_of(gate, ep_size, stage, precision, clip_grad=0.5, **options):
    config = engines.config_of(gate, ep_size, stage, precision)
    optimizer = replace(config.optimizer, clip_grad=clip_grad, weight_decay=0.1, **options)
    return replace(config, optimizer=optimizer)


@cache
def reference(gate, precision, clip_grad):
    """Train in plain torch; gradient norms, and tensors as in a checkpoint after each step."""
    from megatron.engine.optimizer import parameter_groups

    model = engines.build(config_of(gate, 1, 1, "fp32"))
    if precision == "bf16":
        for name, p in model.named_parameters():
            if ".gate." not in name:
                p.data = p.data.bfloat16()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    parameters = [p for group in groups for p in group["params"]]
    masters = {id(p): p.detach().float().requires_grad_() for p in parameters}
    for group in groups:
        group["params"] = [masters[id(p)] for p in group["params"]]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-3)
    norms = []
    tensors = []
    for step in range(STEPS):
        add_gradients(model, parameters, masters, step)
        norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in masters.values())))
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(masters.values(), clip_grad)
        adamw.step()
        adamw.zero_grad()
        with torch.no_grad():
            for p in parameters:
                p.copy_(masters[id(p)])
        tensors.append({})
        for p in parameters:
            state = {"weight": masters[id(p)], **adamw.state[masters[id(p)]]}
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                tensors[-1][f"{key}/{names[id(p)]}"] = state[key].detach().clone()
    return norms, tensors


def add_gradients(model, parameters, masters, step):
    for batch in engines.micro_batches(step, Groups()):
        out = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
        (out.loss / engines.GLOBAL_BATCH).backward()
        for p in parameters:
            master = masters[id(p)]
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += p.grad.float()
            p.grad = None


def train(config, steps, out):
    """Train in a rank; gradient norms and the optimizer's number of steps."""
    run = engines.Run(replace(config, checkpoint=replace(config.checkpoint, save=str(out))))
    norms = []
    try:
        for _ in range(steps):
            run.steps(1)
            norms.append(run.engine.grad_norm())
        run.save()
        return norms, run.engine.zero_shards().steps
    finally:
        run.close()


def relative_errors(got, expected):
    return {
        name: float((got[name] - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }


TOPOLOGIES = [(1, 1), (2, 1), (2, 2)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks, ep_size", TOPOLOGIES)
def test_bf16_gradients_are_reduced_in_fp32(ranks, ep_size, stage, request, tmp_path):
    """Every parameter, router included, whatever the number of ranks and the ZeRO stage."""
    pool = request.getfixturevalue(f"ranks{ranks}")
    pool.run(train, config_of("topk", ep_size, stage, "bf16", clip_grad=0.0), 1, tmp_path)
    expected = reference("topk", "bf16", 0.0)[1][0]
    expected = {name: t for name, t in expected.items() if name.startswith("exp_avg/")}
    errors = relative_errors(engines.full_tensors(tmp_path), expected)
    assert sum(".gate." in name for name in errors) == 2
    for name, error in errors.items():
        # A product over the tokens of both ranks is rounded to bf16 once, not twice.
        tolerance = 2**-8 if ep_size == 2 and ".experts." in name else TOLERANCE
        assert error <= tolerance, name


def test_bf16_reduction_rounds_gradients(ranks2, tmp_path):
    """The flag has an effect, which the test above would see."""
    config = config_of("topk", 1, 1, "bf16", clip_grad=0.0, grad_reduce_in_bf16=True)
    ranks2.run(train, config, 1, tmp_path)
    expected = reference("topk", "bf16", 0.0)[1][0]
    expected = {name: t for name, t in expected.items() if name.startswith("exp_avg/")}
    errors = relative_errors(engines.full_tensors(tmp_path), expected)
    assert min(errors.values()) > 1e-4
    assert max(errors.values()) < 2**-7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "gate, ranks, stage",
    [
        ("", 1, 0),
        ("", 2, 0),
        ("", 2, 1),
        ("", 2, 2),
        ("", 2, 3),
        ("topk", 1, 1),
        ("topk", 1, 2),
        ("topk", 1, 3),
        ("topk", 2, 1),
        ("topk", 2, 2),
        ("topk", 2, 3),
    ],
)
def test_updates_equal_plain_adamw(gate, ranks, stage, precision, request, tmp_path):
    """Weights, moments, gradient norms and the number of steps.

    Clipping changes the last bits of fp32 weights, which after rounding to bf16 can grow with every
    step; it is compared in the first step only.
    """
    pool = request.getfixturevalue(f"ranks{ranks}")
    for steps, clip_grad in ((1, 0.5), (STEPS, 0.0)):
        norms, tensors = reference(gate, precision, clip_grad)
        assert norms[0] > 0.5, "clipping must have an effect"
        out = tmp_path / str(steps)
        config = config_of(gate, 1, stage, precision, clip_grad)
        for got_norms, counted in pool.run(train, config, steps, out):
            assert got_norms == pytest.approx(norms[:steps], rel=1e-5)
            assert counted == steps
        errors = relative_errors(engines.full_tensors(out), tensors[steps - 1])
        assert max(errors.values()) <= 1e-5, errors


def gate_dtypes_after_a_step(config):
    run = engines.Run(config)
    try:
        run.steps(1)
        weights = run.local_weights()
        return {name: w.dtype for name, w in weights.items() if ".gate." in name}
    finally:
        run.close()


def test_zero3_with_offloaded_parameters_has_one_dtype(ranks1, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"offload_param": {"device": "cpu"}}}')
    config = config_of("topk", 1, 3, "bf16")
    config = replace(config, deepspeed=replace(config.deepspeed, deepspeed_config=str(path)))
    dtypes = ranks1.run(gate_dtypes_after_a_step, config)[0]
    assert set(dtypes.values()) == {torch.bfloat16}


def new_engine(config):
    run = engines.Run(config)
    try:
        return run.engine.grad_norm(), run.engine.zero_shards().steps
    finally:
        run.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_known_before_the_first_step(stage, precision, ranks1):
    grad_norm, steps = ranks1.run(new_engine, config_of("", 1, stage, precision))[0]
    assert grad_norm is None
    assert steps == 0


def test_fp16_without_zero_is_refused():
    message = "--zero-stage is 0; allowed: 1, 2 or 3 with --fp16. DeepSpeed scales the loss"
    with pytest.raises(ValueError, match=message):
        RunConfig(
            moe=MoEConfig(),
            optimizer=OptimizerConfig(fp16=True),
            deepspeed=DeepSpeedConfig(zero_stage=0),
        )
