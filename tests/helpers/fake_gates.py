"""Config classes of gates that do not exist, and the functions that tests of the parser need."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config import cli
from megatron.config.fields import require
from megatron.config.schema import RunConfig


@dataclass(frozen=True)
class TopK:
    topk: int = 2
    """experts per token, 100% of
    them"""
    score: str = field(
        default="softmax",
        metadata={"flags": ("--score_fn",), "choices": ("softmax", "sigmoid")},
    )
    """score of an expert"""
    loss_coeff: float = 0.01
    """coefficient of the balance loss"""
    renormalise: bool = True
    """divide by the sum"""
    levels: tuple[int, ...] = (1, 2)
    limit: int | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        require(self.topk > 0, "--topk", self.topk, "a positive integer")


@dataclass(frozen=True)
class Threshold:
    threshold: float = 0.9
    topk: int = 0


@dataclass(frozen=True)
class Mass(Threshold):
    mass: float = 1.0


GATES = {
    "topk": TopK,
    "threshold": Threshold,
    "mass": Mass,
    "hash": dataclasses.make_dataclass("Hash", []),
}


def gate_config(name: str) -> type:
    """Return the Config of a gate; the same interface as that of the real gates."""
    require(name in GATES, "--gate", name, " ".join(GATES))
    return GATES[name]


def parse(*argv: str) -> RunConfig:
    """Parse a command line of a run with the fake gates."""
    return cli.parse(argv, gate_config, lambda: list(GATES), read_hf_config=lambda folder: {})


def parse_moe(*argv: str) -> RunConfig:
    """Parse a command line as `parse` does, with experts, which gate options need."""
    return parse("--num-experts", "4", *argv)


def run_json(tmp_path: Path, content: Any) -> str:
    """Write a run.json from text or from JSON content, and return its path."""
    path = tmp_path / "run.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    return str(path)
