"""Whole training steps: the demo's mixture against dense, and a mixture against transformers' Mixtral.

1. The demo model against the same model with dense layers of equal active width. Two gloo ranks with one thread each,
   bf16, ZeRO 1, experts sharded over both, as in `make demo`. The dense twin's feed-forward width in each mixture layer
   is that layer's measured mean number of experts per token times the expert width, so both do the same multiply-adds.
2. A mixture of Mixtral's shape: `Engine.step` with the trainer's defaults (bf16, ZeRO 1, fp32 master weights and
   gradients) against transformers' MixtralForCausalLM with grouped_mm experts and torch's fused AdamW. All have the
   same weights, and their losses are compared first; all have the balance loss, and clip gradients to the same norm.
   The bar is for the faster peer, in which everything is bf16, weights and both of Adam's moments included: it has no
   master weights. The other one keeps fp32 weights and runs under autocast, which does not know grouped_mm, so that its
   experts multiply in fp32. Each side is a process of its own with two threads; they take turns.

Learning rates are 0, so that the routing stays as it was measured; optimizers do all their work all the same. Below the
ratios stands where the time goes, by kind of operation.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

WIDTH, EXPERTS, THRESHOLD, VOCAB, RANKS = 256, 16, 0.9, 8192, 2
DEMO_BAR, PEER_BAR = 1.25, 0.333
TOLERANCE = 0.01
"""largest difference of the first step's losses, in nats: bf16 moves them by less than 0.001"""
KINDS = {  # the first kind one of whose words is in an operation's name
    # _start and _finish are the two halves of an exchange, which wait for the other rank.
    "communication": (
        "comm",
        "alltoall",
        "allreduce",
        "allgather",
        "c10d",
        "gloo",
        "reduce_scatter",
        "broadcast",
        "_start",
        "_finish",
    ),
    "moving rows": (
        "index",
        "embedding_bag",
        "sort",
        "scatter",
        "gather",
        "cat",
        "nonzero",
        "bincount",
        "bag",
    ),
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("attention",),
    "optimizer": ("adam",),
}


@dataclass(frozen=True)
class Shape:
    """Of the mixture of the second comparison."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    experts: int = 8
    width: int = 512
    topk: int = 2
    vocab: int = 50304
    length: int = 256
    sequences: int = 8

    @property
    def tokens(self) -> int:
        return self.length * self.sequences


QUICK = Shape(layers=2, vocab=4096, length=128, sequences=2)
OURS, THEIRS, AUTOCAST = "our step", "transformers, bf16", "transformers, fp32 weights"
PRECISIONS = {
    OURS: "bf16; master weights, gradients' sums and Adam's moments in fp32",
    THEIRS: "bf16 throughout; no master weights, Adam's moments in bf16",
    AUTOCAST: "bf16 under autocast, experts in fp32; weights, gradients and Adam's moments in fp32",
}
PARTS = ("output and loss", "attention", "gate", "dispatch", "experts", "the rest", "optimizer")
"""rows of the profile; theirs do in `experts` what ours do in `dispatch`"""


def configs():
    """The demo's shapes (examples_deepspeed/MoE/demo.sh)."""
    from megatron.config.schema import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

    model = ModelConfig(
        num_layers=6,
        hidden_size=256,
        num_attention_heads=4,
        seq_length=256,
        init_method_std=0.06,
        ffn_hidden_size=1024,
    )
    moe = MoEConfig(
        num_experts=EXPERTS,
        expert_interval=2,
        gate="threshold",
        moe_ffn_hidden_size=WIDTH,
        moe_expert_parallel_size=RANKS,
    )
    train = TrainConfig(micro_batch_size=8, global_batch_size=8 * RANKS)
    return model, moe, OptimizerConfig(bf16=True), train


def make_engines(groups, batch):
    """(mixture engine, dense engine of equal active width, mean experts per token by layer)."""
    from megatron.config.schema import DeepSpeedConfig
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model
    from megatron.model.gpt import GPT
    from megatron.model.mlp import MLP
    from megatron.moe.metrics import MoEMetrics
    from megatron.training.task import NextTokenLoss

    model, moe, optimizer, train = configs()
    mixture = Engine(
        build_model(
            model, moe, {"threshold": THRESHOLD}, vocab_size=VOCAB, seed=0, groups=groups
        ),
        optimizer,
        DeepSpeedConfig(),
        train,
        groups,
    )
    mixture.step([batch], NextTokenLoss(), 0.0, 0.0)
    kept = MoEMetrics(mixture.model, groups).read()["experts_per_token_by_layer"]
    widths = iter([round(k * WIDTH / 16) * 16 for k in kept])
    twin = GPT(
        model,
        VOCAB,
        make_ffn=lambda i: MLP(
            model.hidden_size,
            next(widths) if moe.is_moe_layer(i) else model.ffn_size,
            model.act,
        ),
    )
    twin.init_weights(0)
    return (
        mixture,
        Engine(
            twin,
            optimizer,
            DeepSpeedConfig(),
            train,
            replace(groups, ep_size=1, ep_group=None),
        ),
        kept,
    )


