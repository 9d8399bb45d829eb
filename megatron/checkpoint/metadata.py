"""Metadata of a run: saved with every checkpoint, and compared when a checkpoint is loaded."""

from __future__ import annotations

import functools
import platform
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from megatron import __version__
from megatron.checkpoint.gate_code import describe_expert_types, describe_gates
from megatron.config.fields import flag_name
from megatron.config.schema import RunConfig
from megatron.data.sampling.blend import parse_blend
from megatron.io.content_id import content_id
from megatron.io.sha256 import file_sha256
from megatron.parallel.background import BackgroundTask
from megatron.parallel.groups import Groups
from megatron.tokenizer.base import Tokenizer

_PACKAGES = ("torch", "deepspeed", "numpy")
_DATA_FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_STATE_FIELDS = ("identity", "topology", "global_batch_size", "iterations", "data")
# Fields that checkpoints of earlier versions lack.
_NEW_STATE_FIELDS = ("samples", "gates", "expert_types")


class Position(NamedTuple):
    """A point of a run, or the length of a part of it, in each of the units."""

    iterations: int
    samples: int
    tokens: int


@dataclass
class TrainingProgress:
    """Progress of a run. The field names are keys of state.json."""

    iteration: int = 0
    """Optimizer steps that were taken, including skipped ones"""
    consumed_samples: int = 0
    """Samples of all ranks that were trained on"""
    consumed_tokens: int = 0
    """Tokens of all ranks that were trained on"""
    batch_changes: list[Position] = field(default_factory=list)
    """Positions from which on a step had another number of samples or tokens than before"""

    @staticmethod
    def from_state(state: dict[str, Any]) -> TrainingProgress:
        """Read the progress from the content of state.json."""
        saved = state["progress"]
        names = [f.name for f in fields(TrainingProgress) if f.name != "batch_changes"]
        changes = [Position(*change) for change in saved.get("batch_changes", [])]
        return TrainingProgress(**{name: saved[name] for name in names}, batch_changes=changes)

    @property
    def position(self) -> Position:
        return Position(self.iteration, self.consumed_samples, self.consumed_tokens)

    def add_step(self, step: Position) -> None:
        """Count an optimizer step of this size."""
        last_change = Position(0, 0, 0)
        if self.batch_changes:
            last_change = self.batch_changes[-1]
        steps = self.iteration - last_change.iterations
        expected = [start + steps * size for start, size in zip(last_change, step)]
        if expected != list(self.position):
            self.batch_changes.append(self.position)
        self.iteration += step.iterations
        self.consumed_samples += step.samples
        self.consumed_tokens += step.tokens

    def to_state(self) -> dict[str, Any]:
        """Return the progress as it is stored in state.json, without changes if there are none."""
        state = asdict(self)
        if not self.batch_changes:
            del state["batch_changes"]
        return state


