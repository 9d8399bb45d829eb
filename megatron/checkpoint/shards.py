"""Tensors of a checkpoint: rank files of shards, their index, and reading ranges of full tensors.

A *shard* is a contiguous range of a flattened tensor. Whatever ZeRO stage and expert-parallel size
wrote a checkpoint, each rank's part of a tensor is one shard of it, so a run of any other topology
can read the ranges that it needs.

    index.json   {"tensors": {name: {"shape": [...], "pieces": [[rank, start, length], ...]}},
                  "kinds": ["weight", "exp_avg", "exp_avg_sq"], "buffers": [name, ...]}
                 A tensor with "frozen": true was not trained and has its weight only.
    rank_00003.safetensors   "<state key>/<name>": 1-D shards; "rng/<device>"; in rank 0's file also
                             "buffer/<name>": full buffers
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.content import read_shard_index
from megatron.checkpoint.manifest import MANIFEST, CorruptCheckpointError, read_manifest
from megatron.config.fields import shortened
from megatron.io.safetensors_writer import (
    TORCH_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    read_header,
)
from megatron.io.sha256 import FileDigest
from megatron.io.untrusted import open_regular

SLICE_ELEMENTS = 1 << 20
"""Elements that `CheckpointReader.slices` holds in memory"""


class ShardRange(NamedTuple):
    """A range of a flattened tensor that a rank's file holds."""

    name: str
    """Name of the tensor"""
    start: int
    """First element in the flattened full tensor"""
    length: int
    """Number of elements"""


def rank_file_name(rank: int) -> str:
    """Return the name of the file with a rank's shards."""
    return f"rank_{rank:05d}.safetensors"


class CheckpointReader:
    """Reads full tensors of a checkpoint, or ranges of them, into ordinary memory.

    Files are read rather than mapped: a mapped file could change later. Only files that the
    manifest names are read, because no others were verified.

    Args:
        path: Directory of the checkpoint, whose files were verified.

    Raises:
        CorruptCheckpointError: A file has not the content that index.json describes, or is not
            in the manifest; also raised by the methods.
        OSError: A file ends too early or is missing; also raised by the methods.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._verified_files = read_manifest(self.path)["files"]
        index = read_shard_index(self.path)
        self.state_keys: list[str] = index["kinds"]
        """What is stored of a trained parameter: weight and moments, such as exp_avg"""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the full parameters, by name"""
        self.buffers: list[str] = index["buffers"]
        """Names of the model's buffers"""
        self.frozen: set[str] = set()
        """Names of the parameters that were not trained, of which only the weight is stored"""
        self._shards: dict[str, list[list[int]]] = {}
        for name, tensor in index["tensors"].items():
            self.shapes[name] = tuple(tensor["shape"])
            self._shards[name] = tensor["pieces"]
            if tensor.get("frozen", False):
                self.frozen.add(name)
        self._headers: dict[int, tuple[dict[str, dict], int]] = {}

    def read(
        self, state_key: str, name: str, start: int = 0, length: int | None = None
    ) -> Tensor:
        """Read elements `start` to `start + length` of a flattened tensor, by default all of it.

        Args:
            state_key: one of `state_keys`.

        Returns:
            A 1-D tensor [length] in the stored dtype.
        """
        total = math.prod(self.shapes[name])
        if length is None:
            length = total - start
        stop = start + length
        assert start >= 0 and stop <= total, f"{name} has {total} elements"
        key = f"{state_key}/{name}"
        overlaps = self._overlaps(name, start, stop)
        if not overlaps:
            return torch.empty(0)
        dtype = self.dtype(state_key, name)
        if len(overlaps) == 1:
            rank, offset, size = overlaps[0]
            return self._read_range(rank, key, offset, size)
        out = torch.empty(length, dtype=dtype)
        position = 0
        for rank, offset, size in overlaps:
            out[position : position + size] = self._read_range(rank, key, offset, size)
            position += size
        return out

    def _overlaps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Find where elements `start` to `stop` of a flattened tensor are stored.

        Returns:
            (rank, offset inside its shard, number of elements) of consecutive ranges.
        """
        overlaps = []
        position = start
        for rank, shard_start, shard_length in self._shards[name]:
            low = max(start, shard_start)
            high = min(stop, shard_start + shard_length)
            if low >= high:
                continue
            if low != position:
                break
            overlaps.append((rank, low - shard_start, high - low))
            position = high
        assert position == stop, f"no file has element {position} of {name}"
        return overlaps

    def slices(self, state_key: str, name: str) -> Iterator[Tensor]:
        """Yield a flattened tensor in consecutive slices, so that it need not fit in memory."""
        total = math.prod(self.shapes[name])
        for start in range(0, total, SLICE_ELEMENTS):
            yield self.read(state_key, name, start, min(SLICE_ELEMENTS, total - start))

    def dtype(self, state_key: str, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor; float32 for a tensor without elements."""
        shards = self._shards[name]
        if not shards:
            return torch.float32
        first_rank = shards[0][0]
        dtype = self._spec(first_rank, f"{state_key}/{name}").dtype
        if not dtype.is_floating_point:
            raise CorruptCheckpointError(
                f"{self.path / rank_file_name(first_rank)}: {state_key}/{name} has the dtype "
                f"{dtype}; allowed: floating-point numbers"
            )
        return dtype

    def num_shards(self, name: str) -> int:
        """Return the number of shards that a tensor is stored in."""
        return len(self._shards[name])

    def buffer_spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a buffer."""
        spec = self._spec(0, f"buffer/{name}")
        return TensorSpec(name, spec.dtype, spec.shape)

    def buffer(self, name: str) -> Tensor:
        """Read a buffer of the model, in its full shape."""
        shape = self.buffer_spec(name).shape
        return self._read_range(0, f"buffer/{name}", 0, math.prod(shape)).reshape(shape)

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Read the random states of a rank, by device: of the CPU, and of CUDA if in use."""
        header, _ = self._header(rank)
        states = {}
        for device in ("cpu", "cuda"):
            key = f"rng/{device}"
            if device == "cuda" and key not in header:
                continue
            spec = self._spec(rank, key)
            if spec.dtype != torch.uint8 or len(spec.shape) != 1:
                raise CorruptCheckpointError(
                    f"{self.path / rank_file_name(rank)}: {key} has the shape "
                    f"{list(spec.shape)} of {spec.dtype}; allowed: bytes in one dimension"
                )
            states[device] = self._read_range(rank, key, 0, spec.shape[0])
        return states

    def _header(self, rank: int) -> tuple[dict[str, dict], int]:
        name = rank_file_name(rank)
        if name not in self._verified_files:
            raise CorruptCheckpointError(f"{self.path / MANIFEST} does not name {name}")
        if rank not in self._headers:
            try:
                self._headers[rank] = read_header(self.path / name)
            except ValueError as error:
                raise CorruptCheckpointError(str(error)) from None
        return self._headers[rank]

    def _spec(self, rank: int, key: str) -> TensorSpec:
        """Return dtype and shape of a tensor of a rank's file."""
        header, _ = self._header(rank)
        if key not in header:
            raise CorruptCheckpointError(
                f"{self.path / rank_file_name(rank)} has no tensor {shortened(key)}"
            )
        stored = header[key]
        return TensorSpec(key, TORCH_DTYPES[stored["dtype"]], tuple(stored["shape"]))

    def _read_range(self, rank: int, key: str, start: int, length: int) -> Tensor:
        """Read `length` elements from element `start` of a tensor of a rank's file."""
        spec = self._spec(rank, key)
        path = self.path / rank_file_name(rank)
        if start + length > math.prod(spec.shape):
            raise CorruptCheckpointError(
                f"{path}: {shortened(key)} has the shape {list(spec.shape)}, but index.json "
                f"places element {start + length - 1} there"
            )
        if length == 0:
            return torch.empty(0, dtype=spec.dtype)
        header, data_offset = self._header(rank)
        nbytes = length * spec.dtype.itemsize
        offset = data_offset + header[key]["data_offsets"][0] + start * spec.dtype.itemsize
        with open_regular(path) as file:
            # Checked first: numpy allocates all of it before it reads.
            if offset + nbytes > os.fstat(file.fileno()).st_size:
                raise OSError(
                    f"{path} ends inside {key}: it is damaged, or was changed while read"
                )
            raw = np.fromfile(file, np.uint8, nbytes, offset=offset)
        return torch.from_numpy(raw).view(spec.dtype)


