"""The whole mixture layer against a dense layer of equal arithmetic, and against other systems' mixture layers.

One process, two threads on a CPU; forward and backward of gate, plan, dispatch, experts and combine in bf16, the gate
in fp32, a top-k gate without a limit on rows. The baseline "dense" is a dense feed-forward layer of k times an expert's
width and the same activation: the same multiply-adds on the same tokens. "GEMMs alone" are its matrix products, and
those of the experts on rows in place, into memory that is there already: what no layer can beat.

1. Sizes: our layer by backend, a per-expert loop, DeepSpeed's native layer (nothing dropped), and transformers' Mixtral
   and OLMoE blocks with each of their experts' implementations. All have the same weights; before anything is timed,
   outputs and gradients are compared with those of a loop over experts in fp32.
2. Experts: our layer from few experts to many, with as many multiply-adds.
3. Memory of one layer above its weights and inputs, each measured in a process of its own: the peak of resident memory
   (on a GPU, of torch's allocator) in two steps after one step of few tokens, which loads what is loaded once. The
   second step runs on top of whatever the first one kept. The gradients of weights and inputs count in all alike.

In the three tables gradients are None before every step, so that each system allocates its own.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.data_index import fresh

TOLERANCE = 0.03
"""largest relative difference of a token's output or gradient, and of the weight gradients' norm: what bf16 rounds away
in a chain of products is a third of it, a token sent to a wrong expert many times it"""
SIZES = {  # (tokens, hidden, experts, width, experts per token)
    "cpu": ((8192, 1024, 64, 512, 8), (4096, 512, 8, 1024, 2), (4096, 768, 128, 256, 8)),
    "cuda": ((16384, 2048, 64, 1408, 6), (16384, 2048, 128, 1024, 8)),
    "quick": ((512, 256, 16, 128, 4),),
}
SWEEP = {
    "cpu": ((8192, 1024, 512, 8), (8, 16, 32, 64, 128, 256)),
    "cuda": ((16384, 2048, 1024, 8), (8, 32, 128, 256)),
    "quick": ((512, 256, 128, 8), (8, 32)),
}
BARS = (  # by size: against dense, against DeepSpeed, against the best of transformers; 0.769 is 1 / 1.3
    (1.40, 0.4, 0.5),
    (1.35, 0.5, 0.769),
)
SWEEP_BAR, MEMORY_BAR = 1.3, 0.7
PARTS = ("sizes", "experts", "memory")
OURS, DENSE, DEEPSPEED = "ours, auto", "dense", "DeepSpeed MoE"
MEMORY = {
    False: (OURS, "ours, grouped_mm", "Mixtral, grouped_mm", "OLMoE, grouped_mm", DEEPSPEED),
    True: (OURS, "OLMoE, grouped_mm"),
}  # --quick


def synchronised(step: Callable[[], None], device) -> Callable[[], None]:
    """`step`, until the device has done it."""
    import torch

    if device.type != "cuda":
        return step

    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole


def compare_values(problem, layers: dict) -> None:
    """Print how far each layer's results are from the loop in fp32; RuntimeError where they are another function's."""
    from benchmarks import moe_peers as peers

    exact = problem.float()
    expected = peers.expert_loop(exact).results(exact)
    print(
        f"{'largest relative difference of a':30s} {'output':>9s} {'gradient':>9s} {'weight gradients':>17s}"
    )
    for name, layer in layers.items():
        found = peers.differences(layer, problem, expected)
        print(f"{name:30s} {found[0]:9.4f} {found[1]:9.4f} {found[2]:17.4f}")
        if not all(off <= TOLERANCE for off in found):
            raise RuntimeError(
                f"{name} computes something else; relative differences up to {TOLERANCE} are allowed"
            )


def size_rows(
    size,
    activation: str,
    device,
    rounds: int,
    bars: tuple[float, ...] | None,
    only: Sequence[str],
) -> list[report.Row]:
    """One size: every layer that can be measured here against dense, and ours against the best of the others.

    Args:
        only: one of these must be in the names of the other layers.
    """
    from benchmarks import moe_peers as peers
    from megatron.moe.experts.activations import is_gated

    problem = peers.Problem.draw(size, activation, device)
    loads = peers.loads(problem)
    print(f"\n{size}, {activation}, bf16; rows of an expert: {min(loads)} to {max(loads)}")
    layers = {}
    for candidate in peers.candidates(size, activation, device):
        if candidate.name != OURS and not any(word in candidate.name for word in only):
            continue
        if candidate.reason:
            print(f"not measured: {candidate.name}: {candidate.reason}")
        else:
            layers[candidate.name] = candidate.make(problem)
    compare_values(problem, layers)
    wide, gated = size.topk * size.width, is_gated(activation)
    steps = {
        DENSE: peers.dense(problem).step(problem),
        "dense GEMMs alone": peers.bare_gemms(
            [size.tokens], size.hidden, wide, gated, problem.x_TD
        ),
        "experts' GEMMs alone": peers.bare_gemms(
            loads, size.hidden, size.width, gated, problem.x_TD
        ),
        **{name: layer.step(problem) for name, layer in layers.items()},
    }
    steps = {name: synchronised(step, device) for name, step in steps.items()}
    seconds = report.interleave(steps, rounds, warmup=2)
    print(f"{DENSE}: {1000 * statistics.median(seconds[DENSE]):.1f} ms")
    return labelled(size.label, ratio_rows(seconds, bars))


def ratio_rows(
    seconds: dict[str, list[float]], bars: tuple[float, ...] | None
) -> list[report.Row]:
    """All against dense, and ours against DeepSpeed and against the fastest of transformers' blocks."""
    of_dense, of_deepspeed, of_transformers = bars or (None, None, None)
    rows = report.compare(seconds, DENSE, {OURS: of_dense})
    theirs = [name for name in seconds if name.startswith(("Mixtral", "OLMoE"))]
    against = {DEEPSPEED: of_deepspeed} if DEEPSPEED in seconds else {}
    if theirs:
        against[min(theirs, key=lambda name: statistics.median(seconds[name]))] = (
            of_transformers
        )
    for name, bar in against.items():
        rows += report.compare({name: seconds[name], OURS: seconds[OURS]}, name, {OURS: bar})
    return rows


