"""Training steps with routing metrics against `--no-routing-metrics`.

The demo model (examples_deepspeed/MoE/demo.sh): two gloo ranks with one thread each, bf16,
ZeRO 1, experts sharded over both, a log line every 10 steps. A round takes four steps in
turn, one of each kind:

    an ordinary step, and one that ends with a log line, with and without routing metrics

An ordinary step keeps the loads of the step, which it has counted anyway. A logged step
also measures the details of its routings and the gradient norms of the parts, and reduces
everything over the ranks. The bar is for the mean step of an interval: nine ordinary steps
and a logged one. The console and files are left out. On a machine that is shared with other
work these times vary by more than the bar. So what a logged step does in addition is also
measured alone, in CPU time of rank 0: an interval's ratio is then 1 + cost / (10 steps).

Learning rates are 0, so that the routing stays the same.

What it should cost, per MoE layer and micro-batch of a logged step, with T tokens, C
choices, A assignments and D hidden: two passes over [T, D] (norms of rows), about four over
[T, C] (entropies) and three more (a copy without the selected scores, and its maxima), a few
over [A] and [T], and a histogram of 16,384 values. Per logged step one pass over this rank's
gradients.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, train_step

INTERVAL = 10
BAR = 1.01
ROUNDS = 60
QUICK_ROUNDS = 8
ON = "with metrics"
ON_LOGGED = "with metrics, logged"
OFF = "without"
OFF_LOGGED = "without, logged"


@dataclass(frozen=True)
class Measured:
    """What a rank measured, in seconds."""

    wall: dict[str, list[float]]
    """each kind of step, by round"""
    cpu: dict[str, list[float]]
    """the same in CPU time of this rank's process"""
    alone: dict[str, list[float]]
    """CPU time of what a logged step does in addition, by part and repetition"""


def measure(groups, rounds: int) -> Measured:
    """Measure on a rank."""
    from megatron.config.schema import DeepSpeedConfig
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model
    from megatron.training.task import NextTokenLoss

    batch = train_step.make_batch(8, 256, train_step.VOCAB, seed=groups.rank)
    model, moe, optimizer, train = train_step.configs()
    options = {"threshold": {"threshold": train_step.THRESHOLD}}
    engines = {}
    for enabled in (True, False):
        gpt = build_model(
            model, moe, options, vocab_size=train_step.VOCAB, seed=0, groups=groups
        )
        engines[enabled] = Engine(
            gpt, optimizer, DeepSpeedConfig(), train, groups, routing_metrics=enabled
        )

    def step(enabled: bool, logged: bool) -> None:
        engine = engines[enabled]
        engine.step([batch], NextTokenLoss(), 0.0, 0.0, logged)
        if logged:
            engine.part_grad_norms()
            engine.metrics.read()

    kinds = {
        ON: (True, False),
        OFF: (False, False),
        ON_LOGGED: (True, True),
        OFF_LOGGED: (False, True),
    }
    cpu: dict[str, list[float]] = {name: [] for name in kinds}

    def timed_step(name: str) -> None:
        start = time.process_time()
        step(*kinds[name])
        cpu[name].append(time.process_time() - start)

    steps = {name: partial(timed_step, name) for name in kinds}
    wall = report.interleave(steps, rounds, warmup=1)
    cpu = {name: values[-rounds:] for name, values in cpu.items()}
    return Measured(wall, cpu, costs_alone(engines, batch, rounds))


def costs_alone(engines: dict, batch, rounds: int) -> dict[str, list[float]]:
    """Measure the parts of a logged step that ordinary steps do not have, on their own."""
    from megatron.moe.layer_counters import add_counts
    from megatron.moe.routing_details import detail_counts
    from megatron.training.task import NextTokenLoss

    engine = engines[True]
    norms = engine._part_grad_norms
    routings = []
    costs: dict[str, list[float]] = {"details": [], "gradient norms": [], "reading": []}

    def timed(part: str, function: Callable[[], object]) -> None:
        start = time.process_time()
        function()
        costs[part].append(time.process_time() - start)

    def measure_details() -> None:
        for layer, inp, routing, _plan in routings:
            add_counts({}, detail_counts(layer.gate, inp, routing))

    def measure_norms(optimizer, args, kw) -> None:
        # ZeRO calls the optimizer once per group: their sum is the cost of a step.
        timed("gradient norms", partial(norms._before_optimizer, optimizer, args, kw))

    def read() -> None:
        engine.part_grad_norms()
        engine.metrics.read()

    for layer in engine.metrics.layers:
        layer.routing_observer = lambda *seen, layer=layer: routings.append((layer, *seen))
    hook = engine._optimizer.register_step_pre_hook(measure_norms)
    for _ in range(rounds):
        routings.clear()
        calls = len(costs["gradient norms"])
        engine.step([batch], NextTokenLoss(), 0.0, 0.0, True)
        costs["gradient norms"][calls:] = [sum(costs["gradient norms"][calls:])]
        timed("details", measure_details)
        timed("reading", read)
    hook.remove()
    return costs


def interval_ratios(seconds: dict[str, list[float]]) -> list[float]:
    """Return by round the time of an interval with metrics over that without."""
    ratios = []
    rounds = zip(*(seconds[name] for name in (ON, ON_LOGGED, OFF, OFF_LOGGED)), strict=True)
    for on, on_logged, off, off_logged in rounds:
        with_metrics = (INTERVAL - 1) * on + on_logged
        ratios.append(with_metrics / ((INTERVAL - 1) * off + off_logged))
    return ratios


def main() -> int:
    args = report.parser(__doc__).parse_args()
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    measured = report.on_ranks(train_step.RANKS, measure, rounds)
    for name, values in measured.wall.items():
        cpu = statistics.median(measured.cpu[name])
        print(
            f"{name:24s} {1000 * statistics.median(values):8.1f} ms per step, "
            f"{1000 * cpu:8.1f} ms of CPU time"
        )
    for part, values in measured.alone.items():
        print(
            f"{part:24s} {1000 * statistics.median(values):8.1f} ms of CPU time per logged step"
        )
    print()
    interval = f"interval of {INTERVAL} steps"
    rows = [report.row(interval, OFF, interval_ratios(measured.wall), BAR)]
    rows.append(report.row(f"{interval}, CPU time", OFF, interval_ratios(measured.cpu)))
    costs = [sum(parts) for parts in zip(*measured.alone.values(), strict=True)]
    ratios = [
        1 + cost / (INTERVAL * step)
        for cost, step in zip(costs, measured.cpu[OFF], strict=True)
    ]
    rows.append(report.row(f"{interval}, from costs alone", OFF, ratios, BAR))
    for name, baseline in ((ON, OFF), (ON_LOGGED, OFF_LOGGED)):
        cpu = {baseline: measured.cpu[baseline], f"{name}, CPU time": measured.cpu[name]}
        rows += report.compare(cpu, baseline)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
