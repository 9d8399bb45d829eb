"""Full training steps: the demo's MoE model against dense, and ours against Mixtral.

1. The demo model against the same model with dense layers of equal active width. Two
   gloo ranks with one thread each, bf16, ZeRO 1, experts sharded over both, as in `make
   demo`. The feed-forward width of the dense model in each MoE layer is that layer's
   measured mean number of experts per token times the expert width, so both do the same
   multiply-adds.
2. The demo model with gradients reduced over the ranks in fp32, the default, against
   `--grad-reduce-in-bf16`.
3. A model of Mixtral's shape: `Engine.step` with the trainer's defaults (bf16, ZeRO 1,
   fp32 master weights and gradients) against transformers' MixtralForCausalLM with
   grouped_mm experts and torch's fused AdamW. All have the same weights, and their
   losses are compared first; all have the balance loss, and clip gradients to the same
   norm. The bar is for the faster peer, in which everything is bf16, including both of
   Adam's moments: it has no master weights. The other one keeps fp32 weights and runs
   under autocast, which does not cover grouped_mm, so that its experts multiply in
   fp32. Each side is a process of its own with two threads; they take turns.

Learning rates are 0, so that the routing stays as measured; optimizers do all their
work nevertheless. Below the ratios is where the time goes, by kind of operation.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

WIDTH = 256
EXPERTS = 16
THRESHOLD = 0.9
VOCAB = 8192
RANKS = 2
DEMO_BAR = 1.25
REDUCTION_BAR = 1.03
PEER_BAR = 0.333
TOLERANCE = 0.01
"""Largest difference of the first losses, in nats. bf16 causes less than 0.001."""
KINDS = {
    # _start and _finish are the two halves of an exchange, which wait for the other
    # rank.
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
"""Words in the names of operations, by kind. The first kind that has a match counts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model in the second comparison."""

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
OURS = "our step"
THEIRS = "transformers, bf16"
AUTOCAST = "transformers, fp32 weights"
PRECISIONS = {
    OURS: "bf16; master weights, gradients' sums and Adam's moments in fp32",
    THEIRS: "bf16 throughout; no master weights, Adam's moments in bf16",
    AUTOCAST: "bf16 under autocast, experts in fp32; weights, gradients and Adam's moments in fp32",
}
PARTS = ("output and loss", "attention", "gate", "dispatch", "experts", "the rest", "optimizer")
"""Rows of the profile. What ours does in `dispatch`, theirs does in `experts`."""


def configs():
    """The demo's configuration (examples_deepspeed/MoE/demo.sh)."""
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
    """Build the MoE engine and the dense engine of equal active width.

    Returns:
        (MoE engine, dense engine, mean experts per token by MoE layer).
    """
    from megatron.config.schema import DeepSpeedConfig
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model
    from megatron.model.gpt import GPT
    from megatron.model.mlp import MLP
    from megatron.moe.metrics import MoEMetrics
    from megatron.training.task import NextTokenLoss

    model, moe, optimizer, train = configs()
    options = {"threshold": {"threshold": THRESHOLD}}
    moe_model = build_model(model, moe, options, vocab_size=VOCAB, seed=0, groups=groups)
    moe_engine = Engine(moe_model, optimizer, DeepSpeedConfig(), train, groups)
    moe_engine.step([batch], NextTokenLoss(), 0.0, 0.0)
    metrics = MoEMetrics(moe_engine.model, groups).read()
    experts_per_token = metrics["experts_per_token_by_layer"]
    widths = iter([round(k * WIDTH / 16) * 16 for k in experts_per_token])

    def make_ffn(layer: int) -> MLP:
        width = next(widths) if moe.is_moe_layer(layer) else model.ffn_size
        return MLP(model.hidden_size, width, model.act)

    dense_model = GPT(model, VOCAB, make_ffn=make_ffn)
    dense_model.init_weights(0)
    unsharded = replace(groups, ep_size=1, ep_group=None)
    return (
        moe_engine,
        Engine(dense_model, optimizer, DeepSpeedConfig(), train, unsharded),
        experts_per_token,
    )


def profile_kinds(step) -> dict[str, float]:
    """Measure the milliseconds of one step by kind of operation (self CPU time)."""
    import torch

    steps = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / steps
    return kinds


def kind_of(operation: str) -> str:
    """The kind of an operation, by its name."""
    name = operation.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "the rest"


