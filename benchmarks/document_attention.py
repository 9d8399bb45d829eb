"""Attention within documents: batches of documents against a mask of all pairs of tokens.

One attention call, forward and backward, without projections, in one process with one
thread; the layout of the documents is computed in every call, as in a one-layer model.
The lengths of documents are geometric. Baseline is `scaled_dot_product_attention` under
a bool mask [B, 1, S, S]. Two tables:

1. Time by length of samples, mean length of documents and dtype. Rows up to the longest
   masked sample are where the model uses the mask itself; their ratios show what batches
   would cost. A loop calls attention once per document, on slices of one split.
2. Peak memory above inputs and weights, as torch allocates it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

HEADS = 12
GROUPS = 4
HEAD_SIZE = 64
TOKENS = 2048
"""Tokens of a micro-batch: short samples come in larger micro-batches."""


def make_segments(length: int, mean: int):
    """Return numbers of documents [B, S] whose lengths are geometric with this mean."""
    import torch

    g = torch.Generator().manual_seed(length + mean)
    batch = max(1, TOKENS // length)
    return (torch.rand(batch, length, generator=g) < 1 / mean).cumsum(1)


def make_inputs(segments, dtype):
    """Return queries, keys and values as projections give them, and a gradient."""
    import torch

    batch, length = segments.shape
    g = torch.Generator().manual_seed(0)
    tensors = []
    for heads in (HEADS, GROUPS, GROUPS, HEADS):
        x = torch.randn(batch, length, heads, HEAD_SIZE, generator=g).to(dtype)
        tensors.append(x.transpose(1, 2))
    return tensors


def attend_masked(q, k, v, segments):
    """Attend under a mask of all pairs."""
    from megatron.model.attend import ScoreOptions, attend
    from megatron.model.document_attention import DocumentLayout

    return attend(q, k, v, ScoreOptions(), DocumentLayout(segments).mask_B1SS)


def attend_in_batches(q, k, v, segments):
    """Attend in batches of documents, whatever the length of the samples."""
    from megatron.model import document_attention as model
    from megatron.model.attend import ScoreOptions, attend

    batches = model.DocumentLayout(segments).batches
    if batches is None:
        return attend(q, k, v, ScoreOptions())
    return model._attend_in_batches(q, k, v, batches, ScoreOptions())


def attend_in_a_loop(q, k, v, segments):
    """Attend to one document after the other."""
    import torch

    from megatron.model.attend import ScoreOptions, attend
    from megatron.model.document_attention import DocumentLayout

    lengths = DocumentLayout(segments).lengths_N.tolist()
    rows = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)]
    outputs = []
    for document in zip(*rows, strict=True):
        inputs = [x[None].transpose(1, 2) for x in document]
        outputs.append(attend(*inputs, ScoreOptions()).transpose(1, 2)[0])
    return torch.cat(outputs).unflatten(0, segments.shape).transpose(1, 2)


def step_of(attention: Callable, inputs, segments) -> Callable[[], None]:
    """Return a function that runs forward and backward."""
    import torch

    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])

    def step() -> None:
        y = attention(q, k, v, segments)
        torch.autograd.grad(y, (q, k, v), inputs[3])

    return step


def times(dtype, lengths: list[int], means: list[int], rounds: int) -> list[report.Row]:
    """Compare batches and a loop with the mask."""
    from megatron.model.document_attention import longest_masked

    rows = []
    for length in lengths:
        for mean in [mean for mean in means if mean <= length]:
            segments = make_segments(length, mean)
            inputs = make_inputs(segments, dtype)
            label = f"{str(dtype)[6:]} S{length}, documents of {mean}"
            functions = {
                f"{label}: mask": step_of(attend_masked, inputs, segments),
                f"{label}: batches": step_of(attend_in_batches, inputs, segments),
                f"{label}: loop": step_of(attend_in_a_loop, inputs, segments),
            }
            bars = {}
            if length > longest_masked(dtype):
                bars[f"{label}: batches"] = 1.0
            seconds = report.interleave(functions, rounds, warmup=1)
            rows += report.compare(seconds, f"{label}: mask", bars)
    return rows


def memory(dtype, lengths: list[int]) -> list[report.Row]:
    """Compare the memory of batches with that of the mask, and print both."""
    rows = []
    for length in lengths:
        segments = make_segments(length, length // 8)
        inputs = make_inputs(segments, dtype)
        masked = report.peak_bytes(step_of(attend_masked, inputs, segments))
        batches = report.peak_bytes(step_of(attend_in_batches, inputs, segments))
        label = f"{str(dtype)[6:]} S{length} memory"
        print(f"{label}: {masked >> 20} MiB with a mask, {batches >> 20} MiB in batches")
        ratio = [batches / masked] * 2
        rows.append(report.row(f"{label}: batches", f"{label}: mask", ratio, 1.0))
    return rows


def main() -> int:
    args = report.parser(__doc__).parse_args()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # silences torch's profiler
    import torch

    torch.set_num_threads(1)
    lengths = [64, 128, 256, 512, 1024, 2048]
    means = [8, 64, 256, 2048]
    memory_lengths = [2048, 4096, 8192]
    rounds = 9
    if args.quick:
        lengths = [64, 512]
        means = [64]
        memory_lengths = [2048]
        rounds = 3
    print(f"{TOKENS} tokens, {HEADS} heads, {GROUPS} key heads of size {HEAD_SIZE}, one thread")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += times(dtype, lengths, means, rounds)
    return report.finish(rows + memory(torch.bfloat16, memory_lengths), args)


if __name__ == "__main__":
    raise SystemExit(main())