def profile_kinds(step) -> dict[str, float]:
    """Milliseconds of one step by kind of operation (self CPU time of this rank)."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next(
            (k for k, words in KINDS.items() if any(w in name for w in words)), "the rest"
        )
        kinds[kind] += event.self_cpu_time_total / 3000
    return kinds


def measure_demo(groups, rounds: int):
    """(experts per token, seconds, milliseconds by kind of operation) on rank 0."""
    from megatron.training.task import NextTokenLoss

    batch = make_batch(8, 256, VOCAB, seed=groups.rank)
    mixture, dense, kept = make_engines(groups, batch)
    functions = {
        "mixture step": lambda: mixture.step([batch], NextTokenLoss(), 0.0, 0.0),
        "dense step": lambda: dense.step([batch], NextTokenLoss(), 0.0, 0.0),
    }
    seconds = report.interleave(functions, rounds)
    return kept, seconds, {name: profile_kinds(f) for name, f in functions.items()}


def make_batch(sequences: int, length: int, vocab: int, seed: int):
    import torch

    from megatron.data.loader import Batch

    ids = torch.randint(
        0, vocab, (sequences, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return Batch(
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        torch.ones(sequences, length),
        None,
        None,
    )


def demo_rows(rounds: int) -> list[report.Row]:
    kept, seconds, kinds = report.on_ranks(RANKS, measure_demo, rounds)
    print(
        "demo: experts per token by mixture layer:",
        " ".join(f"{k:.2f}" for k in kept),
        f"of {EXPERTS}",
    )
    print_table("ms per step, rank 0, profiled", kinds)
    return report.compare(seconds, "dense step", {"mixture step": DEMO_BAR})


def print_table(title: str, columns: dict[str, dict[str, float]]) -> None:
    print(f"{title:32s}" + "".join(f"{name:>28s}" for name in columns))
    for line in next(iter(columns.values())):
        print(f"{line:32s}" + "".join(f"{column[line]:28.1f}" for column in columns.values()))
    print(
        f"{'together':32s}"
        + "".join(f"{sum(column.values()):28.1f}" for column in columns.values())
        + "\n"
    )


def our_model(s: Shape, groups):
    """(model of Mixtral's architecture in fp32 with initial weights, configuration of its optimizer and trainer)."""
    from megatron.config.schema import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
    from megatron.model.builder import build_model

    model = ModelConfig(
        num_layers=s.layers,
        hidden_size=s.hidden,
        num_attention_heads=s.heads,
        seq_length=s.length,
        activation="swiglu",
        untie_embeddings_and_output_weights=True,
    )
    moe = MoEConfig(num_experts=s.experts, gate="topk", moe_ffn_hidden_size=s.width)
    gpt = build_model(
        model,
        moe,
        {"topk": s.topk, "norm_topk_prob": True},
        vocab_size=s.vocab,
        seed=0,
        groups=groups,
    )
    return gpt, OptimizerConfig(bf16=True), TrainConfig(micro_batch_size=s.sequences)


def our_step(s: Shape, batch) -> Callable[[], float]:
    """A training step that returns its loss."""
    from megatron.engine import distributed as parallel
    from megatron.training.task import NextTokenLoss

    groups = parallel.init_distributed(1)
    from megatron.config.schema import DeepSpeedConfig
    from megatron.engine.engine import (
        Engine,
    )  # imports DeepSpeed: only after `groups` prepared its environment
    from megatron.training import profile_report, profiler

    model, optimizer, train = our_model(s, groups)
    engine = Engine(model, optimizer, DeepSpeedConfig(), train, groups)
    name_parts(
        engine.model,
        engine.model.norm,
        {
            m: part
            for m, part in profiler.module_parts(engine.model).items()
            if m is not engine.model
        },
    )
    engine.deepspeed.step = in_range(profile_report.PART + "optimizer", engine.deepspeed.step)
    return lambda: float(sum(engine.step([batch], NextTokenLoss(), 0.0, 0.0).values()))


def their_step(s: Shape, batch, autocast: bool) -> Callable[[], float]:
    """The same with transformers' Mixtral and our weights."""
    import torch

    from megatron.parallel.groups import Groups
    from megatron.training import profile_report

    gpt, optimizer, _ = our_model(s, Groups())
    model = their_model(s, gpt)
    model = model.train() if autocast else model.bfloat16().train()
    name_parts(
        model,
        model.model.norm,
        {
            m: part
            for layer in model.model.layers
            for m, part in (
                (layer.self_attn, "attention"),
                (layer.mlp, "dispatch"),
                (layer.mlp.gate, "gate"),
                (layer.mlp.experts, "experts"),
            )
        },
    )
    adamw = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=optimizer.weight_decay, fused=True
    )

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    update = in_range(profile_report.PART + "optimizer", update)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(
                input_ids=batch.tokens_BS, labels=batch.labels_BS, shift_labels=batch.labels_BS
            ).loss
        loss.backward()
        update()
        return float(loss.detach())

    return step


