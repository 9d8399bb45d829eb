"""What a run is: saved with every checkpoint and compared when one is loaded."""

from __future__ import annotations

import functools
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron import __version__
from megatron.config.schema import RunConfig
from megatron.data.sampling.blend import parse_blend
from megatron.io.sha256 import file_sha256
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer


@dataclass
class TrainingProgress:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")


@dataclass(frozen=True)
class RunMetadata:
    """What a run is."""

    config: RunConfig
    identity: dict[str, Any]
    """the tokenizer's name, vocab_size and fingerprint"""
    topology: dict[str, Any] = field(default_factory=dict)
    """ranks, expert_parallel_size, zero_stage, precision"""
    global_batch_size: int = 0
    iterations: int = 0
    """of the whole run"""
    data: dict[str, Any] = field(default_factory=dict)
    """by prefix: sizes of .bin and .idx, SHA-256 of the sidecar"""

    @staticmethod
    def of(
        config: RunConfig,
        groups: Groups,
        tokenizer: Tokenizer,
        global_batch_size: int = 0,
        iterations: int = 0,
    ) -> RunMetadata:
        identity = {
            f"tokenizer_{n}": getattr(tokenizer, n)
            for n in ("name", "vocab_size", "fingerprint")
        }
        topology = {
            "ranks": groups.world_size,
            "expert_parallel_size": groups.ep_size,
            "zero_stage": config.deepspeed.zero_stage,
            "precision": config.optimizer.precision,
        }
        return RunMetadata(
            config, identity, topology, global_batch_size, iterations, describe_data(config)
        )

    def state(self) -> dict[str, Any]:
        """What state.json says of the run; the configuration is in run.json."""
        content = {
            f: getattr(self, f)
            for f in ("identity", "topology", "global_batch_size", "iterations", "data")
        }
        return {
            **content,
            "versions": versions(),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    @staticmethod
    def from_state(config: RunConfig, state: dict[str, Any]) -> RunMetadata:
        """The inverse of `state`."""
        return RunMetadata(
            config,
            *(
                state[f]
                for f in ("identity", "topology", "global_batch_size", "iterations", "data")
            ),
        )


@functools.cache
def versions() -> dict[str, str]:
    """Of this program, Python and the packages that results depend on."""
    return {
        "moe-megatron": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def describe_data(config: RunConfig) -> dict[str, Any]:
    """By prefix of the run's shards: the sizes of .bin and .idx, and the SHA-256 of the sidecar, if there is one."""
    described = {}
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for _, prefix in parse_blend(getattr(config.data, name), f"--{name.replace('_', '-')}"):
            files = {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json")}
            entry = {
                f"{kind}_bytes": files[kind].stat().st_size
                for kind in ("bin", "idx")
                if files[kind].is_file()
            }
            if files["json"].is_file():
                entry["sidecar_sha256"] = file_sha256(files["json"])
            described[prefix] = entry
    return described


def progress_of(state: dict[str, Any]) -> TrainingProgress:
    """The progress that state.json tells."""
    return TrainingProgress(
        **{name: state["progress"][name] for name in asdict(TrainingProgress())}
    )
