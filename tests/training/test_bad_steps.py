"""A NaN or infinite loss or gradient skips the step on every rank, at every ZeRO stage."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron.config.schema import (
    DeepSpeedConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron.training.task import NextTokenLoss

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=8,
    ffn_hidden_size=24,
    init_method_std=0.3,
)
VOCAB = 64
LR = 0.02


class _Infinite(torch.autograd.Function):
    """The same forward; one infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[:1] = float("inf")
        return grad


class FaultInjector:
    """Makes a loss or gradients of forward and backward passes infinite while `kind` is set."""

    def __init__(self, model):
        self.kind = ""
        model.register_forward_hook(self._of_model)
        model.layers[0].mlp.register_forward_hook(self._of_ffn)
        if hasattr(model.layers[0].mlp, "experts"):
            model.layers[0].mlp.experts.w1.register_hook(self._of_expert)

    def _of_model(self, module, args, out):
        """Gradients stay what they were."""
        if self.kind == "loss":
            return out._replace(lm_loss_sum=out.lm_loss_sum + float("inf"))
        return out

    def _of_ffn(self, module, args, out):
        return replace(out, y=_Infinite.apply(out.y)) if self.kind == "gradient" else out

    def _of_expert(self, grad):
        return grad * float("nan") if self.kind == "expert" else None


class FaultyTask(NextTokenLoss):
    """Next-token prediction with a fault in the first micro-batch of a step on rank 1."""

    def __init__(self, injector: FaultInjector, fault: str):
        self.injector = injector
        self.fault = fault
        self.micro_batches = 0

    def loss_sums(self, model, batch, progress):
        first = self.micro_batches == 0
        self.micro_batches += 1
        self.injector.kind = self.fault if first and dist.get_rank() == 1 else ""
        return super().loss_sums(model, batch, progress)


def batches(step: int, rank: int):
    from megatron.data.loader import Batch

    g = torch.Generator().manual_seed(100 * step + rank)
    for _ in range(2):
        ids = torch.randint(0, VOCAB, (1, 9), generator=g)
        yield Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 8))


def state(engine) -> dict[str, torch.Tensor]:
    """Return everything that a step may change: weights, master weights, Adam's state, buffers."""
    tensors = {
        f"weight {n}": getattr(p, "ds_tensor", p) for n, p in engine.model.named_parameters()
    }
    tensors |= {f"buffer {n}": b for n, b in engine.model.named_buffers()}
    for i, (param, moments) in enumerate(engine._optimizer.state.items()):
        tensors |= {
            f"master {i}": param,
            **{f"{key} {i}": value for key, value in moments.items()},
        }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _train(stage: int, bf16: bool, experts: int, steps: list[int | str]):
    """Return the state after each step, in a rank; a step that is a name has this fault."""
    from megatron.engine import distributed as parallel
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model

    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    groups = parallel.init_distributed(2 if experts else 1)
    moe = (
        MoEConfig(
            num_experts=experts,
            gate="deepseek_v3",
            moe_ffn_hidden_size=8,
            moe_expert_parallel_size=groups.ep_size,
        )
        if experts
        else MoEConfig()
    )
    model = build_model(MODEL, moe, {}, vocab_size=VOCAB, seed=7, groups=groups)
    injector = FaultInjector(model)
    engine = Engine(
        model,
        OptimizerConfig(bf16=bf16, clip_grad=0.5),
        DeepSpeedConfig(zero_stage=stage),
        TrainConfig(micro_batch_size=1, global_batch_size=4),
        groups,
    )
    states = []

    for step in steps:
        fault = step if isinstance(step, str) else ""
        task = FaultyTask(injector, fault)
        engine.step(batches(1 if fault else step, rank), task, LR, 0.0)
        states.append((engine.skipped_steps, state(engine)))
    return states


@pytest.mark.parametrize(
    "stage, bf16, experts",
    [
        (0, False, 0),
        (0, True, 0),
        *[(stage, bf16, 4) for stage in (1, 2, 3) for bf16 in (False, True)],
    ],
)
def test_skipped_step_changes_no_state(stage, bf16, experts, ranks2):
    """After skipped steps the state is that before them, after a good one that without them."""
    bad = ["loss", "gradient", *(["expert"] if experts else [])]
    faulty = ranks2.run(_train, stage, bf16, experts, [0, *bad, 2])
    clean = ranks2.run(_train, stage, bf16, experts, [0, 2])
    for states, ((none, before), (_, end)) in zip(faulty, clean, strict=True):
        assert any("exp_avg " in name for name in before) and none == 0
        assert not experts or any("expert_bias" in name for name in before)
        assert [skipped for skipped, _ in states] == [0, *range(1, len(bad) + 1), len(bad)]
        assert not all(torch.equal(t, before[name]) for name, t in end.items())
        for (_, got), expected in zip(states, [before, *[before] * len(bad), end], strict=True):
            assert got.keys() == expected.keys()
            for name, tensor in got.items():
                assert torch.equal(tensor, expected[name]), name
