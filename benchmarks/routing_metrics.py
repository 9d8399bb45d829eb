"""Training steps with routing metrics against `--no-routing-metrics`.

The demo model (examples_deepspeed/MoE/demo.sh): two gloo ranks with one thread each, bf16,
ZeRO 1, experts sharded over both, a log line every 10 steps. A round takes four steps in
turn, one of each kind:

    an ordinary step, and one that ends with a log line, with and without routing metrics

An ordinary step keeps the loads of the step, which it has counted anyway. A logged step
also measures the details of its routings and the gradient norms of the parts, and reduces
everything over the ranks. The bar is for the mean step of an interval: nine ordinary steps
and a logged one. The console and files are left out.

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


def measure(groups, rounds: int) -> tuple[dict[str, list[float]], float]:
    """On a rank: return the seconds of each kind of step by round, and those that the details
    of all layers of a step take."""
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

    steps = {
        ON: partial(step, True, False),
        OFF: partial(step, False, False),
        ON_LOGGED: partial(step, True, True),
        OFF_LOGGED: partial(step, False, True),
    }
    seconds = report.interleave(steps, rounds)
    return seconds, details_seconds(engines[True], batch, step)


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
    seconds, details = report.on_ranks(train_step.RANKS, measure, rounds)
    for name, values in seconds.items():
        print(f"{name:24s} {1000 * statistics.median(values):8.1f} ms per step")
    print(f"{'details of all layers':24s} {1000 * details:8.1f} ms per logged step\n")
    rows = [
        report.row(f"interval of {INTERVAL} steps", OFF, interval_ratios(seconds), BAR),
        *report.compare({OFF: seconds[OFF], ON: seconds[ON]}, OFF),
        *report.compare({n: seconds[n] for n in (OFF_LOGGED, ON_LOGGED)}, OFF_LOGGED),
    ]
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
