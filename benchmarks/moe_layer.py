"""Time and memory of the MoE layer against a dense layer and other systems' MoE layers.

One process, two threads on a CPU. Measured are forward and backward of gate, plan,
dispatch, experts and combine in bf16 with the gate in fp32, for a top-k gate without a
capacity limit. The baseline "dense" is a dense feed-forward layer of k times an
expert's width with the same activation: the same multiply-adds on the same tokens.
"GEMMs alone" are its matrix products, and those of the experts on rows in place, into
preallocated memory: a bound that no layer can beat. On a GPU, where many small products
do not fill the device, "F.grouped_mm alone" is the bound.

1. Sizes: our layer by backend, a per-expert loop, DeepSpeed's native layer (nothing
   dropped), and transformers' Mixtral and OLMoE blocks with each implementation of
   their experts. All have the same weights; before anything is timed, outputs and
   gradients are compared with those of a loop over experts in fp32.
2. Experts: our layer from few experts to many, with equally many multiply-adds.
3. Memory of one layer above its weights and inputs, measured in a separate process
   each: the peak of resident memory (on a GPU, of torch's allocator) in two steps after
   one step of few tokens, which allocates what is allocated once. The second step runs
   in addition to whatever the first one retained. The gradients of weights and inputs
   count for all.

In all three tables gradients are None before every step, so that each system allocates
its own.
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
from benchmarks.data_index import run_in_fresh_process

TOLERANCE = 0.03
"""Largest relative difference of a token's output or gradient, and of the weight
gradients' norm. bf16 rounding in a chain of products causes a third of it, a token sent
to a wrong expert many times as much."""
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
# By size: against dense, against DeepSpeed, against the best of transformers; 0.769 is
# 1 / 1.3.
BARS = (
    (1.40, 0.4, 0.5),
    (1.35, 0.5, 0.769),
)
SWEEP_BAR = 1.3
MEMORY_BAR = 0.7
PARTS = ("sizes", "experts", "memory")
OURS = "ours, auto"
DENSE = "dense"
DEEPSPEED = "DeepSpeed MoE"
# By --quick.
MEMORY = {
    False: (OURS, "ours, grouped_mm", "Mixtral, grouped_mm", "OLMoE, grouped_mm", DEEPSPEED),
    True: (OURS, "OLMoE, grouped_mm"),
}


def synchronised(step: Callable[[], None], device) -> Callable[[], None]:
    """Return a function that runs `step` and waits for the device."""
    import torch

    if device.type != "cuda":
        return step

    def step_and_synchronise() -> None:
        step()
        torch.cuda.synchronize()

    return step_and_synchronise


def compare_values(problem, layers: dict) -> None:
    """Print how far each layer's results are from those of the loop in fp32.

    Raises:
        RuntimeError: a layer computes another function.
    """
    from benchmarks import moe_peers as peers

    exact = problem.float()
    expected = peers.expert_loop(exact).results(exact)
    title = "largest relative difference of a"
    print(f"{title:30s} {'output':>9s} {'gradient':>9s} {'weight gradients':>17s}")
    for name, layer in layers.items():
        found = peers.differences(layer, problem, expected)
        print(f"{name:30s} {found[0]:9.4f} {found[1]:9.4f} {found[2]:17.4f}")
        if not all(off <= TOLERANCE for off in found):
            raise RuntimeError(
                f"{name} computes something else; "
                f"relative differences up to {TOLERANCE} are allowed"
            )


def size_rows(
    size,
    activation: str,
    device,
    rounds: int,
    bars: tuple[float, ...] | None,
    only: Sequence[str],
) -> list[report.Row]:
    """Measure one size: all layers against dense, and ours against the best of the
    others.

    Args:
        only: words of which one must be in the name of each other layer.
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
    wide = size.topk * size.width
    gated = is_gated(activation)
    steps = {
        DENSE: peers.dense(problem).step(problem),
        "dense GEMMs alone": peers.bare_gemms(
            [size.tokens], size.hidden, wide, gated, problem.x_TD
        ),
        "experts' GEMMs alone": peers.bare_gemms(
            loads, size.hidden, size.width, gated, problem.x_TD
        ),
        "F.grouped_mm alone": peers.bare_grouped_mm(
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
    """Compare all with dense, and ours with DeepSpeed and transformers' fastest
    block."""
    of_dense, of_deepspeed, of_transformers = bars or (None, None, None)
    rows = report.compare(seconds, DENSE, {OURS: of_dense})
    others = {}
    if DEEPSPEED in seconds:
        others[DEEPSPEED] = of_deepspeed
    blocks = [name for name in seconds if name.startswith(("Mixtral", "OLMoE"))]
    if blocks:
        fastest = min(blocks, key=lambda name: statistics.median(seconds[name]))
        others[fastest] = of_transformers
    for name, bar in others.items():
        rows += report.compare({name: seconds[name], OURS: seconds[OURS]}, name, {OURS: bar})
    return rows


def labelled(label: str, rows: list[report.Row]) -> list[report.Row]:
    """Prefix the names of rows and baselines with a label."""
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
    """Compare our layer with more and more experts with itself with the fewest.

    Each is called twice in a row and the second call counts: memory that a layer caches
    for its next call does not fit a layer with another number of experts.
    """
    from benchmarks import moe_peers as peers

    tokens, hidden, width, topk = shape
    steps = {}
    for number in experts:
        size = peers.Size(tokens, hidden, number, width, topk)
        problem = peers.Problem.draw(size, activation, device)
        step = synchronised(peers.ours(problem).step(problem), device)
        steps.update({f"E {number}, first call": step, f"ours, E {number}": step})
    shape_text = f"T {tokens}, D {hidden}, H {width}, k {topk}, {activation}"
    print(f"\nE from {experts[0]} to {experts[-1]}: {shape_text}")
    seconds = report.interleave(steps, rounds, warmup=1)
    seconds = {name: values for name, values in seconds.items() if name.startswith("ours")}
    return report.compare(seconds, f"ours, E {experts[0]}", {f"ours, E {experts[-1]}": bar})


def peak_memory(name: str, shape: tuple[int, ...], activation: str, device_type: str) -> float:
    """Return the peak bytes of two steps of a layer, above its weights and inputs.

    Runs in a separate process.
    """
    import torch

    from benchmarks import moe_peers as peers

    torch.set_num_threads(2)
    device = torch.device(device_type)
    size = peers.Size(*shape)
    problem = peers.Problem.draw(size, activation, device)
    candidates = peers.candidates(size, activation, device)
    layer = next(c for c in candidates if c.name == name).make(problem)
    few_x_TD = problem.x_TD[: size.experts]
    few_grad_TD = problem.grad_TD[: size.experts]
    layer.step(replace(problem, x_TD=few_x_TD, grad_TD=few_grad_TD))()
    step = layer.step(problem)
    reset_peak(device)
    before = resident(device)[0]
    for _ in range(2):
        step()
    return resident(device)[1] - before


def reset_peak(device) -> None:
    """Reset the peak that `resident` returns."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(device) -> tuple[int, int]:
    """Return the bytes in use now, and their peak since `reset_peak`."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    now = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    return now, peak


def memory_rows(
    shape: tuple[int, ...],
    names: tuple[str, ...],
    activation: str,
    device,
    rounds: int,
    bar: float | None,
) -> list[report.Row]:
    """Compare our layer's memory with the smaller of transformers' grouped_mm
    blocks."""
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
            peak = run_in_fresh_process(peak_memory, name, shape, activation, device.type)
            taken[name].append(peak)
    title = "memory of a layer in two steps, above weights and inputs"
    print(f"\n{title}: {size}, {activation}")
    for name, values in taken.items():
        print(f"{name}: {', '.join(f'{value / 2**20:.0f}' for value in values)} MiB")
    theirs = [name for name in names if not name.startswith(("ours", DEEPSPEED))]
    if not theirs:
        return []
    smallest = min(theirs, key=lambda name: statistics.median(taken[name]))
    return labelled(f"{size.label} memory", report.compare(taken, smallest, {OURS: bar}))


def parse_arguments():
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
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device is cuda; allowed: cpu, torch finds no GPU", file=sys.stderr)
        return 2
    from benchmarks.moe_peers import Size
    from megatron.engine import distributed

    device = torch.device(args.device)
    torch.set_num_threads(2)
    kind = args.device
    rounds = 15
    processes = 3
    if args.quick:
        kind = "quick"
        rounds = 3
        processes = 2
    # Bars were measured on a CPU at full size.
    barred = kind == "cpu"
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    rows = []
    if "sizes" in args.part:
        for number, shape in enumerate(SIZES[kind]):
            bars = None
            if barred and number < len(BARS):
                bars = BARS[number]
            rows += size_rows(Size(*shape), args.activation, device, rounds, bars, args.layers)
    if "experts" in args.part:
        bar = SWEEP_BAR if barred else None
        rows += sweep_rows(*SWEEP[kind], args.activation, device, rounds, bar)
    if "memory" in args.part:
        shape = SIZES[kind][0]
        names = MEMORY[args.quick]
        bar = MEMORY_BAR if barred else None
        rows += memory_rows(shape, names, args.activation, device, processes, bar)
    distributed.destroy()
    print()
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
