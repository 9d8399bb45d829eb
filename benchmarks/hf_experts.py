"""Our experts inside OLMoE's block of transformers, against transformers' own implementations.

Forward and backward of router and experts in bf16, in one process; one thread on a CPU. All
blocks have the same weights and tokens; before anything is timed, outputs and gradients are
compared with those of a loop over experts in fp32. Baseline is `grouped_mm`, which transformers
chooses by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import moe_layer, report

BASELINE = "grouped_mm"
SIZES = {  # (tokens, hidden, experts, width, experts per token)
    "cpu": ((1024, 512, 32, 256, 4), (1024, 512, 8, 1024, 2)),
    "cuda": moe_layer.SIZES["cuda"],
    "quick": moe_layer.SIZES["quick"],
}
BAR = 1.15
"""Largest ratio of ours to the baseline"""


def size_rows(size, device, rounds: int, bar: float | None) -> list[report.Row]:
    """Measure one size."""
    from benchmarks import moe_peers as peers
    from megatron.interop.hf_experts import EXPERTS_IMPLEMENTATION

    problem = peers.Problem.draw(size, "swiglu", device)
    names = (BASELINE, EXPERTS_IMPLEMENTATION, "eager")
    layers = {name: peers.transformers_block(problem, "OLMoE", name) for name in names}
    print(f"\n{size}, swiglu, bf16")
    moe_layer.compare_values(problem, layers)
    steps = {}
    for name, layer in layers.items():
        steps[name] = moe_layer.synchronised(layer.step(problem), device)
    seconds = report.interleave(steps, rounds, warmup=2)
    bars = {} if bar is None else {EXPERTS_IMPLEMENTATION: bar}
    return moe_layer.labelled(size.label, report.compare(seconds, BASELINE, bars))


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    import torch

    from benchmarks import moe_peers as peers
    from megatron.interop.hf_experts import register_experts

    register_experts()
    torch.set_num_threads(1)
    kind = "quick" if args.quick else args.device
    rounds = 5 if args.quick else 7
    bar = None if args.quick else BAR
    rows = []
    for shape in SIZES[kind]:
        rows += size_rows(peers.Size(*shape), torch.device(args.device), rounds, bar)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
