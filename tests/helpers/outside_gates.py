"""Gates outside the tree for tests: their source text, and cleaning up after their import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron.moe.experts.expert_registry import EXPERT_TYPES
from megatron.moe.experts.expert_type import available_expert_types
from megatron.moe.gate_registry import REGISTRY

GATE = '''\
"""A gate for tests: softmax top-1 with a z-loss, which counts the tokens that it saw."""

from dataclasses import dataclass

import torch

from megatron.moe import Gate, GateInput, LossConfig, Routing, linear_fp32, z_loss


class OutsideGate(Gate, name="NAME"):
    @dataclass(frozen=True)
    class Config(LossConfig):
        shift: int = 0
        """number added to the expert's"""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inp: GateInput) -> Routing:
        logits_TE = linear_fp32(inp.x_TD, self.router)
        weight_T, expert_T = logits_TE.softmax(-1).max(-1)
        expert_T = (expert_T + self.config.shift) % self.num_experts
        token_T = torch.arange(len(expert_T), device=expert_T.device)
        loss = self.config.z_loss_coeff * z_loss(logits_TE)
        return Routing(token_T, expert_T, weight_T, loss, token_major=True)

    def post_optimizer_step(self, step):
        self.seen += step.num_tokens
'''


def write_gate(folder: Path, name: str, *, file: str = "", before: str = "") -> Path:
    """Write the file of a gate `name` whose options are those of `LossConfig`, and `shift`.

    Args:
        file: its name; "": that of the gate.
        before: lines to put in front of it.
    """
    path = folder / (file or f"{name}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + GATE.replace("NAME", name), encoding="utf-8")
    return path


@contextlib.contextmanager
def restored_registry() -> Iterator[None]:
    """Forget gates and expert types that are imported in the body of the `with` statement."""
    available_expert_types()
    expert_types = dict(EXPERT_TYPES.classes)
    before = {
        name: dict(value) for name, value in vars(REGISTRY).items() if isinstance(value, dict)
    }
    try:
        yield
    finally:
        vars(REGISTRY).update(before)
        EXPERT_TYPES.classes = expert_types
