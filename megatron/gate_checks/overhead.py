"""The share of a layer's time that its gate takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from megatron.config.schema import ModelConfig, MoEConfig
from megatron.gate_checks.cases import NUM_TOKEN_IDS, GateCase
from megatron.model.builder import make_moe_layer
from megatron.moe.ffn import FFNContext
from megatron.moe.layer import MoELayer
from megatron.parallel.groups import Groups

_TOKENS = 1024
HIDDEN = 256
WIDTH = 512
PEER_WIDTH = 1
ROUNDS = 7


def router_share(case: GateCase) -> float:
    """Measure forward and backward of the gate against those of its layer, interleaved.

    Returns:
        The median over rounds of the ratio, for 1,024 tokens of width 256 in fp32.
    """
    layer = _layer(case)
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(4, _TOKENS // 4, HIDDEN, generator=generator).requires_grad_()
    ids_BS = torch.randint(0, NUM_TOKEN_IDS, (4, _TOKENS // 4), generator=generator)
    context = FFNContext(ids_BS)

    def run_gate() -> None:
        out = layer.gate(layer._gate_input(x_BSD, context))
        total = out.weight_A.sum() + out.aux_loss
        if total.requires_grad:
            total.backward()

    def run_layer() -> None:
        out = layer(x_BSD, context)
        (out.y.sum() + out.aux_loss).backward()
        layer.reset_step_state()

    run_layer()
    ratios = [_seconds(run_gate) / _seconds(run_layer) for _ in range(ROUNDS)]
    return statistics.median(ratios)


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _layer(case: GateCase) -> MoELayer:
    gate = case.gate(hidden_size=HIDDEN, layer=0, num_moe_layers=1, init_std=1 / HIDDEN**0.5)
    model = ModelConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, activation="gelu"
    )
    width = PEER_WIDTH if gate.expert_kind == "peer" else WIDTH
    moe = MoEConfig(num_experts=case.num_experts, moe_ffn_hidden_size=width, gate=case.name)
    return make_moe_layer(gate, model, moe, layer=0, seed=0, groups=Groups())
