"""Training steps with routing metrics against `--no-routing-metrics`.

The demo model (examples_deepspeed/MoE/demo.sh): two gloo ranks with one thread each, bf16,
ZeRO 1, experts sharded over both, a log line every 10 steps. A round takes four steps in
turn, one of each kind:

    an ordinary step, and one that ends with a log line, with and without routing metrics

An ordinary step keeps the loads of the step, which it has counted anyway. A logged step
also measures the details of its routings and the gradient norms of the parts, and reduces
everything over the ranks. The bar is for the mean step of an interval: nine ordinary steps
and a logged one. The console and files are left out. The same ratio of rank 0's CPU time
varies less on a machine that is shared with other work.

Learning rates are 0, so that the routing stays the same.

What it should cost, per MoE layer and micro-batch of a logged step, with T tokens, C
choices, A assignments and D hidden: two passes over [T, D] (norms of rows), about four over
[T, C] (entropies) and three more (a copy without the selected scores, and its maxima), a few
over [A] and [T], and a histogram of 16,384 values. Per logged step one pass over this rank's
gradients. Below the ratios is what the first of these takes alone.
"""

from __future__ import annotations

import statistics
import sys
import time
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
    details: float
    """the details of all layers of one step"""


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
    return Measured(wall, cpu, details_seconds(engines[True], batch, step))


def details_seconds(engine, batch, step) -> float:
    """Return the median seconds of the details of all layers in one step."""
    from megatron.moe.layer_counters import add_counts
    from megatron.moe.routing_details import detail_counts

    routings = []
    for layer in engine.metrics.layers:
        layer.routing_observer = lambda *seen, layer=layer: routings.append((layer, *seen))
    step(True, False)
    for layer in engine.metrics.layers:
        layer.routing_observer = None
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for layer, inp, routing, _plan in routings:
            add_counts({}, detail_counts(layer.gate, inp, routing))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
    print(f"{'details of all layers':24s} {1000 * measured.details:8.1f} ms per logged step\n")
    interval = f"interval of {INTERVAL} steps"
    rows = [report.row(interval, OFF, interval_ratios(measured.wall), BAR)]
    rows.append(report.row(f"{interval}, CPU time", OFF, interval_ratios(measured.cpu)))
    for name, baseline in ((ON, OFF), (ON_LOGGED, OFF_LOGGED)):
        cpu = {baseline: measured.cpu[baseline], f"{name}, CPU time": measured.cpu[name]}
        rows += report.compare(cpu, baseline)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