def measure_demo(groups, rounds: int):
    """On a rank: measure both models.

    Returns:
        (experts per token by MoE layer, seconds by model and round, milliseconds by
        model and kind of operation).
    """
    from megatron.training.task import NextTokenLoss

    batch = make_batch(8, 256, VOCAB, seed=groups.rank)
    moe_engine, dense_engine, experts_per_token = make_engines(groups, batch)
    steps = {
        "MoE step": lambda: moe_engine.step([batch], NextTokenLoss(), 0.0, 0.0),
        "dense step": lambda: dense_engine.step([batch], NextTokenLoss(), 0.0, 0.0),
    }
    seconds = report.interleave(steps, rounds)
    kinds = {name: profile_kinds(step) for name, step in steps.items()}
    return experts_per_token, seconds, kinds


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
    """Compare the demo's model with the dense one."""
    experts_per_token, seconds, kinds = report.on_ranks(RANKS, measure_demo, rounds)
    by_layer = " ".join(f"{k:.2f}" for k in experts_per_token)
    print(f"demo: experts per token by MoE layer: {by_layer} of {EXPERTS}")
    print_table("ms per step, rank 0, profiled", kinds)
    return report.compare(seconds, "dense step", {"MoE step": DEMO_BAR})


def measure_reduction(groups, rounds: int) -> dict[str, list[float]]:
    """On a rank: measure both ways to reduce gradients; seconds by name and round."""
    from megatron.config.schema import DeepSpeedConfig
    from megatron.engine.engine import Engine
    from megatron.model.builder import build_model
    from megatron.training.task import NextTokenLoss

    batch = make_batch(8, 256, VOCAB, seed=groups.rank)
    model, moe, optimizer, train = configs()
    steps = {}
    for name, in_bf16 in (("reduced in fp32", False), ("reduced in bf16", True)):
        options = {"threshold": {"threshold": THRESHOLD}}
        gpt = build_model(model, moe, options, vocab_size=VOCAB, seed=0, groups=groups)
        reduction = replace(optimizer, grad_reduce_in_bf16=in_bf16)
        engine = Engine(gpt, reduction, DeepSpeedConfig(), train, groups)
        steps[name] = partial(engine.step, [batch], NextTokenLoss(), 0.0, 0.0)
    return report.interleave(steps, rounds)


def reduction_rows(rounds: int) -> list[report.Row]:
    """Compare reductions of gradients in fp32 and bf16."""
    seconds = report.on_ranks(RANKS, measure_reduction, rounds)
    return report.compare(seconds, "reduced in bf16", {"reduced in fp32": REDUCTION_BAR})


def print_table(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Print a table of numbers with a row of their sums."""
    sums = {name: sum(column.values()) for name, column in columns.items()}
    print(f"{title:32s}" + "".join(f"{name:>28s}" for name in columns))
    for label in next(iter(columns.values())):
        cells = "".join(f"{column[label]:28.1f}" for column in columns.values())
        print(f"{label:32s}{cells}")
    print(f"{'together':32s}" + "".join(f"{total:28.1f}" for total in sums.values()) + "\n")


def our_model(s: Shape, groups):
    """Build a model of Mixtral's architecture in fp32 with initial weights.

    Returns:
        (model, configuration of its optimizer, configuration of its trainer).
    """
    from megatron.config.schema import (
        DeepSpeedConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from megatron.model.builder import build_model

    model = ModelConfig(
        num_layers=s.layers,
        hidden_size=s.hidden,
        num_attention_heads=s.heads,
        seq_length=s.length,
        activation="swiglu",
        untie_embeddings_and_output_weights=True,
    )
    moe = MoEConfig(
        num_experts=s.experts,
        gate="topk",
        moe_ffn_hidden_size=s.width,
        # transformers averages over layers, too: it pools their tokens.
        moe_aux_loss_reduction="mean",
    )
    gpt = build_model(
        model,
        moe,
        {"topk": {"topk": s.topk, "norm_topk_prob": True}},
        vocab_size=s.vocab,
        seed=0,
        groups=groups,
    )
    train = TrainConfig(micro_batch_size=s.sequences)
    return gpt, OptimizerConfig(bf16=True), DeepSpeedConfig(), train


def our_step(s: Shape, batch) -> Callable[[], float]:
    """Build our side: a function that does a training step and returns its loss."""
    from megatron.engine import distributed
    from megatron.training.task import NextTokenLoss

    groups = distributed.init_distributed(1)
    # It imports DeepSpeed, whose environment `init_distributed` prepares.
    from megatron.engine.engine import Engine
    from megatron.training import profile_report, profiler

    engine = Engine(*our_model(s, groups), groups)
    parts = profiler.module_parts(engine.model)
    del parts[engine.model]
    name_parts(engine.model, engine.model.norm, parts)
    engine.deepspeed.step = in_range(profile_report.PART + "optimizer", engine.deepspeed.step)
    return lambda: float(sum(engine.step([batch], NextTokenLoss(), 0.0, 0.0).values()))


def their_step(s: Shape, batch, autocast: bool) -> Callable[[], float]:
    """Build the other side: transformers' Mixtral with our weights."""
    import torch

    from megatron.parallel.groups import Groups
    from megatron.training import profile_report

    gpt, optimizer, *_ = our_model(s, Groups())
    model = their_model(s, gpt)
    if not autocast:
        model = model.bfloat16()
    model.train()
    parts = {}
    for layer in model.model.layers:
        parts[layer.self_attn] = "attention"
        parts[layer.mlp] = "dispatch"
        parts[layer.mlp.gate] = "gate"
        parts[layer.mlp.experts] = "experts"
    name_parts(model, model.model.norm, parts)
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
    """Build transformers' Mixtral with the weights of our model, in fp32."""
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
            # Their balance loss counts experts per token, ours shares of all choices:
            # theirs is k times as large.
            output_router_logits=True,
            router_aux_loss_coef=0.01 / s.topk,
            experts_implementation="grouped_mm",
        )
    )
    model.load_state_dict(their_weights(gpt.state_dict()))
    return model