def labelled(label: str, rows: list[report.Row]) -> list[report.Row]:
    return [
        replace(row, name=f"{label}: {row.name}", baseline=f"{label}: {row.baseline}")
        for row in rows
    ]


def sweep_rows(
    shape: tuple[int, ...],
    experts: tuple[int, ...],
    activation: str,
    device,
    rounds: int,
    bar: float | None,
) -> list[report.Row]:
    """Our layer with more and more experts against itself with the fewest.

    Each is called twice in a row and the second call counts: what a layer keeps for its next call fits no layer of
    another number of experts.
    """
    from benchmarks import moe_peers as peers

    tokens, hidden, width, topk = shape
    steps = {}
    for number in experts:
        size = peers.Size(tokens, hidden, number, width, topk)
        problem = peers.Problem.draw(size, activation, device)
        step = synchronised(peers.ours(problem).step(problem), device)
        steps.update({f"E {number}, first call": step, f"ours, E {number}": step})
    print(
        f"\nE from {experts[0]} to {experts[-1]}: T {tokens}, D {hidden}, H {width}, k {topk}, {activation}"
    )
    seconds = report.interleave(steps, rounds, warmup=1)
    seconds = {name: values for name, values in seconds.items() if name.startswith("ours")}
    return report.compare(seconds, f"ours, E {experts[0]}", {f"ours, E {experts[-1]}": bar})


def peak_memory(name: str, shape: tuple[int, ...], activation: str, device_type: str) -> float:
    """Bytes that two steps of the layer take at most, above its weights and inputs. Runs in a process of its own."""
    import torch

    from benchmarks import moe_peers as peers

    torch.set_num_threads(2)
    device, size = torch.device(device_type), peers.Size(*shape)
    problem = peers.Problem.draw(size, activation, device)
    layer = next(c for c in peers.candidates(size, activation, device) if c.name == name).make(
        problem
    )
    few = replace(
        problem, x_TD=problem.x_TD[: size.experts], grad_TD=problem.grad_TD[: size.experts]
    )
    layer.step(few)()
    step = layer.step(problem)
    reset_peak(device)
    before = resident(device)[0]
    for _ in range(2):
        step()
    return resident(device)[1] - before


def reset_peak(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(device) -> tuple[int, int]:
    """(bytes now, the peak since `reset_peak`)."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    now, peak = (
        int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmRSS", "VmHWM")
    )
    return now, peak


def memory_rows(
    shape: tuple[int, ...],
    names: tuple[str, ...],
    activation: str,
    device,
    rounds: int,
    bar: float | None,
) -> list[report.Row]:
    """Our layer against the smaller of transformers' grouped_mm blocks."""
    from benchmarks import moe_peers as peers

    size = peers.Size(*shape)
    names = [
        c.name
        for c in peers.candidates(size, activation, device)
        if c.name in names and not c.reason
    ]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            taken[name].append(fresh(peak_memory, name, shape, activation, device.type))
    print(f"\nmemory of a layer in two steps, above weights and inputs: {size}, {activation}")
    for name, values in taken.items():
        print(f"{name}: {', '.join(f'{value / 2**20:.0f}' for value in values)} MiB")
    theirs = [name for name in names if not name.startswith(("ours", DEEPSPEED))]
    if not theirs:
        return []
    smallest = min(theirs, key=lambda name: statistics.median(taken[name]))
    return labelled(f"{size.label} memory", report.compare(taken, smallest, {OURS: bar}))


def main() -> int:
    from megatron.config.schema import ACTIVATIONS

    parser = report.parser(__doc__)
    parser.add_argument("--activation", default="swiglu", choices=ACTIVATIONS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, help="which tables (default: all)"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=("",),
        metavar="WORD",
        help=f"in the table of sizes, only layers with such a word in their name, and '{OURS}'",
    )
    args = parser.parse_args()
    import torch

    from benchmarks.moe_peers import Size
    from megatron.engine import distributed as parallel

    device = torch.device(args.device)
    torch.set_num_threads(2)
    kind, rounds, processes = ("quick", 3, 2) if args.quick else (args.device, 15, 3)
    barred = kind == "cpu"
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    rows = []
    for number, shape in enumerate(SIZES[kind] if "sizes" in args.part else ()):
        bars = BARS[number] if barred and number < len(BARS) else None
        rows += size_rows(Size(*shape), args.activation, device, rounds, bars, args.layers)
    if "experts" in args.part:
        rows += sweep_rows(
            *SWEEP[kind], args.activation, device, rounds, SWEEP_BAR if barred else None
        )
    if "memory" in args.part:
        rows += memory_rows(
            SIZES[kind][0],
            MEMORY[args.quick],
            args.activation,
            device,
            processes,
            MEMORY_BAR if barred else None,
        )
    parallel.destroy()
    print()
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
