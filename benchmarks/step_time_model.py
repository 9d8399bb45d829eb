"""A training step against its expected time (`megatron.analysis.step_time`), on gloo ranks.

The ceilings are measured on the same ranks just before the steps. The expectation is a lower
bound: a ratio of 2 says that half of the step is not explained by matrix products, memory traffic
and communication at their ceilings. Steps are those of `Engine.step`, without data loading.

On a machine that other work shares, a step takes longer than its own work, while a ceiling is
reached in a quiet moment. So there is also the ratio of the CPU time of rank 0.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig
    from megatron.parallel.groups import Groups

RANKS = 2
VOCAB = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with topk experts, or with dense layers."""

    gate: str
    layers: int
    hidden: int
    length: int
    experts: int = 8
    topk: int = 2

    def __str__(self) -> str:
        kind = self.gate or "dense"
        return f"{kind}, L {self.layers}, D {self.hidden}, S {self.length}"


SHAPES = (
    Shape("", 4, 256, 256),
    Shape("topk", 4, 256, 256),
    Shape("topk", 4, 512, 256),
)
QUICK = (Shape("", 2, 128, 128), Shape("topk", 2, 128, 128))


def configuration(shape: Shape) -> RunConfig:
    """Return a run of a shape: bf16, ZeRO 1, experts sharded over the ranks."""
    from megatron.config.schema import (
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
    )

    model = ModelConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=4,
        seq_length=shape.length,
        vocab_size=VOCAB,
        activation="swiglu",
    )
    moe = MoEConfig()
    options = {}
    if shape.gate:
        moe = MoEConfig(
            num_experts=shape.experts,
            gate=shape.gate,
            moe_ffn_hidden_size=2 * shape.hidden,
            moe_expert_parallel_size=RANKS,
        )
        options = {shape.gate: {"topk": shape.topk}}
    return RunConfig(
        model,
        moe,
        optimizer=OptimizerConfig(bf16=True),
        train=TrainConfig(micro_batch_size=2, global_batch_size=4 * RANKS),
        gate_options=options,
    )


@dataclass(frozen=True)
class Comparison:
    """Measured and expected steps of a shape on rank 0."""

    seconds: list[float]
    """of each step"""
    cpu_seconds: list[float]
    """CPU time of each step"""
    expected: float
    """seconds"""
    text: str
    """the expectation's parts and assumptions"""


def measure(groups: Groups, shape: Shape, rounds: int) -> Comparison:
    """Measure the ceilings, then steps; all ranks call it."""
    import torch

    from megatron.analysis.ceilings import measure_ceilings
    from megatron.analysis.rank_parameters import Topology
    from megatron.analysis.step_time import memory_sections
    from megatron.data.loader import Batch
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_run_config_model
    from megatron.model.flops import ModelFlops
    from megatron.training.task import NextTokenLoss

    config = configuration(shape)
    ceilings = measure_ceilings(config, groups)
    topology = Topology(groups.world_size, groups.device.type)
    experts = float(shape.topk) if shape.gate else 0.0
    flops = ModelFlops.of(build_run_config_model(config, VOCAB))
    by_part = flops.computed(flops.use(experts))
    sections = memory_sections(
        config, VOCAB, topology, experts, flops_by_part=by_part, ceilings=ceilings
    )
    expected = sections[-1]
    model = build_run_config_model(config, VOCAB, groups)
    engine = Engine(model, config.optimizer, config.deepspeed, config.train, groups)
    generator = torch.Generator().manual_seed(groups.rank)
    batches = []
    for _ in range(2):
        ids = torch.randint(0, VOCAB, (2, shape.length + 1), generator=generator)
        mask = torch.ones(2, shape.length)
        batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, None, None))
    seconds = []
    cpu_seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        cpu_start = time.process_time()
        engine.step(batches, NextTokenLoss(), 0.0, 0.0)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return Comparison(seconds[2:], cpu_seconds[2:], expected.total_s, expected.text())


def main() -> int:
    """Compare steps with their expected time."""
    args = report.parser(__doc__).parse_args()
    rows = []
    for shape in QUICK if args.quick else SHAPES:
        rounds = 4 if args.quick else 15
        compared = report.on_ranks(RANKS, measure, shape, rounds)
        median = statistics.median(compared.seconds)
        print(f"{shape}: {median:.4g} s measured\n{compared.text}\n")
        for name, seconds in (("step", compared.seconds), ("CPU time", compared.cpu_seconds)):
            ratios = [second / compared.expected for second in seconds]
            rows.append(report.row(f"{name}, {shape}", "expected time of the step", ratios))
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