def their_weights(ours: dict[str, Any]) -> dict[str, Any]:
    """Rename our state to transformers' names; gate and up projection are joined."""
    import torch

    theirs = {}
    for name, value in ours.items():
        if name.endswith("experts.w3"):
            continue
        if name.endswith("experts.w1"):
            value = torch.cat([value, ours[name.replace("w1", "w3")]], 1)
            name = name.replace("w1", "gate_up_proj")
        name = name.replace("experts.w2", "experts.down_proj").replace("gate.router", "gate")
        theirs[name if name.startswith("lm_head") else f"model.{name}"] = value
    return theirs


def in_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it runs in a profiler range of this name."""
    import torch

    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return inside


def name_parts(model, final_norm, parts: dict) -> None:
    """Run each module's forward pass in a range of its part until the process ends.

    What follows the final norm is a range, too.
    """
    from megatron.training import profiler

    never_closed = contextlib.ExitStack()
    for module, part in parts.items():
        profiler.name_forward(module, part, never_closed)
    profiler.name_output(model, final_norm, never_closed)


def profile_step(step: Callable[[], float]) -> dict[str, float]:
    """Measure the milliseconds of one step by part, forward and backward together."""
    import torch

    from megatron.training import profile_report

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        in_range(profile_report.STEP, step)()
    host_ms = profile_report.break_down_step(profile_report.spans_of(profiler)).host_ms
    times = dict.fromkeys(PARTS, 0.0)
    for part in PARTS:
        times[part] = sum(host_ms[part, phase] for phase in profile_report.PHASES)
    return times


def serve(side: str, shape: Shape, pipe) -> None:
    """In a process of its own: answer requests for a step or a profile of this side.

    The answer to "step" is its loss, that to "profile" the milliseconds of its parts.
    An empty request ends the process.
    """
    os.environ.update(
        OMP_NUM_THREADS="2",
        DS_ACCELERATOR="cpu",
        KINETO_LOG_LEVEL="99",  # silences torch's profiler
    )
    import torch

    torch.set_num_threads(2)
    batch = make_batch(shape.sequences, shape.length, shape.vocab, seed=0)
    if side == OURS:
        step = our_step(shape, batch)
    else:
        step = their_step(shape, batch, autocast=side == AUTOCAST)
    answers = {"step": step, "profile": lambda: profile_step(step)}
    while True:
        request = pipe.recv()
        if not request:
            return
        pipe.send(answers[request]())


def check_losses(losses: dict[str, float]) -> None:
    """Raise RuntimeError if the first losses differ by more than `TOLERANCE`."""
    first = next(iter(losses.values()))
    if not all(abs(loss - first) <= TOLERANCE for loss in losses.values()):
        raise RuntimeError(
            f"from the same weights the models have different losses: {losses}; allowed {TOLERANCE}"
        )


def peer_rows(shape: Shape, rounds: int, bar: float | None) -> list[report.Row]:
    """Compare our step with transformers', in processes that take turns."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in PRECISIONS:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, shape, theirs), daemon=True).start()
        theirs.close()

    def ask(side: str, request: str) -> Any:
        pipes[side].send(request)
        # EOFError means that the process has died; its message is above.
        return pipes[side].recv()

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
        choices=("demo", "reduction", "peer"),
        default=("demo", "reduction", "peer"),
        help="which comparison (default: both)",
    )
    args = parser.parse_args()
    rows = []
    if "demo" in args.part:
        rows += demo_rows(5 if args.quick else 25)
    if "reduction" in args.part:
        rows += reduction_rows(5 if args.quick else 41)
    if "peer" in args.part:
        rows += peer_rows(QUICK, 3, None) if args.quick else peer_rows(Shape(), 25, PEER_BAR)
    return report.finish(rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
