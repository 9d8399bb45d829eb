"""Cost of gates: share of a layer's time, and whether compute follows the routing.

One layer in one process, bf16 with the gate in fp32, forward and backward, two threads.
Three tables:

1. Every gate alone (forward and backward of its own outputs) against its complete
   layer.
2. threshold and remoe at several mean numbers of experts per token: time against the
   line through the origin that fits best (least squares, round by round), as the larger
   of the ratio and its inverse: 1.25 is 25 % off.
3. moepp with half of its choices on zero-computation experts, and with none, against
   topk of the same k.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

TOKENS = 4096
HIDDEN = 512
WIDTH = 1024
EXPERTS = 16
TOPK = 4
VOCAB = 8192
PEER_EXPERTS = 128**2
SINGLE = ("hash", "base")
"""Gates with one expert per token: they get EXPERTS / TOPK experts, TOPK times as
wide."""


def make_layer(name: str):
    """Build a layer of gate `name` with the same active and total width as the others.

    PEER's layer has 128 hidden units per token.
    """
    import torch

    from megatron.config.schema import ModelConfig, MoEConfig
    from megatron.model.builder import make_moe_layer
    from megatron.moe.gate import create_gate, gate_config_class
    from megatron.parallel.groups import Groups

    experts = EXPERTS
    width = WIDTH
    options = {}
    if name in SINGLE:
        experts = EXPERTS // TOPK
        width = WIDTH * TOPK
    if name == "peer":
        experts = PEER_EXPERTS
        width = 1
        options = {"peer_num_heads": 8, "peer_topk": 16}
    if name not in ("threshold", *SINGLE) and hasattr(gate_config_class(name), "topk"):
        options = {"topk": TOPK}
    gate = create_gate(
        name,
        hidden_size=HIDDEN,
        num_experts=experts,
        vocab_size=VOCAB,
        init_std=1.5 / HIDDEN**0.5,
        **options,
    )
    model = ModelConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, activation="gelu"
    )
    layer = make_moe_layer(
        gate,
        model,
        MoEConfig(num_experts=experts, moe_ffn_hidden_size=width, gate=name),
        layer=0,
        seed=0,
        groups=Groups(),
    )
    layer.to(torch.bfloat16)
    layer.gate.float()
    return layer


def make_inputs():
    """Return hidden states and token ids.

    The first feature of every token is 1, so that a router's first column is a bias.
    """
    import torch

    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, TOKENS // 8, HIDDEN, generator=g)
    x[..., 0] = 1.0
    return x.bfloat16(), torch.randint(0, VOCAB, (8, TOKENS // 8), generator=g)


def run_layer(layer, x, ids) -> Callable[[], None]:
    """Return a function that runs forward and backward of a layer."""
    from megatron.moe.ffn import FFNContext

    x = x.clone().requires_grad_()

    def step() -> None:
        out = layer(x, FFNContext(ids))
        layer.zero_grad(set_to_none=True)
        (out.y.float().sum() + out.aux_loss).backward()
        layer.counters[True].clear()
        layer.reset_step_state()

    return step


def run_gate(layer, x, ids) -> Callable[[], None]:
    """Return a function that runs forward and backward of a layer's gate alone."""
    from megatron.moe.ffn import FFNContext

    x = x.clone().requires_grad_()
    inp = layer._gate_input(x, FFNContext(ids))

    def step() -> None:
        out = layer.gate(inp)
        total = out.weight_A.sum() + out.aux_loss
        layer.zero_grad(set_to_none=True)
        if total.requires_grad:
            total.backward()

    return step


def experts_per_token(layer, x, ids) -> tuple[float, float]:
    """Return the routed and the zero-computation experts per token, without
    capacity."""
    import torch

    from megatron.moe.ffn import FFNContext

    with torch.no_grad():
        expert_A = layer.gate(layer._gate_input(x, FFNContext(ids))).expert_A
    routed = int((expert_A < layer.gate.num_experts).sum())
    return routed / TOKENS, (len(expert_A) - routed) / TOKENS


def set_bias(layer, rows: slice, value: float) -> None:
    """Shift the logits of some choices by `value` (the first feature of every token is
    1)."""
    layer.gate.router.weight.data[rows, 0] = value