@dataclass(frozen=True)
class RunMetadata:
    """Description of a run. The field names but `config` are keys of state.json."""

    config: RunConfig
    """Resolved configuration, stored in run.json"""
    identity: dict[str, Any]
    """Tokenizer: tokenizer_name, tokenizer_vocab_size, tokenizer_fingerprint"""
    topology: dict[str, Any] = field(default_factory=dict)
    """Parallelism: ranks, expert_parallel_size, zero_stage, precision"""
    global_batch_size: int = 0
    """Samples of all ranks in an optimizer step"""
    iterations: int = 0
    """Length of the full run in optimizer steps"""
    data: dict[str, Any] = field(default_factory=dict)
    """Data files by prefix, see `describe_data`"""
    samples: int = 0
    """Number of training samples that the data were built for; 0: not recorded"""
    gates: dict[str, dict[str, str]] = field(default_factory=dict)
    """Origin of each gate by name, see `describe_gates`; empty: not recorded, or no experts"""
    expert_types: dict[str, dict[str, str]] = field(default_factory=dict)
    """Likewise of the expert type, see `describe_expert_types`"""

    @staticmethod
    def of(
        config: RunConfig,
        groups: Groups,
        tokenizer: Tokenizer,
        global_batch_size: int = 0,
        iterations: int = 0,
        samples: int = 0,
        data: dict[str, Any] | None = None,
    ) -> RunMetadata:
        """Describe the current run.

        Args:
            data: Result of `describe_data`, in training.
        """
        identity = {
            "tokenizer_name": tokenizer.name,
            "tokenizer_vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
        }
        topology = {
            "ranks": groups.world_size,
            "expert_parallel_size": groups.ep_size,
            "zero_stage": config.deepspeed.zero_stage,
            "precision": config.optimizer.precision,
        }
        return RunMetadata(
            config=config,
            identity=identity,
            topology=topology,
            global_batch_size=global_batch_size,
            iterations=iterations,
            data=data or {},
            samples=samples,
            gates=describe_gates(config),
            expert_types=describe_expert_types(config),
        )

    @property
    def has_schedule(self) -> bool:
        """Whether the run had a length: a checkpoint of weights alone has none to continue."""
        return self.iterations > 0

    @property
    def built_samples(self) -> int:
        """Number of training samples that the data were built for.

        Earlier versions, which did not record it, built them for as many steps of one size.
        """
        return self.samples or self.iterations * self.global_batch_size

    def to_state(self) -> dict[str, Any]:
        """Return the entries of state.json that describe the run; the config is in run.json."""
        names = (*_STATE_FIELDS, *_NEW_STATE_FIELDS)
        state = {name: getattr(self, name) for name in names}
        state["versions"] = package_versions()
        state["saved_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return state

    @staticmethod
    def from_state(config: RunConfig, state: dict[str, Any]) -> RunMetadata:
        """Restore the metadata from the content of run.json and state.json."""
        values = {name: state[name] for name in _STATE_FIELDS}
        values |= {name: state[name] for name in _NEW_STATE_FIELDS if name in state}
        return RunMetadata(config, **values)


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of this program, Python and the packages that results depend on."""
    versions = {"moe-megatron": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        versions[name] = metadata.version(name)
    return versions


def describe_data(config: RunConfig, groups: Groups) -> dict[str, Any]:
    """Describe the data files of a run, so that changed files are noticed when it resumes, and
    moved ones are recognised.

    Rank 0 reads a sample of every file, while the others wait without a time limit: thousands of
    datasets on a cold file system take minutes. A run that neither saves nor loads a checkpoint
    reads none.

    Returns:
        By prefix: bin_bytes and idx_bytes, content_id of both, and sidecar_sha256 if there is a
        sidecar. By file of --streaming-data-path: content_id. Files that do not exist have no
        entry.

    Raises:
        ValueError: The words of a flag are no blend.
        OSError: Rank 0 cannot read a file; then all ranks raise it.
    """
    if not (config.checkpoint.save or config.checkpoint.load):
        return {}
    streams, prefixes = _data_files(config)
    task = BackgroundTask("describing the data", partial(_describe_files, streams, prefixes))
    if groups.is_rank0:
        task.start()
    task.wait_for_all(groups)
    outcome = task.outcomes(groups)[0]
    if outcome.error:
        raise OSError(outcome.error)
    return outcome.result


def _data_files(config: RunConfig) -> tuple[list[str], list[str]]:
    """Return the sources of streamed text and the prefixes of datasets that a run names."""
    streaming = parse_blend(config.data.streaming_data_path, "--streaming-data-path")
    words_by_flag = {flag_name(name): getattr(config.data, name) for name in _DATA_FLAGS}
    for name, words in config.data.named_valid_sets.items():
        words_by_flag[f"--valid-sets {name}="] = words
    prefixes = []
    for flag, words in words_by_flag.items():
        prefixes += [prefix for _, prefix in parse_blend(words, flag)]
    return [path for _, path in streaming], prefixes


def _describe_files(streams: list[str], prefixes: list[str]) -> dict[str, Any]:
    described = {}
    for path in streams:
        if Path(path).is_file():
            described[path] = {"content_id": content_id([path])}
    for prefix in prefixes:
        described[prefix] = _describe_dataset(prefix)
    return described


def _describe_dataset(prefix: str) -> dict[str, Any]:
    description: dict[str, Any] = {}
    files = [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")]
    existing = [file for file in files if file.is_file()]
    for file in existing:
        description[f"{file.suffix.removeprefix('.')}_bytes"] = file.stat().st_size
    if existing == files:
        description["content_id"] = content_id(files)
    sidecar = Path(f"{prefix}.json")
    if sidecar.is_file():
        description["sidecar_sha256"] = file_sha256(sidecar)
    return description
