"""Content of a checkpoint's JSON files, with every value checked: types, ranges, required keys.

A hash in the manifest finds accidents. It does not protect from a checkpoint that another program
wrote, so nothing is taken from a file before it was checked here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from megatron.checkpoint.manifest import (
    CorruptCheckpointError,
    migrate_json,
    read_json,
    read_manifest,
)
from megatron.config.fields import shortened
from megatron.config.flags import EXPERT_OPTIONS, flags_of
from megatron.config.run_json import config_from_dict, parse_stored_values
from megatron.config.schema import RunConfig
from megatron.moe.experts.expert_type import expert_config_class
from megatron.moe.gate import gate_config_class

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**63)]
Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float


class StoredTopology(TypedDict):
    """Parallelism of the run that saved."""

    __pydantic_config__ = _STRICT
    ranks: PositiveCount
    expert_parallel_size: PositiveCount
    zero_stage: Count
    precision: str


class StoredIdentity(TypedDict):
    """The tokenizer of the run that saved."""

    __pydantic_config__ = _STRICT
    tokenizer_name: str
    tokenizer_vocab_size: Count
    tokenizer_fingerprint: str


class StoredProgress(TypedDict):
    """Progress of the run when it saved."""

    __pydantic_config__ = _STRICT
    iteration: Count
    consumed_samples: Count
    consumed_tokens: Count
    batch_changes: NotRequired[list[Annotated[list[Count], Field(min_length=3, max_length=3)]]]


class StoredCounters(TypedDict):
    """DeepSpeed's counts of steps."""

    __pydantic_config__ = _STRICT
    global_steps: Count
    skipped_steps: Count
    global_samples: Count


class StoredOptimizer(TypedDict):
    """State of the optimizer that is not a tensor."""

    __pydantic_config__ = _STRICT
    steps: Count
    counters: StoredCounters
    scaler: dict[str, Number]


class StoredState(TypedDict):
    """Content of state.json."""

    __pydantic_config__ = _STRICT
    identity: StoredIdentity
    topology: StoredTopology
    global_batch_size: Count
    iterations: Count
    samples: NotRequired[Count]
    data: dict[str, dict[str, Count | str]]
    gates: NotRequired[dict[str, dict[str, str]]]
    expert_types: NotRequired[dict[str, dict[str, str]]]
    versions: dict[str, str]
    saved_at: str
    progress: StoredProgress
    optimizer: StoredOptimizer


class StoredTensor(TypedDict):
    """An entry of index.json: shape and shards of a tensor."""

    __pydantic_config__ = _STRICT
    shape: Annotated[list[Count], Field(max_length=64)]
    pieces: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    frozen: NotRequired[bool]


class StoredIndex(TypedDict):
    """Content of index.json."""

    __pydantic_config__ = _STRICT
    tensors: dict[str, StoredTensor]
    kinds: list[Annotated[str, Field(pattern=r"^\w{1,100}$")]]
    buffers: list[str]


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint, of any version.

    Raises:
        CorruptCheckpointError: It cannot be read, or a value is missing or wrong.
        NewerVersionError: It was written by a newer version of this program.
    """
    file = folder / "state.json"
    state = _read(file, StoredState)
    iteration = state["progress"]["iteration"]
    saved = read_manifest(folder)["iteration"]
    if iteration != saved:
        raise CorruptCheckpointError(
            f"{file}: the iteration is {iteration}, but {saved} in the manifest"
        )
    steps = state["optimizer"]["steps"]
    if steps > iteration:
        raise CorruptCheckpointError(
            f"{file}: the optimizer has taken {steps} steps in {iteration} iterations"
        )
    return state


def read_shard_index(folder: Path) -> dict[str, Any]:
    """Read index.json of a checkpoint.

    Raises:
        CorruptCheckpointError: It cannot be read, a value is missing or wrong, or the shards of
            a tensor do not hold each of its elements exactly once.
        NewerVersionError: It was written by a newer version of this program.
    """
    file = folder / "index.json"
    index = _read(file, StoredIndex)
    kinds = index["kinds"]
    names = [*index["tensors"], *index["buffers"]]
    if "weight" not in kinds or len(set(kinds)) < len(kinds):
        raise CorruptCheckpointError(
            f"{file}: kinds is {shortened(kinds)}; allowed: different names with 'weight'"
        )
    if len(set(names)) < len(names) or "__metadata__" in names:
        raise CorruptCheckpointError(
            f"{file}: two tensors have the same name, or a reserved one"
        )
    for name, tensor in index["tensors"].items():
        _check_partition(file, name, tensor)
    return index


def read_config(folder: Path) -> RunConfig:
    """Read the configuration in run.json of a checkpoint, of any version.

    Raises:
        CorruptCheckpointError: It cannot be read.
        NewerVersionError: It was written by a newer version of this program.
        ValueError: A key is unknown, or a value is refused.
    """
    file = folder / "run.json"
    return config_from_dict(read_json(file), str(file))


def with_typed_expert_options(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration of `read_config` with expert options of the types that they have.

    Raises:
        ValueError: The expert type does not exist, or an option is unknown or has a wrong type.
    """
    flags = flags_of(expert_config_class(config.moe.expert_type), EXPERT_OPTIONS)
    options = {}
    for name, value in config.expert_options.items():
        options[name] = list(value) if isinstance(value, tuple) else value
    typed = parse_stored_values(options, EXPERT_OPTIONS, flags, str(folder / "run.json"))
    return replace(config, expert_options=typed)


def with_typed_gate_options(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration of `read_config` with gate options of the types that the gate has.

    Raises:
        ValueError: A gate does not exist, or an option is unknown or has a wrong type.
    """
    where = str(folder / "run.json")
    typed = {}
    for gate in config.moe.gate_layers.gates:
        flags = flags_of(gate_config_class(gate), "gate_options")
        options = {}
        for name, value in config.gate_options.get(gate, {}).items():
            options[name] = list(value) if isinstance(value, tuple) else value
        typed[gate] = parse_stored_values(options, f"gate_options.{gate}", flags, where)
    return replace(config, gate_options=typed)


def _read(file: Path, schema: type) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{file} is {shortened(content)}; allowed: a JSON object")
    try:
        return _adapter(schema).validate_python(migrate_json(file, content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CorruptCheckpointError(
            f"{file}: the value of {shortened(key)} is missing or wrong: {first['msg']}"
        ) from None


@cache
def _adapter(schema: type) -> TypeAdapter:
    return TypeAdapter(schema)


def _check_partition(file: Path, name: str, tensor: dict[str, Any]) -> None:
    position = 0
    is_partition = True
    for _, start, length in tensor["pieces"]:
        if start != position:
            is_partition = False
            break
        position += length
    total = math.prod(tensor["shape"])
    if not is_partition or position != total or total >= 2**63:
        raise CorruptCheckpointError(
            f"{file}: no file has element {position} of {shortened(name)}, or several have"
        )
