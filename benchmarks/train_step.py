"""The demo model's training step against the same model with dense layers of equal active width, in one run.

Two gloo ranks with one thread each, bf16, ZeRO 1, experts sharded over both, as in `make demo`. The dense twin's
feed-forward width in each mixture layer is that layer's measured mean number of experts per token times the expert
width, so both do the same multiply-adds. Below the ratio stands where the time of each goes, by kind of operation.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

WIDTH, EXPERTS, THRESHOLD, VOCAB, RANKS = 256, 16, 0.9, 8192, 2
KINDS = {  # the first kind one of whose words is in an operation's name
    "communication": ("comm", "alltoall", "allreduce", "allgather", "c10d", "gloo", "reduce_scatter", "broadcast"),
    "moving rows": ("index", "embedding_bag", "sort", "scatter", "gather", "cat", "nonzero", "bincount", "bag"),
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("attention",),
    "optimizer": ("adam",),
}


def configs():
    """The demo's shapes (examples_deepspeed/MoE/demo.sh)."""
    from megatron.config.schema import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

    model = ModelConfig(num_layers=6, hidden_size=256, num_attention_heads=4, seq_length=256, init_method_std=0.06,
                        ffn_hidden_size=1024)
    moe = MoEConfig(num_experts=EXPERTS, expert_interval=2, gate="threshold", moe_ffn_hidden_size=WIDTH,
                    moe_expert_parallel_size=RANKS)
    train = TrainConfig(micro_batch_size=8, global_batch_size=8 * RANKS)
    return model, moe, OptimizerConfig(bf16=True), train


def make_engines(groups, batch):
    """(mixture engine, dense engine of equal active width, mean experts per token by layer)."""
    from megatron.model.build import build_model
    from megatron.model.gpt import GPT
    from megatron.model.mlp import MLP
    from megatron.moe.metrics import MoEMetrics
    from megatron.training.engine import Engine

    model, moe, optimizer, train = configs()
    mixture = Engine(build_model(model, moe, {"threshold": THRESHOLD}, vocab_size=VOCAB, seed=0, groups=groups),
                     optimizer, train, groups)
    mixture.step([batch], 0.0, 0.0)
    kept = MoEMetrics(mixture.model, groups).read()["experts_per_token_kept_by_layer"]
    widths = iter([round(k * WIDTH / 16) * 16 for k in kept])
    twin = GPT(model, VOCAB, make_ffn=lambda i: MLP(
        model.hidden_size, next(widths) if moe.is_moe_layer(i) else model.ffn_size, model.act))
    twin.init_weights(0)
    return mixture, Engine(twin, optimizer, train, replace(groups, ep_size=1, ep_group=None)), kept


def profile_kinds(step) -> dict[str, float]:
    """Milliseconds of one step by kind of operation (self CPU time of this rank)."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "the rest")
        kinds[kind] += event.self_cpu_time_total / 3000
    return kinds


def worker(rank: int, port: int, rounds: int, answers) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    from megatron.data.loader import Batch
    from megatron.parallel import groups as parallel

    groups = parallel.init(RANKS)
    ids = torch.randint(0, VOCAB, (8, 257), generator=torch.Generator().manual_seed(rank))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(8, 256), None, None)
    mixture, dense, kept = make_engines(groups, batch)
    # A learning rate of 0 keeps the routing as it was measured; the optimizer does all its work all the same.
    functions = {"mixture step": lambda: mixture.step([batch], 0.0, 0.0),
                 "dense step": lambda: dense.step([batch], 0.0, 0.0)}
    seconds = report.interleave(functions, rounds)
    kinds = {name: profile_kinds(f) for name, f in functions.items()}
    if rank == 0:
        answers.put((kept, seconds, kinds))
    parallel.shutdown()


def main() -> int:
    args = report.parser(__doc__).parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    rounds = 5 if args.quick else 25
    processes = [context.Process(target=worker, args=(r, port, rounds, answers)) for r in range(RANKS)]
    for p in processes:
        p.start()
    while answers.empty():
        time.sleep(0.2)
        if any(p.exitcode for p in processes):
            for p in processes:
                p.terminate()
            raise RuntimeError("a rank failed; its message is above")
    kept, seconds, kinds = answers.get()
    for p in processes:
        p.join()
    print("experts per token by mixture layer:", " ".join(f"{k:.2f}" for k in kept), f"of {EXPERTS}")
    code = report.finish(report.compare(seconds, "dense step"), args)
    print(f"\n{'ms per step, rank 0, profiled':32s} {'mixture':>9s} {'dense':>9s} {'difference':>11s}")
    for kind in kinds["dense step"]:
        a, b = kinds["mixture step"][kind], kinds["dense step"][kind]
        print(f"{kind:32s} {a:9.1f} {b:9.1f} {a - b:11.1f}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
