"""PEER's experts against the published computation: embeddings of all chosen rows and einsum.

Measured are one layer's experts alone, forward and backward with two threads, in fp32 unless
the size says bf16. The assignments are those of a newly created gate. The reference is
F.embedding + einsum + gelu + F.embedding + einsum with sparse gradients of both tables; a
second one has dense gradients, as most training programs need. Ours is
`megatron.moe.peer.experts` with either kind of gradients.

Peak memory is measured in a new process for each version. Inputs, weights and a pass of a
tiny layer (threads, lazily loaded code) come first; then free memory is returned and the
kernel's peak counter reset (5 to /proc/self/clear_refs). The result is the peak resident
memory of one forward and backward pass (VmHWM) minus the resident memory before it (VmRSS).
Memory that the host allocator keeps for the next pass counts. "gradients kept" holds both
tables' gradients at the end. "gradients taken" has a hook on each table, for reference and
ours alike, that frees each gradient as soon as it exists, as an optimizer within the backward
pass does.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.data_index import run_in_fresh_process
from benchmarks.moe_layer import reset_peak, resident

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron.moe.peer.experts import PEERExperts

THREADS = 2
REFERENCE = "reference"
REFERENCE_DENSE = "reference, dense"
OURS = "ours"
OURS_DENSE = "ours, dense"
VERSIONS = (REFERENCE, REFERENCE_DENSE, OURS, OURS_DENSE)
KEPT = "gradients kept"
TAKEN = "gradients taken"
TIME_BAR = 1 / 2
MEMORY_BAR = 0.3


@dataclass(frozen=True)
class Size:
    """Problem size: keys^2 experts of one hidden unit each, tokens and choices per token."""

    keys: int
    hidden_size: int
    tokens: int
    heads: int = 8
    topk: int = 16
    bf16: bool = False

    def __str__(self) -> str:
        return f"N {self.keys}^2, D {self.hidden_size}, T {self.tokens}" + ", bf16" * self.bf16


BARRED = Size(512, 512, 1024)
SIZES = (
    BARRED,
    Size(512, 512, 1024, bf16=True),
    Size(512, 512, 256),
    Size(128, 512, 1024),
    Size(256, 1024, 1024),
)
TINY = Size(16, 16, 8)


def choose(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Route random tokens with a newly created gate of default options.

    Returns:
        (x, and token, expert and weight of each assignment).
    """
    import torch

    from megatron.moe.gate import create_gate
    from megatron.moe.routing import GateInput

    gate = create_gate(
        "peer",
        hidden_size=size.hidden_size,
        num_experts=size.keys**2,
        peer_num_heads=size.heads,
        peer_topk=size.topk,
    )
    x = torch.randn(size.tokens, size.hidden_size, generator=torch.Generator().manual_seed(0))
    if size.bf16:
        x = x.bfloat16()
    with torch.no_grad():
        routing = gate(GateInput(x))
    weight_A = routing.weight_A.detach().requires_grad_()
    return x.requires_grad_(), routing.token_A, routing.expert_A, weight_A


def make_experts(size: Size) -> PEERExperts:
    """Return the experts of a problem."""
    from megatron.moe.peer.experts import PEERExperts

    experts = PEERExperts(size.keys**2, size.keys**2, size.hidden_size, 1, "gelu")
    if size.bf16:
        experts = experts.bfloat16()
    return experts


def reference(
    x: Tensor, expert_A: Tensor, weight_A: Tensor, w_in: Tensor, w_out: Tensor, sparse: bool
) -> Tensor:
    """Compute the formula as published, with rows [T, heads x k, D] of both tables.

    Args:
        expert_A, weight_A: the assignments token by token, the same number for each token.
    Returns:
        [T, D].
    """
    import torch
    import torch.nn.functional as F

    expert_TA = expert_A.view(len(x), -1)
    weight_TA = weight_A.view(len(x), -1)
    in_TAD = F.embedding(expert_TA, w_in, sparse=sparse)
    hidden_TA = F.gelu(torch.einsum("td,tad->ta", x, in_TAD))
    scale_TA = (hidden_TA * weight_TA).to(x.dtype)
    out_TAD = F.embedding(expert_TA, w_out, sparse=sparse)
    return torch.einsum("ta,tad->td", scale_TA, out_TAD)


