"""PEER's neurons against the published way of computing them: two embeddings of all chosen rows and an einsum of each.

One layer's experts alone, forward and backward with two threads, fp32 unless it says bf16; what a newly made gate
chooses is given. The reference is F.embedding + einsum + gelu + F.embedding + einsum with sparse gradients of both
tables; a second one has dense gradients, as most training programs want. Ours is `megatron.moe.peer.experts` with either.

Peak memory is measured in a fresh process for each version: after inputs, weights and a pass of a tiny layer (threads,
lazily loaded code) free memory is given back and the kernel's peak counter reset (5 to /proc/self/clear_refs); the peak
resident memory of one forward and backward pass (VmHWM) is counted from the resident memory before it (VmRSS). Memory
that our buffers keep for the next pass counts. "gradients kept" has both tables' gradients at the end; "gradients
taken" has a hook on each table, for reference and ours alike, that takes a gradient as soon as it is there, as an
optimizer within the backward pass does.
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
from benchmarks.data_index import fresh
from benchmarks.moe_layer import reset_peak, resident

if TYPE_CHECKING:
    from torch import Tensor

THREADS = 2
REFERENCE, REFERENCE_DENSE, OURS, OURS_DENSE = VERSIONS = (
    "reference",
    "reference, dense",
    "ours",
    "ours, dense",
)
KEPT, TAKEN = "gradients kept", "gradients taken"
TIME_BAR, MEMORY_BAR = 1 / 2, 0.3


@dataclass(frozen=True)
class Size:
    """keys^2 experts of one hidden unit each, tokens, and what a token chooses."""

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
    """(x, and token, expert and weight of each assignment): what a new gate of default options makes of noise."""
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
    x = x.bfloat16() if size.bf16 else x
    with torch.no_grad():
        routing = gate(GateInput(x))
    return (
        x.requires_grad_(),
        routing.token_A,
        routing.expert_A,
        routing.weight_A.detach().requires_grad_(),
    )


def make_experts(size: Size):
    from megatron.moe.peer.experts import PEERExperts, PEERTableConfig

    config = PEERTableConfig(size.keys**2, size.keys**2, size.hidden_size, 1, "gelu")
    experts = PEERExperts(config)
    return experts.bfloat16() if size.bf16 else experts


def reference(
    x: Tensor, expert_A: Tensor, weight_A: Tensor, w_in: Tensor, w_out: Tensor, sparse: bool
) -> Tensor:
    """The formula as PEER's and later code has it: rows [T, heads x k, D] of both tables. [T, D].

    Args:
        expert_A, weight_A: the assignments token by token, the same number of each.
    """
    import torch
    import torch.nn.functional as F

    expert_TA, weight_TA = expert_A.view(len(x), -1), weight_A.view(len(x), -1)
    hidden_TA = F.gelu(
        torch.einsum("td,tad->ta", x, F.embedding(expert_TA, w_in, sparse=sparse))
    )
    return torch.einsum(
        "ta,tad->td",
        (hidden_TA * weight_TA).to(x.dtype),
        F.embedding(expert_TA, w_out, sparse=sparse),
    )


def make_step(
    version: str, experts, x: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor
):
    """(tables, a function that does forward and backward once); all versions use the same inputs and weights."""
    import torch

    sparse = version in (REFERENCE, OURS)
    grad_TD = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    if version in (REFERENCE, REFERENCE_DENSE):
        tables = [t.detach().squeeze(1).requires_grad_() for t in (experts.w_in, experts.w_out)]
        return tables, lambda: reference(x, expert_A, weight_A, *tables, sparse).backward(
            grad_TD
        )

    def step() -> None:
        experts.sparse_gradients = sparse
        experts(x, token_A, expert_A, weight_A).backward(grad_TD)

    return list(experts.parameters()), step


def without_gradients(tables: list[Tensor], step: Callable[[], None]) -> Callable[[], None]:
    """The step, after which its tables' gradients are given back: that is part of their price."""

    def run() -> None:
        step()
        for table in tables:
            table.grad = None

    return run


def time_rows(size: Size, rounds: int, bars: dict[str, float] | None) -> list[report.Row]:
    """Ratios of times; in print how many rows are chosen."""
    import torch

    from megatron import host_allocator

    torch.set_num_threads(THREADS)
    experts, inputs = make_experts(size), choose(size)
    used = len(inputs[2].unique())
    one = used * size.hidden_size * experts.w_in.itemsize / 2**20
    print(
        f"{size}: {len(inputs[2])} rows chosen, {used} different ones: a table's sparse gradient has {one:.0f} MB, "
        f"both {2 * one:.0f} MB"
    )
    steps = {
        version: without_gradients(*make_step(version, experts, *inputs))
        for version in VERSIONS
    }
    rows = []
    for versions in ((REFERENCE, OURS), (REFERENCE, REFERENCE_DENSE, OURS_DENSE)):
        host_allocator.release_idle()  # a process has the one kind of gradients or the other, and keeps memory of their size
        seconds = report.interleave(
            {version: steps[version] for version in versions}, rounds, warmup=2
        )
        rows += [
            replace(row, name=f"{size}: {row.name}")
            for row in report.compare(seconds, REFERENCE, bars)
        ]
    return rows


def peak_memory(size: Size, version: str) -> dict[str, int]:
    """Bytes of one forward and backward pass beyond inputs and weights, both ways; for a fresh process."""
    import torch

    torch.set_num_threads(THREADS)
    _, tiny = make_step(version, make_experts(TINY), *choose(TINY))
    tiny()
    experts, inputs = make_experts(size), choose(size)
    tables, step = make_step(version, experts, *inputs)
    peaks = {KEPT: _peak_of(step)}
    for table in tables:
        table.grad = None
        table.register_post_accumulate_grad_hook(lambda table: setattr(table, "grad", None))
    return {**peaks, TAKEN: _peak_of(step)}


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
    """Ratios of peaks, and in print the peaks themselves."""
    peaks: dict[str, list[dict[str, int]]] = {REFERENCE: [], OURS: []}
    for _ in range(rounds):
        for version, values in peaks.items():
            values.append(fresh(peak_memory, size, version))
    for how, bar in ((TAKEN, MEMORY_BAR), (KEPT, None)):
        for version, values in peaks.items():
            print(
                f"{size}: peak memory, {how}, {version}:",
                ", ".join(f"{v[how] / 2**20:.0f}" for v in values),
                "MB",
            )
        ratios = [a[how] / b[how] for a, b in zip(peaks[OURS], peaks[REFERENCE], strict=True)]
        yield report.row(f"peak memory, {how}", REFERENCE, ratios, bar)


def main() -> int:
    args = report.parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    rounds, sizes = (5, (BARRED,)) if args.quick else (21, SIZES)
    rows = []
    for size in sizes:
        rows += time_rows(size, rounds, {OURS: TIME_BAR} if size == BARRED else None)
    rows += memory_rows(BARRED, 2 if args.quick else 3)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
