"""A gate's state under the engine: DeepSeek-V3's bias in every precision and ZeRO stage."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from helpers import engines
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.schema import (
    DeepSpeedConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron.parallel.groups import Groups
from megatron.training.task import NextTokenLoss

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=8,
    activation="swiglu",
    ffn_hidden_size=24,
    init_method_std=0.3,
)
EXPERTS, SPEED, STEPS, VOCAB = 4, 0.07, 3, 64
# DeepSpeed 0.19.8 leaves buffers alone unless a user's --deepspeed_config says otherwise.
CAST_BUFFERS = {"data_types": {"buffer_dtype": "bf16"}}


def build(groups, seed=7):
    from megatron.model.builder import build_model

    moe = MoEConfig(
        num_experts=EXPERTS,
        gate="deepseek_v3",
        moe_ffn_hidden_size=8,
        moe_shared_experts=1,
        moe_expert_parallel_size=groups.ep_size,
    )
    options = {"deepseek_v3": {"bias_update_speed": SPEED}}
    return build_model(MODEL, moe, options, vocab_size=VOCAB, seed=seed, groups=groups)


def make_engine(groups, stage, precision, deepspeed_config, seed=7, source=None):
    from megatron.engine.engine import Engine

    optimizer = OptimizerConfig(
        bf16=precision == "bf16",
        lr=0.02,
        adam_eps=1e-2,
    )
    ds_options = DeepSpeedConfig(zero_stage=stage, deepspeed_config=deepspeed_config)
    train = TrainConfig(micro_batch_size=1, global_batch_size=2 * groups.world_size)
    model = build(groups, seed)
    if source:
        assert not any(
            gate.expert_bias.any() for gate in (block.mlp.gate for block in model.layers)
        )
        source.load_weights(model, groups)
    return Engine(model, optimizer, ds_options, train, groups)


def micro_batches(step, rank):
    """Return this rank's two micro-batches of a step; every rank has different tokens."""
    from megatron.data.loader import Batch

    g = torch.Generator().manual_seed(100 * step + rank)
    for _ in range(2):
        ids = torch.randint(0, VOCAB, (1, 9), generator=g)
        yield Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 8), None, None)


def gates_of(engine):
    return [m.gate for m in engine.metrics.layers]


def biases(engine):
    return [gate.expert_bias.detach().clone() for gate in gates_of(engine)]


def count_loads(engine):
    """A list per layer that grows by the load of every training forward on this rank."""
    loads = [[] for _ in gates_of(engine)]
    for gate, seen in zip(gates_of(engine), loads, strict=True):

        def hook(module, inputs, out, seen=seen):
            if module.training:
                seen.append(torch.bincount(out.expert_A, minlength=EXPERTS))

        gate.register_forward_hook(hook)
    return loads


