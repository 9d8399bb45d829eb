"""What sharding the experts costs: our layer on two ranks against itself with all experts on every rank.

Two gloo ranks of one thread each, bf16, forward and backward, each rank with tokens of its own; a step ends when both
ranks are done. Beside it DeepSpeed's native layer, sharded the same way, which exchanges padded buffers: [E, C, D] with
C the rows of the fullest expert on any rank. "Alone" are one exchange each without anything around it: of sorted rows
as they are, and of the padded buffers. All that once with about as many rows for every expert and once with experts
that are not equally popular. Below the ratios stand the bytes that a token costs, and where rank 0's time goes.

Outputs and the gradients of inputs are compared with those of the unsharded layer before anything is timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

RANKS, SKEWS, TOLERANCE, PROFILED = 2, {"even": 0.0, "skewed": 0.5}, 0.03, 3
SIZES = {  # (tokens of a rank, hidden, experts, width, experts per token)
    False: ((4096, 1024, 64, 512, 8), (2048, 512, 8, 1024, 2)),
    True: ((256, 128, 16, 64, 4),),
}
WHOLE, SHARDED, PADDED = "not sharded", "sharded", "DeepSpeed, sharded"
PARTS = {  # the first part one of whose words is in an operation's name. Forward copies rows to send and to experts and
    # sums them to combine; backward does both the other way round
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
GLOO = {"gloo:all_to_all": "exchanges", "gloo:barrier": "waiting at the end"}


def synchronised(step: Callable[[], None], group) -> Callable[[], None]:
    """`step`, until all ranks have done it."""
    import torch.distributed as dist

    def whole() -> None:
        step()
        dist.barrier(group)

    return whole


def check(layers: dict, problem) -> None:
    """RuntimeError unless all layers compute what the first one does."""
    expected = layers[WHOLE].results(problem)
    for name, layer in layers.items():
        for a, b in zip(layer.results(problem)[:2], expected[:2], strict=True):
            off = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
            if not off <= TOLERANCE:
                raise RuntimeError(
                    f"{name} computes something else: it is {off:.3f} off, allowed {TOLERANCE}"
                )


def exchanges(problem, groups) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """(the exchange of sorted rows and of padded buffers, there only; fullest expert over mean on each rank)."""
    import torch
    import torch.distributed as dist

    from benchmarks import moe_peers as peers

    size, rank = problem.size, groups.rank
    load_PE = torch.zeros(RANKS, size.experts, dtype=torch.int64)
    load_PE[rank] = torch.tensor(peers.loads(problem))
    dist.all_reduce(load_PE)
    to_PP = load_PE.view(RANKS, RANKS, -1).sum(-1)  # from rank, to rank
    send, receive, fullest = to_PP[rank].tolist(), to_PP[:, rank].tolist(), int(load_PE.max())

    def rows(number: int):
        return problem.x_TD.new_ones(number, size.hidden)

    out, into, padded, padded_into = (
        rows(n) for n in (sum(send), sum(receive), *[size.experts * fullest] * 2)
    )
    return {
        "sorted rows alone": lambda: dist.all_to_all_single(into, out, receive, send),
        "padded buffers alone": lambda: dist.all_to_all_single(padded_into, padded),
    }, fullest / float(load_PE.float().mean())


def bytes_to_others(step: Callable[[], None], group) -> tuple[int, int]:
    """(bytes that this rank sends to the other ranks in one step, exchanges): counted at torch's own operator."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    sent = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d" and "alltoall_base" in func.name():
                rows, splits = args[1], args[4] or [len(args[1]) // RANKS] * RANKS
                others = len(rows) - splits[dist.get_rank(group)]
                sent.append(others * rows[:1].nbytes)
            return func(*args, **(kwargs or {}))

    with Count():
        step()
    return sum(sent), len(sent)


def profile_parts(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by part, on this rank. What the exchange takes includes waiting for the other rank."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
    parts = dict.fromkeys([*PARTS, *GLOO.values(), "the rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        if name in GLOO:  # in gloo's own thread, while this one waits
            parts[GLOO[name]] += event.cpu_time_total / 1000 / PROFILED
            continue
        part = next(
            (p for p, words in PARTS.items() if any(word in name for word in words)), "the rest"
        )
        parts[part] += event.self_cpu_time_total / 1000 / PROFILED
    return parts


def measure(groups, cases: list[tuple], rounds: int) -> list[dict[str, Any]]:
    """What rank 0 saw of each case, a size and a kind of routing."""
    return [measure_one(groups, shape, SKEWS[kind], rounds) for shape, kind in cases]


def measure_one(groups, shape: tuple[int, ...], skew: float, rounds: int) -> dict[str, Any]:
    import torch

    from benchmarks import moe_peers as peers

    problem = peers.Problem.draw(
        peers.Size(*shape), "swiglu", torch.device("cpu"), groups.rank, skew
    )
    layers = {
        WHOLE: peers.ours(problem),
        SHARDED: peers.ours(problem, groups=groups),
        PADDED: peers.deepspeed_moe(problem, groups),
    }
    check(layers, problem)
    steps = {
        name: synchronised(layer.step(problem), groups.ep_group)
        for name, layer in layers.items()
    }
    alone, fullest = exchanges(problem, groups)
    seconds = report.interleave({**steps, **alone}, rounds, warmup=2)
    return {
        "seconds": seconds,
        "fullest": fullest,
        "parts": {n: profile_parts(s) for n, s in steps.items()},
        "sent": {name: bytes_to_others(step, groups.ep_group) for name, step in steps.items()},
    }


def print_parts(seen: dict[str, Any], tokens: int) -> None:
    print(f"{'':32s}" + "".join(f"{name:>20s}" for name in seen["parts"]))
    print(
        f"{'ms per step, median':32s}"
        + "".join(
            f"{1000 * statistics.median(seen['seconds'][name]):20.1f}" for name in seen["parts"]
        )
    )
    for part in seen["parts"][SHARDED]:
        print(
            f"{part + ', profiled':32s}"
            + "".join(f"{parts[part]:20.1f}" for parts in seen["parts"].values())
        )
    for row, number in (("KB to the other rank per token", 0), ("exchanges per step", 1)):
        values = [sent[number] for sent in seen["sent"].values()]
        print(
            f"{row:32s}"
            + "".join(f"{v if number else v / tokens / 1000:20,.1f}" for v in values)
        )


def rows_of(shape: tuple[int, ...], kind: str, seen: dict[str, Any]) -> list[report.Row]:
    """One case: print the parts, return the ratios."""
    from benchmarks.moe_layer import labelled
    from benchmarks.moe_peers import Size

    size = Size(*shape)
    print(
        f"\n{size} on each of {RANKS} ranks, {kind}: the fullest expert has {seen['fullest']:.2f} times the mean"
    )
    print_parts(seen, size.tokens)
    seconds = seen["seconds"]
    layers = {name: seconds[name] for name in (WHOLE, SHARDED, PADDED)}
    return labelled(
        f"{size.label} {kind}",
        [
            *report.compare(layers, WHOLE),
            *report.compare({n: layers[n] for n in (SHARDED, PADDED)}, PADDED),
            *report.compare(
                {n: s for n, s in seconds.items() if n not in layers}, "padded buffers alone"
            ),
        ],
    )


def main() -> int:
    args = report.parser(__doc__).parse_args()
    cases = [(shape, kind) for shape in SIZES[args.quick] for kind in SKEWS]
    seen = report.on_ranks(RANKS, measure, cases, 3 if args.quick else 15)
    rows = [row for case, what in zip(cases, seen, strict=True) for row in rows_of(*case, what)]
    print()
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