def their_model(s: Shape, gpt):
    """Mixtral with the weights of our model, in fp32."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=s.vocab,
            hidden_size=s.hidden,
            intermediate_size=s.width,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.heads,
            num_local_experts=s.experts,
            num_experts_per_tok=s.topk,
            max_position_embeddings=s.length,
            use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": gpt.config.rotary_base},
            # Their balance loss counts experts per token, ours shares of all choices: theirs is k times as much.
            output_router_logits=True,
            router_aux_loss_coef=0.01 / s.topk,
            experts_implementation="grouped_mm",
        )
    )
    model.load_state_dict(their_weights(gpt.state_dict()))
    return model


def their_weights(ours: dict[str, Any]) -> dict[str, Any]:
    """Our state under transformers' names."""
    import torch

    theirs = {}
    for name, value in ours.items():
        if name.endswith("experts.w3"):
            continue
        if name.endswith("experts.w1"):
            name, value = (
                name.replace("w1", "gate_up_proj"),
                torch.cat([value, ours[name.replace("w1", "w3")]], 1),
            )
        name = name.replace("experts.w2", "experts.down_proj").replace("gate.router", "gate")
        theirs[name if name.startswith("lm_head") else f"model.{name}"] = value
    return theirs


def in_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose operations a profile finds inside a range of that name."""
    import torch

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return inside


def name_parts(model, final_norm, parts: dict) -> None:
    """Have each module's forward pass run in a range of its part, and all that follows the final norm in one."""
    import torch

    from megatron.training.profile_report import PART

    def opener(name: str, open_: list) -> Callable[..., None]:
        def before(*_: Any) -> None:
            open_.append(torch.profiler.record_function(PART + name))
            open_[-1].__enter__()

        return before

    def closer(open_: list) -> Callable[..., None]:
        return lambda *_: open_.pop().__exit__(None, None, None)

    for module, name in parts.items():
        open_: list = []
        module.register_forward_pre_hook(opener(name, open_))
        module.register_forward_hook(closer(open_))
    open_ = []
    final_norm.register_forward_hook(opener("output and loss", open_))
    model.register_forward_hook(closer(open_), prepend=True)


def profile_step(step: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of one step by part of the model, forward and backward together."""
    import torch

    from megatron.training import profile_report

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        in_range(profile_report.STEP, step)()
    took = profile_report.break_down_step(profile_report.spans_of(profiler)).host_ms
    return {part: sum(took[part, phase] for phase in profile_report.PHASES) for part in PARTS}


def serve(side: str, shape: Shape, pipe) -> None:
    """Answer "step" with its loss and "profile" with the milliseconds of its parts, until there are no more orders."""
    os.environ.update(
        OMP_NUM_THREADS="2", DS_ACCELERATOR="cpu", KINETO_LOG_LEVEL="99"
    )  # 99: a quiet profiler
    import torch

    torch.set_num_threads(2)
    batch = make_batch(shape.sequences, shape.length, shape.vocab, seed=0)
    step = (
        our_step(shape, batch)
        if side == OURS
        else their_step(shape, batch, autocast=side == AUTOCAST)
    )
    jobs = {"step": step, "profile": lambda: profile_step(step)}
    while order := pipe.recv():
        pipe.send(jobs[order]())


def check_losses(losses: dict[str, float]) -> None:
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= TOLERANCE for loss in losses.values()):
        raise RuntimeError(
            f"from the same weights the models have different losses: {losses}; allowed {TOLERANCE}"
        )


def peer_rows(shape: Shape, rounds: int, bar: float | None) -> list[report.Row]:
    """Our step against transformers', in processes of their own that take turns."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in PRECISIONS:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, shape, theirs), daemon=True).start()
        theirs.close()

    def ask(side: str, order: str) -> Any:
        pipes[side].send(order)
        return pipes[side].recv()  # EOFError when the process has died; its message is above

    losses = {side: ask(side, "step") for side in pipes}
    print("peer:", ", ".join(f"{name} {number}" for name, number in asdict(shape).items()))
    for side, precision in PRECISIONS.items():
        print(f"{side}: {precision}; loss of the first step {losses[side]:.4f}")
    check_losses(losses)
    seconds = report.interleave(
        {side: lambda side=side: ask(side, "step") for side in pipes}, rounds, warmup=2
    )
    for side, values in seconds.items():
        median = statistics.median(values)
        print(f"{side}: {1000 * median:.0f} ms per step, {shape.tokens / median:,.0f} tokens/s")
    print_table("ms per step, profiled", {side: ask(side, "profile") for side in pipes})
    for pipe in pipes.values():
        pipe.send(None)
    rows = report.compare({n: seconds[n] for n in (OURS, THEIRS)}, THEIRS, {OURS: bar})
    return rows + report.compare({n: seconds[n] for n in (OURS, AUTOCAST)}, AUTOCAST)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--part",
        nargs="+",
        choices=("demo", "peer"),
        default=("demo", "peer"),
        help="which comparison (default: both)",
    )
    args = parser.parse_args()
    rows = []
    if "demo" in args.part:
        rows += demo_rows(5 if args.quick else 25)
    if "peer" in args.part:
        rows += peer_rows(QUICK, 3, None) if args.quick else peer_rows(Shape(), 25, PEER_BAR)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
