"""Time and memory of training steps with our host allocator against malloc's settings.

`megatron.host_allocator` reuses the memory of large CPU tensors. The alternative is two
settings of glibc's malloc, M_MMAP_MAX = 0 and a high M_TRIM_THRESHOLD, with which it keeps
large blocks in its heap; "plain malloc" has neither. A model with a threshold gate is trained
on batches of 5 to 8 sequences, so that the sizes of its tensors vary from step to step. Each
run is a process of its own; the systems take turns. Resident memory is that at the end of a
run, above that before the model is built.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.data_index import run_in_fresh_process
from benchmarks.moe_layer import labelled, resident

OURS = "host_allocator"
MALLOPT = "mallopt"
PLAIN = "plain malloc"
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
LENGTH = 256
VOCAB = 8192


def set_allocator(name: str) -> None:
    """Choose the allocator of this process; before megatron's models are imported."""
    import torch

    from megatron import host_allocator

    if name == OURS:
        return
    host_allocator.empty_cached = lambda shape, dtype, device: torch.empty(
        tuple(shape), dtype=dtype, device=device
    )
    if name == MALLOPT:
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            if libc.mallopt(option, value) != 1:
                raise OSError(f"mallopt({option}, {value}) failed; this benchmark needs glibc")


def train(name: str, steps: int) -> tuple[float, float]:
    """Train in this process; return (median seconds per sequence, resident bytes)."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(2)
    set_allocator(name)
    from megatron.config.schema import ModelConfig, MoEConfig
    from megatron.model.builder import build_model
    from megatron.parallel.groups import Groups

    device = torch.device("cpu")
    before, _ = resident(device)
    model = build_model(
        ModelConfig(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            seq_length=LENGTH,
            ffn_hidden_size=1024,
            init_method_std=0.06,
        ),
        MoEConfig(num_experts=16, gate="threshold", moe_ffn_hidden_size=256, expert_interval=2),
        {"threshold": {"threshold": 0.7}},
        vocab_size=VOCAB,
        seed=0,
        groups=Groups(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(steps):
        sequences = int(torch.randint(5, 9, (1,), generator=generator))
        ids_BS = torch.randint(0, VOCAB, (sequences, LENGTH + 1), generator=generator)
        start = time.perf_counter()
        out = model(
            tokens_BS=ids_BS[:, :-1],
            labels_BS=ids_BS[:, 1:],
            loss_mask_BS=torch.ones(sequences, LENGTH),
            progress=0.0,
        )
        (out.lm_loss_sum / (sequences * LENGTH) + out.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.perf_counter() - start) / sequences)
    return statistics.median(seconds), resident(device)[0] - before


def main() -> int:
    args = report.parser(__doc__).parse_args()
    rounds = 2 if args.quick else 3
    steps = 4 if args.quick else 100
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, MALLOPT, OURS)}
    memory: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(rounds):
        for name in seconds:
            second, resident_bytes = run_in_fresh_process(train, name, steps)
            seconds[name].append(second)
            memory[name].append(resident_bytes)
    for name in seconds:
        print(
            f"{name}: {1000 * statistics.median(seconds[name]):.0f} ms per sequence, "
            f"{statistics.median(memory[name]) / 2**20:.0f} MiB after {steps} steps"
        )
    rows = labelled("time", report.compare(seconds, OURS))
    rows += labelled("memory", report.compare(memory, OURS))
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