def _run(stage, precision, deepspeed_config, folder):
    """Train, evaluate, save and train on in a rank, and resume in a second engine."""
    from megatron.checkpoint import loader
    from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
    from megatron.checkpoint.saver import Checkpointer
    from megatron.engine import distributed as parallel

    os.environ.update(
        RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    groups = parallel.init_distributed(min(2, dist.get_world_size()))
    engine = make_engine(groups, stage, precision, deepspeed_config)
    answer = {
        "start": biases(engine),
        "after": [],
        "weights": next(iter(engine.model.parameters())).dtype,
    }
    loads = count_loads(engine)
    for step in range(STEPS):
        engine.step(micro_batches(step, groups.rank), NextTokenLoss(), 0.02, 0.0)
        answer["after"].append(biases(engine))
    answer["loads"] = loads
    engine.evaluate(micro_batches(50, groups.rank), NextTokenLoss(), 0.0)
    answer["evaluated"] = biases(engine)
    topology = {
        "ranks": groups.world_size,
        "expert_parallel_size": groups.ep_size,
        "zero_stage": stage,
        "precision": precision,
    }
    record = RunMetadata(RunConfig(), engines.IDENTITY, topology)
    with Checkpointer(CheckpointConfig(save=folder), engine, record, groups) as checkpoints:
        checkpoints.save(TrainingProgress(iteration=STEPS))
    engine.step(micro_batches(STEPS, groups.rank), NextTokenLoss(), 0.02, 0.0)
    answer["went_on"] = biases(engine)
    source = loader.find_checkpoint(CheckpointConfig(load=folder), groups)
    resumed = make_engine(groups, stage, precision, deepspeed_config, seed=8, source=source)
    assert source.restore(resumed, groups).iteration == STEPS
    answer["loaded"] = biases(resumed)
    resumed.step(micro_batches(STEPS, groups.rank), NextTokenLoss(), 0.02, 0.0)
    answer["resumed"] = biases(resumed)
    return answer


@pytest.mark.parametrize(
    "precision, cast_buffers", [("fp32", False), ("bf16", False), ("bf16", True)]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bias_is_trained_and_restored(stage, precision, cast_buffers, ranks2, tmp_path):
    """The bias is fp32, equal on all ranks, updated from summed loads, saved and restored.

    Errors that this would show: a bias rounded to bf16 (0.07 is not a bf16 number), an update
    per rank, per micro-batch or in evaluation, and a buffer missing from the checkpoint.
    """
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(CAST_BUFFERS if cast_buffers else {}))
    answers = ranks2.run(_run, stage, precision, str(config), str(tmp_path))
    for a in answers:
        assert a["weights"] == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert all(
            b.dtype == torch.float32
            for b in [*a["start"], *a["after"][-1], *a["loaded"], *a["resumed"]]
        )
    for layer in range(MODEL.num_layers):
        bias = torch.zeros(EXPERTS)
        for step in range(STEPS):
            mine = [a["loads"][layer][2 * step : 2 * step + 2] for a in answers]
            load = sum(sum(two) for two in mine)
            assert load.sum() == 2 * 2 * 8 * 2, "ranks x micro-batches x tokens x topk"
            bias = bias + SPEED * torch.sign(load.double().mean() - load).float()
            for a in answers:
                torch.testing.assert_close(a["after"][step][layer], bias, rtol=0, atol=1e-6)
        assert bias.any() and not torch.equal(bias, bias.bfloat16().float())
        for a in answers:
            after = a["after"][-1][layer]
            assert torch.equal(after, answers[0]["after"][-1][layer]), "ranks differ"
            assert torch.equal(a["evaluated"][layer], after), "an evaluation moved it"
            assert torch.equal(a["loaded"][layer], after), "the checkpoint lost it"
            assert torch.equal(a["resumed"][layer], a["went_on"][layer])
            assert not torch.equal(a["went_on"][layer], after)


def test_loads_differ_between_ranks():
    """The test above would show an update from the loads of one rank or micro-batch only."""
    model = build(Groups())
    loads = []
    model.layers[0].mlp.gate.register_forward_hook(
        lambda module, inputs, out: loads.append(
            torch.bincount(out.expert_A, minlength=EXPERTS)
        )
    )
    for rank in range(2):
        for b in micro_batches(0, rank):
            model(b.tokens_BS, b.labels_BS, b.loss_mask_BS)

    def sign(load):
        return torch.sign(load.double().mean() - load)

    full = sign(sum(loads))
    assert not torch.equal(sign(loads[0] + loads[1]), full) or not torch.equal(
        sign(loads[2] + loads[3]), full
    )
    assert not torch.equal(sum(sign(load) for load in loads), full)


def _skip(stage, precision):
    """Run a step with an infinite gradient and a normal one; return the state after each."""
    from megatron.engine import distributed as parallel

    os.environ.update(
        RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    groups = parallel.init_distributed(min(2, dist.get_world_size()))
    engine = make_engine(groups, stage, precision, "")
    infinite = next(p for n, p in engine.model.named_parameters() if "o_proj" in n)
    hook = infinite.register_hook(lambda grad: grad * float("inf"))
    states = []
    for step in range(2):
        engine.step(micro_batches(step, groups.rank), NextTokenLoss(), 0.02, 0.0)
        hook.remove()
        states.append(
            (
                engine.skipped_steps,
                biases(engine),
                [dict(m.step_sums) for m in engine.metrics.layers],
            )
        )
    return states


@pytest.mark.parametrize("stage", [1, 2])
def test_a_skipped_step_moves_no_state(stage, ranks2):
    for (skipped, bias, sums), (still, moved, _) in ranks2.run(_skip, stage, "bf16"):
        assert skipped == still == 1
        assert all(not b.any() for b in bias) and all(s == {} for s in sums), (
            "and leaves no counts behind"
        )
        assert all(b.any() for b in moved)