def search(measure: Callable[[float], float], target: float, low: float, high: float) -> None:
    """Bisect for the argument at which `measure` reaches the target, and leave it set.

    `measure` sets its argument and must increase with it.
    """
    for _ in range(16):
        middle = (low + high) / 2
        if measure(middle) < target:
            low = middle
        else:
            high = middle


def gate_shares(x, ids, rounds: int) -> list[report.Row]:
    """Compare every gate with its layer."""
    from megatron.moe.gate import available_gates

    rows = []
    for name in available_gates():
        layer = make_layer(name)
        functions = {
            f"{name}: gate": run_gate(layer, x, ids),
            f"{name}: layer": run_layer(layer, x, ids),
        }
        rows += report.compare(report.interleave(functions, rounds, warmup=2), f"{name}: layer")
    return rows


def variable_compute(name: str, x, ids, rounds: int) -> list[report.Row]:
    """Compare times at 2 to 12 of 16 experts per token with proportional ones."""
    layers = {}
    for target in (2, 4, 8, 12):
        layer = make_layer(name)
        if name == "threshold":

            def measure(threshold, layer=layer):
                object.__setattr__(layer.gate.config, "threshold", threshold)
                return experts_per_token(layer, x, ids)[0]

            search(measure, target, 0.0, 1.0)
        else:

            def measure(bias, layer=layer):
                set_bias(layer, slice(None), bias)
                return experts_per_token(layer, x, ids)[0]

            search(measure, target, -8.0, 8.0)
        layers[experts_per_token(layer, x, ids)[0]] = layer
    functions = {
        f"{name}, {k:.1f} experts per token": run_layer(layer, x, ids)
        for k, layer in layers.items()
    }
    return against_line(list(layers), report.interleave(functions, rounds, warmup=2))


def least_squares_slope(x: list[float], y: Sequence[float]) -> float:
    """Return the slope of the line through the origin that fits best."""
    products = sum(a * b for a, b in zip(x, y, strict=True))
    return products / sum(a * a for a in x)


def against_line(experts: list[float], seconds: dict[str, list[float]]) -> list[report.Row]:
    """Compute how far each time is from proportional to the number of experts."""
    rounds = list(zip(*seconds.values(), strict=True))
    slopes = [least_squares_slope(experts, times) for times in rounds]
    rows = []
    for k, (label, times) in zip(experts, seconds.items(), strict=True):
        ratios = [t / (slope * k) for t, slope in zip(times, slopes, strict=True)]
        rows.append(report.row(label, "proportional", [max(r, 1 / r) for r in ratios], 1.25))
    return rows


def zero_computation(x, ids, rounds: int) -> list[report.Row]:
    """Compare moepp with and without zero-computation choices with topk."""
    functions = {f"topk, k {TOPK}": run_layer(make_layer("topk"), x, ids)}
    for share in (0.0, 0.5):
        layer = make_layer("moepp")

        def measure(bias, layer=layer):
            set_bias(layer, slice(EXPERTS, None), bias)
            return experts_per_token(layer, x, ids)[1] / TOPK

        if share:
            search(measure, share, -8.0, 8.0)
        else:
            measure(-100.0)
        reached = experts_per_token(layer, x, ids)[1] / TOPK
        functions[f"moepp, {reached:.0%} without computation"] = run_layer(layer, x, ids)
    base, _, half = functions
    return report.compare(report.interleave(functions, rounds, warmup=2), base, {half: 0.65})


def main() -> int:
    args = report.parser(__doc__).parse_args()
    import torch

    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message=".*future")
    x, ids = make_inputs()
    print(
        f"{TOKENS} tokens, hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, k {TOPK}, gelu; "
        f"peer: {PEER_EXPERTS} experts of width 1"
    )
    rounds = 3 if args.quick else 21
    rows = gate_shares(x, ids, rounds)
    for name in ("threshold", "remoe"):
        rows += variable_compute(name, x, ids, rounds)
    return report.finish(rows + zero_computation(x, ids, rounds), args)


if __name__ == "__main__":
    raise SystemExit(main())