def make_index(
    shards: Sequence[Sequence[ShardRange]],
    shapes: dict[str, tuple[int, ...]],
    state_keys: Sequence[str],
    buffers: Sequence[str],
    frozen: Collection[str] = (),
) -> dict:
    """Return the content of index.json.

    Args:
        shards: The shards of every rank, in order of ranks.
        shapes: Shapes of the full parameters, by name.
        state_keys: What is stored of a trained parameter.
        buffers: Names of the buffers in the file of rank 0.
        frozen: Names of the parameters that are not trained.
    """
    tensors: dict[str, dict] = {}
    for name, shape in shapes.items():
        tensors[name] = {"shape": list(shape), "pieces": []}
        if name in frozen:
            tensors[name]["frozen"] = True
    for rank, rank_shards in enumerate(shards):
        for name, start, length in rank_shards:
            tensors[name]["pieces"].append([rank, start, length])
    for name, tensor in tensors.items():
        tensor["pieces"].sort(key=lambda piece: piece[1])
        _require_partition(name, tensor)
    return {"tensors": tensors, "kinds": list(state_keys), "buffers": list(buffers)}


def _require_partition(name: str, tensor: dict) -> None:
    """Assert that the shards of a tensor hold each of its elements exactly once."""
    stop = 0
    for _, start, length in tensor["pieces"]:
        assert start == stop, (
            f"the ranks' shards of {name} overlap or leave a gap at element {stop}"
        )
        stop += length
    assert stop == math.prod(tensor["shape"]), (
        f"the ranks have {stop} elements of {name}, {tensor['shape']}"
    )


def write_tensors(
    path: str | Path,
    specs: Sequence[TensorSpec],
    get: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> FileDigest:
    """Write a safetensors file, requesting its tensors one at a time.

    Args:
        get: Returns the tensor of a name.
        metadata: Strings for the header.
    """
    with SafetensorsWriter(path, specs, metadata) as writer:
        for spec in writer.specs:
            writer.write(get(spec.name))
        return writer.finish()