def make_step(
    version: str,
    experts: PEERExperts,
    x: Tensor,
    token_A: Tensor,
    expert_A: Tensor,
    weight_A: Tensor,
) -> tuple[list[Tensor], Callable[[], None]]:
    """Return the tables of a version and a function that runs forward and backward once.

    All versions use the same inputs and weights.
    """
    import torch

    sparse = version in (REFERENCE, OURS)
    grad_TD = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    if version in (REFERENCE, REFERENCE_DENSE):
        tables = [t.detach().squeeze(1).requires_grad_() for t in (experts.w_in, experts.w_out)]

        def reference_step() -> None:
            reference(x, expert_A, weight_A, *tables, sparse).backward(grad_TD)

        return tables, reference_step

    def step() -> None:
        experts.sparse_gradients = sparse
        experts(x, token_A, expert_A, weight_A).backward(grad_TD)

    return list(experts.parameters()), step


def free_gradients_after(
    tables: list[nn.Parameter], step: Callable[[], None]
) -> Callable[[], None]:
    """Return the step followed by freeing the tables' gradients, which is part of its cost."""

    def run() -> None:
        step()
        for table in tables:
            table.grad = None

    return run


def time_rows(size: Size, rounds: int, bars: dict[str, float] | None) -> list[report.Row]:
    """Measure ratios of times, and print how many rows are chosen."""
    import torch

    from megatron import host_allocator

    torch.set_num_threads(THREADS)
    experts = make_experts(size)
    inputs = choose(size)
    expert_A = inputs[2]
    distinct = len(expert_A.unique())
    megabytes = distinct * size.hidden_size * experts.w_in.itemsize / 2**20
    print(
        f"{size}: {len(expert_A)} rows chosen, {distinct} distinct ones: a table's sparse "
        f"gradient has {megabytes:.0f} MB, both {2 * megabytes:.0f} MB"
    )
    steps = {
        version: free_gradients_after(*make_step(version, experts, *inputs))
        for version in VERSIONS
    }
    rows = []
    for versions in ((REFERENCE, OURS), (REFERENCE, REFERENCE_DENSE, OURS_DENSE)):
        # A process uses one kind of gradients, and its allocator keeps memory of their size.
        host_allocator.release_idle()
        compared = {version: steps[version] for version in versions}
        seconds = report.interleave(compared, rounds, warmup=2)
        for row in report.compare(seconds, REFERENCE, bars):
            rows.append(replace(row, name=f"{size}: {row.name}"))
    return rows


def peak_memory(size: Size, version: str) -> dict[str, int]:
    """Measure the bytes of a pass beyond inputs and weights, with gradients kept and taken.

    Runs in a new process.
    """
    import torch

    torch.set_num_threads(THREADS)
    _, tiny = make_step(version, make_experts(TINY), *choose(TINY))
    tiny()
    experts = make_experts(size)
    tables, step = make_step(version, experts, *choose(size))
    peaks = {KEPT: _peak_of(step)}
    for table in tables:
        table.grad = None
        table.register_post_accumulate_grad_hook(lambda table: setattr(table, "grad", None))
    peaks[TAKEN] = _peak_of(step)
    return peaks


def _peak_of(step: Callable[[], None]) -> int:
    import torch

    from megatron import host_allocator

    cpu = torch.device("cpu")
    gc.collect()
    host_allocator.release_idle()
    reset_peak(cpu)
    before, _ = resident(cpu)
    step()
    return resident(cpu)[1] - before


def memory_rows(size: Size, rounds: int) -> Iterator[report.Row]:
    """Measure ratios of peak memory, and print the peaks."""
    peaks: dict[str, list[dict[str, int]]] = {REFERENCE: [], OURS: []}
    for _ in range(rounds):
        for version, values in peaks.items():
            values.append(run_in_fresh_process(peak_memory, size, version))
    for kind, bar in ((TAKEN, MEMORY_BAR), (KEPT, None)):
        for version, values in peaks.items():
            megabytes = ", ".join(f"{v[kind] / 2**20:.0f}" for v in values)
            print(f"{size}: peak memory, {kind}, {version}: {megabytes} MB")
        pairs = zip(peaks[OURS], peaks[REFERENCE], strict=True)
        ratios = [ours[kind] / theirs[kind] for ours, theirs in pairs]
        yield report.row(f"peak memory, {kind}", REFERENCE, ratios, bar)


def main() -> int:
    """Run the benchmark; return the exit code."""
    args = report.parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if args.quick:
        rounds = 5
        memory_rounds = 2
        sizes = (BARRED,)
    else:
        rounds = 21
        memory_rounds = 3
        sizes = SIZES
    rows = []
    for size in sizes:
        rows += time_rows(size, rounds, {OURS: TIME_BAR} if size == BARRED else None)
    rows += memory_rows(BARRED, memory_rounds)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
