"""The cost of sharding experts: our layer on two ranks against itself with all experts local.

Two gloo ranks of one thread each run forward and backward in bf16, each with its own tokens; a
step ends when both ranks are done. The peer is DeepSpeed's native layer with the same sharding,
which exchanges padded buffers [E, C, D], where C is the number of rows of the fullest expert on
any rank. "Alone" is a single exchange without computation: of sorted rows, and of the padded
buffers. All of it is measured once with balanced routing and once with skewed routing. Below the
ratios are the bytes sent per token and rank 0's time by part.

Outputs and input gradients are compared with those of the unsharded layer before anything is
timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

if TYPE_CHECKING:
    import torch.distributed as dist

    from benchmarks.moe_peers import Layer, Problem
    from megatron.parallel.groups import Groups

RANKS = 2
SKEWS = {"even": 0.0, "skewed": 0.5}
TOLERANCE = 0.03
PROFILED_STEPS = 3
# (tokens of a rank, hidden, experts, width, experts per token), by --quick
SIZES = {
    False: ((4096, 1024, 64, 512, 8), (2048, 512, 8, 1024, 2)),
    True: ((256, 128, 16, 64, 4),),
}
UNSHARDED = "not sharded"
SHARDED = "sharded"
PADDED = "DeepSpeed, sharded"
# An operation belongs to the first part with a word in the operation's name. Forward copies rows
# to send and to run experts, and sums them to combine; backward does the reverse.
PARTS = {
    "gate and plan": (
        "topk",
        "softmax",
        "sort",
        "cumsum",
        "scatter",
        "repeat_interleave",
        "where",
        "bincount",
    ),
    "summing rows": ("embedding_bag",),
    "copying rows": ("index", "gather", "cat", "copy_"),
    "matrix products": ("mm", "linear"),
}
GLOO_PARTS = {"gloo:all_to_all": "exchanges", "gloo:barrier": "waiting at the end"}
OTHER = "the rest"


def synchronised(step: Callable[[], None], group: dist.ProcessGroup) -> Callable[[], None]:
    """Return the step followed by a barrier."""
    import torch.distributed as dist

    def run() -> None:
        step()
        dist.barrier(group)

    return run


def check(layers: dict[str, Layer], problem: Problem) -> None:
    """Raise RuntimeError unless all layers compute what the unsharded one does."""
    expected = layers[UNSHARDED].results(problem)
    for name, layer in layers.items():
        for a, b in zip(layer.results(problem)[:2], expected[:2], strict=True):
            error = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{name} computes something else: its relative error is {error:.3f}, "
                    f"allowed {TOLERANCE}"
                )


def make_exchanges(
    problem: Problem, groups: Groups
) -> tuple[dict[str, Callable[[], None]], float]:
    """Return exchanges of sorted rows and of padded buffers, and the fullest expert's load.

    The exchanges go one way, and the load is relative to the mean over ranks and experts.
    """
    import torch
    import torch.distributed as dist

    from benchmarks import moe_peers as peers

    size = problem.size
    rank = groups.rank
    load_PE = torch.zeros(RANKS, size.experts, dtype=torch.int64)
    load_PE[rank] = torch.tensor(peers.loads(problem))
    dist.all_reduce(load_PE)
    rows_PP = load_PE.view(RANKS, RANKS, -1).sum(-1)  # by source and destination rank
    input_splits = rows_PP[rank].tolist()
    output_splits = rows_PP[:, rank].tolist()
    fullest = int(load_PE.max())
    sent = problem.x_TD.new_ones(sum(input_splits), size.hidden)
    received = problem.x_TD.new_ones(sum(output_splits), size.hidden)
    padded_sent = problem.x_TD.new_ones(size.experts * fullest, size.hidden)
    padded_received = torch.ones_like(padded_sent)

    def exchange_rows() -> None:
        dist.all_to_all_single(received, sent, output_splits, input_splits)

    def exchange_padded() -> None:
        dist.all_to_all_single(padded_received, padded_sent)

    exchanges = {"sorted rows alone": exchange_rows, "padded buffers alone": exchange_padded}
    return exchanges, fullest / float(load_PE.float().mean())


def bytes_to_others(step: Callable[[], None], group: dist.ProcessGroup) -> tuple[int, int]:
    """Count the bytes that this rank sends to other ranks in a step, and the exchanges.

    They are counted at torch's own operator.
    """
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    sent = []

    class CountBytes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d" and "alltoall_base" in func.name():
                rows = args[1]
                splits = args[4] or [len(rows) // RANKS] * RANKS
                rows_to_others = len(rows) - splits[dist.get_rank(group)]
                sent.append(rows_to_others * rows[:1].nbytes)
            return func(*args, **(kwargs or {}))

    with CountBytes():
        step()
    return sum(sent), len(sent)


def profile_parts(step: Callable[[], None]) -> dict[str, float]:
    """Measure the milliseconds of a step by part, on this rank.

    The time of exchanges includes waiting for the other rank.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    parts = dict.fromkeys([*PARTS, *GLOO_PARTS.values(), OTHER], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        if name in GLOO_PARTS:  # runs in gloo's own thread, while this one waits
            parts[GLOO_PARTS[name]] += event.cpu_time_total / 1000 / PROFILED_STEPS
        else:
            parts[part_of(name)] += event.self_cpu_time_total / 1000 / PROFILED_STEPS
    return parts


def part_of(operation: str) -> str:
    """Return the part that an operation belongs to."""
    for part, words in PARTS.items():
        if any(word in operation for word in words):
            return part
    return OTHER


def measure(groups: Groups, cases: list[tuple], rounds: int) -> list[dict[str, Any]]:
    """Measure every case, a size and a kind of routing; the report uses rank 0's results."""
    return [measure_case(groups, shape, SKEWS[kind], rounds) for shape, kind in cases]


def measure_case(
    groups: Groups, shape: tuple[int, ...], skew: float, rounds: int
) -> dict[str, Any]:
    """Measure times, parts and bytes of one case on this rank."""
    import torch

    from benchmarks import moe_peers as peers

    problem = peers.Problem.draw(
        peers.Size(*shape), "swiglu", torch.device("cpu"), groups.rank, skew
    )
    layers = {
        UNSHARDED: peers.ours(problem),
        SHARDED: peers.ours(problem, groups=groups),
        PADDED: peers.deepspeed_moe(problem, groups),
    }
    check(layers, problem)
    steps = {
        name: synchronised(layer.step(problem), groups.ep_group)
        for name, layer in layers.items()
    }
    exchanges, fullest = make_exchanges(problem, groups)
    seconds = report.interleave({**steps, **exchanges}, rounds, warmup=2)
    return {
        "seconds": seconds,
        "fullest": fullest,
        "parts": {name: profile_parts(step) for name, step in steps.items()},
        "sent": {name: bytes_to_others(step, groups.ep_group) for name, step in steps.items()},
    }


def print_parts(result: dict[str, Any], tokens: int) -> None:
    """Print a table of one case: time by part, bytes and exchanges of each layer."""
    names = list(result["parts"])
    medians = [1000 * statistics.median(result["seconds"][name]) for name in names]
    sent = [result["sent"][name] for name in names]
    print_row("", names)
    print_row("ms per step, median", [f"{value:.1f}" for value in medians])
    for part in result["parts"][SHARDED]:
        times = [result["parts"][name][part] for name in names]
        print_row(f"{part}, profiled", [f"{value:.1f}" for value in times])
    print_row(
        "KB to the other rank per token",
        [f"{num_bytes / tokens / 1000:,.1f}" for num_bytes, _ in sent],
    )
    print_row("exchanges per step", [f"{exchanges:,.1f}" for _, exchanges in sent])


def print_row(title: str, cells: list[str]) -> None:
    """Print a row of a table in columns of equal width."""
    print(f"{title:32s}" + "".join(f"{cell:>20s}" for cell in cells))


def report_case(shape: tuple[int, ...], kind: str, result: dict[str, Any]) -> list[report.Row]:
    """Print the parts of one case and return its ratios."""
    from benchmarks.moe_layer import labelled
    from benchmarks.moe_peers import Size

    size = Size(*shape)
    print(
        f"\n{size} on each of {RANKS} ranks, {kind}: the fullest expert has "
        f"{result['fullest']:.2f} times the mean"
    )
    print_parts(result, size.tokens)
    seconds = result["seconds"]
    layers = {name: seconds[name] for name in (UNSHARDED, SHARDED, PADDED)}
    sharded = {name: seconds[name] for name in (SHARDED, PADDED)}
    exchanges = {name: values for name, values in seconds.items() if name not in layers}
    return labelled(
        f"{size.label} {kind}",
        [
            *report.compare(layers, UNSHARDED),
            *report.compare(sharded, PADDED),
            *report.compare(exchanges, "padded buffers alone"),
        ],
    )


def main() -> int:
    """Run the benchmark; return the exit code."""
    args = report.parser(__doc__).parse_args()
    cases = []
    for shape in SIZES[args.quick]:
        cases += [(shape, kind) for kind in SKEWS]
    results = report.on_ranks(RANKS, measure, cases, 3 if args.quick else 15)
    rows = []
    for (shape, kind), result in zip(cases, results, strict=True):
        rows += report_case(shape, kind, result)
    print()
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
