"""Summaries of checkpoints, read from their files without building a model, and differences.

A *fault* is a problem of a checkpoint that can still be read. A checkpoint that cannot be read
raises ValueError. `inspect_text` formats the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.content import read_config, read_state
from megatron.checkpoint.directory import (
    CheckpointEntry,
    find_newest_valid,
    list_checkpoints,
    read_entry,
    select_checkpoints,
)
from megatron.checkpoint.manifest import check_files, find_problems
from megatron.checkpoint.shards import CheckpointReader
from megatron.config.format_version import NewerVersionError
from megatron.config.values import flatten_settings
from megatron.io.progress import ProgressCallback, no_progress
from megatron.model.parameter_count import MODEL_PARTS, part_of

ABSENT = "(not there)"
"""Value of an entry that one of two compared checkpoints does not have"""


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest one of a directory.

    In a directory, checkpoints with missing or truncated files or damaged JSON files are passed
    over. A single checkpoint is not checked: its faults can be shown.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CorruptCheckpointError: The manifest of the single checkpoint is not valid.
    """
    selection = select_checkpoints(path)
    if selection.is_single:
        return selection.candidates[0].path
    return find_newest_valid(selection, _find_quick_problems).path


def _find_quick_problems(entry: CheckpointEntry) -> list[str]:
    return find_problems(entry.path, entry.manifest, verify=False)


def summarize_directory(
    folder: Path, verify: bool = False, progress: ProgressCallback = no_progress
) -> list[dict[str, Any]]:
    """Summarize every checkpoint of a directory.

    Args:
        verify: Compare the hashes of all files, see `find_problems`.
        progress: Called with the bytes of each checked file.

    Returns:
        A row per checkpoint, newest first: name, newest, iteration, serial, bytes, faults,
        saved_at. Rows without a valid manifest come last and have no iteration.

    Raises:
        FileNotFoundError: There are no checkpoints.
    """
    entries, problems = list_checkpoints(folder)
    faults = {}
    for entry in entries:
        faults[entry.path] = _find_faults(entry, verify, progress)
    selection = select_checkpoints(folder)
    newest = None
    try:
        newest = find_newest_valid(selection, lambda entry: faults[entry.path]).path
    except NewerVersionError:
        pass  # one of `problems`
    except FileNotFoundError:
        if selection.is_empty:
            raise
    rows = [
        _directory_row(entry, faults[entry.path], entry.path == newest) for entry in entries
    ]
    rows += [{"name": "", "newest": False, "faults": [problem]} for problem in problems]
    return rows


def _find_faults(entry: CheckpointEntry, verify: bool, progress: ProgressCallback) -> list[str]:
    """Return what is wrong with the files of a checkpoint, and with their content if they fit."""
    faults = find_problems(entry.path, entry.manifest, verify, progress)
    if not faults:
        try:
            read_state(entry.path)
            read_config(entry.path)
            CheckpointReader(entry.path)
        except ValueError as error:
            faults.append(str(error))
    return faults


def _directory_row(entry: CheckpointEntry, faults: list[str], newest: bool) -> dict[str, Any]:
    saved_at = ""
    if not faults:
        saved_at = read_state(entry.path)["saved_at"]
    return {
        "name": entry.path.name,
        "newest": newest,
        "iteration": entry.manifest["iteration"],
        "serial": entry.manifest["serial"],
        "bytes": _total_bytes(entry.manifest),
        "faults": faults,
        "saved_at": saved_at,
    }


def _total_bytes(manifest: dict[str, Any]) -> int:
    return sum(nbytes for nbytes, _ in manifest["files"].values())


def summarize_checkpoint(
    path: Path,
    *,
    verify: bool = False,
    tensors: bool = False,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Summarize a checkpoint: its run, files, tensors and faults, ready for JSON.

    Args:
        path: Directory of the checkpoint, see `resolve_checkpoint`.
        verify: Compare the hashes of all files.
        tensors: Read every weight and buffer, for dtype, smallest and largest value, norm, and
            the number of values that are not finite, which is a fault.
        progress: Called with the bytes that were read since the last call.

    Raises:
        CorruptCheckpointError: A JSON file is missing or damaged; the message names it.
    """
    manifest = read_entry(path).manifest
    faults = find_problems(path, manifest, verify, progress)
    check_files(path, [name for name in manifest["files"] if name.endswith(".json")], manifest)
    reader = CheckpointReader(path)
    files = {}
    for name, (nbytes, sha256) in manifest["files"].items():
        files[name] = {"bytes": nbytes, "sha256": sha256}
    summary = {
        **read_state(path),
        "path": str(path),
        "iteration": manifest["iteration"],
        "serial": manifest["serial"],
        "config": json.loads(json.dumps(read_config(path).to_dict())),
        "files": files,
        "bytes": _total_bytes(manifest),
        "verified": verify,
        "kinds": reader.state_keys,
        "parameters": _count_parameters(reader),
        "tensors": _parameter_entries(reader),
        "buffers": {},
        "faults": faults,
    }
    if faults:  # the headers of the tensors' files may be unreadable
        return summary
    summary["buffers"] = _buffer_entries(reader)
    if tensors:
        for name, entry in (summary["tensors"] | summary["buffers"]).items():
            entry |= _statistics(reader, name, progress)
            if entry["not_finite"]:
                faults.append(f"{path}: {entry['not_finite']} values of {name} are not finite")
    return summary


def _count_parameters(reader: CheckpointReader) -> dict[str, Any]:
    parts = dict.fromkeys(MODEL_PARTS, 0)
    trainable = 0
    for name, shape in reader.shapes.items():
        number = math.prod(shape)
        parts[part_of(name)] += number
        if name not in reader.frozen:
            trainable += number
    return {"total": sum(parts.values()), "trainable": trainable, "parts": parts}


def _parameter_entries(reader: CheckpointReader) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, shape in reader.shapes.items():
        entries[name] = {"shape": list(shape), "pieces": reader.num_shards(name)}
        if name in reader.frozen:
            entries[name]["frozen"] = True
    return entries


def _buffer_entries(reader: CheckpointReader) -> dict[str, dict[str, Any]]:
    entries = {}
    for name in reader.buffers:
        entries[name] = {"shape": list(reader.buffer_spec(name).shape), "pieces": 1}
    return entries


def _slices(reader: CheckpointReader, name: str) -> Iterator[Tensor]:
    """Yield a weight or a buffer in consecutive flattened slices."""
    if name in reader.buffers:
        yield reader.buffer(name).flatten()
    else:
        yield from reader.slices("weight", name)


def _statistics(
    reader: CheckpointReader, name: str, progress: ProgressCallback
) -> dict[str, Any]:
    """Return statistics of the finite values of a tensor.

    Returns:
        dtype, min and max (None without finite values), norm, and not_finite: the number of
        values that are not finite.
    """
    if name in reader.buffers:
        dtype = reader.buffer_spec(name).dtype
    else:
        dtype = reader.dtype("weight", name)
    minima = []
    maxima = []
    square_sum = 0.0
    not_finite = 0
    for values in _slices(reader, name):
        progress(values.nbytes)
        finite = values[values.isfinite()].double()
        not_finite += len(values) - len(finite)
        if len(finite):
            minima.append(finite.min().item())
            maxima.append(finite.max().item())
            square_sum += finite.square().sum().item()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "min": min(minima, default=None),
        "max": max(maxima, default=None),
        "norm": math.sqrt(square_sum),
        "not_finite": not_finite,
    }


def compare_checkpoints(
    a: dict[str, Any],
    b: dict[str, Any],
    *,
    tensors: bool = False,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Compare two summaries, ready for JSON: [value of a, value of b] of entries that differ.

    Args:
        a, b: Results of `summarize_checkpoint`. If one has faults, buffers and values are not
            compared.
        tensors: Also compare the values of tensors that both have in the same shape:
            |a - b| / max(|a|, |b|), with Euclidean norms; None where values are not finite.
        progress: Called with the bytes that were read since the last call.
    """
    both_valid = not (a["faults"] or b["faults"])
    tensors_a = a["tensors"]
    tensors_b = b["tensors"]
    if both_valid:
        tensors_a = tensors_a | a["buffers"]
        tensors_b = tensors_b | b["buffers"]
    comparison = {
        "paths": [a["path"], b["path"]],
        "progress": _differences(a["progress"], b["progress"]),
        "run": _differences(_run_entries(a), _run_entries(b)),
        "topology": _differences(a["topology"], b["topology"]),
        "configuration": _differences(a["config"], b["config"]),
        "tokenizer": _differences(a["identity"], b["identity"]),
        "data": _differences(a["data"], b["data"]),
        "gates": _differences(a.get("gates", {}), b.get("gates", {})),
        "expert_types": _differences(a.get("expert_types", {}), b.get("expert_types", {})),
        "versions": _differences(a["versions"], b["versions"]),
        "tensors": _compare_shapes(tensors_a, tensors_b),
    }
    if tensors and both_valid:
        reader_a = CheckpointReader(a["path"])
        reader_b = CheckpointReader(b["path"])
        distances = {}
        for name in tensors_a:
            if name in tensors_b and name not in comparison["tensors"]["shapes"]:
                distances[name] = _relative_distance(reader_a, reader_b, name, progress)
        comparison["tensors"]["values"] = distances
    return comparison


def _run_entries(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples per step": summary["global_batch_size"],
        "steps of the full run": summary["iterations"],
        "optimizer steps": summary["optimizer"]["steps"],
        "saved at": summary["saved_at"],
        "parameters": summary["parameters"]["total"],
        "trainable parameters": summary["parameters"]["trainable"],
    }


def _compare_shapes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    shapes = {}
    for name in a:
        if name in b and a[name]["shape"] != b[name]["shape"]:
            shapes[name] = [a[name]["shape"], b[name]["shape"]]
    return {
        "only_first": [name for name in a if name not in b],
        "only_second": [name for name in b if name not in a],
        "shapes": shapes,
    }


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Return [value of a, value of b] of the entries that differ, by name.

    An entry of a nested section has the name "section.name".
    """
    a = flatten_settings(a)
    b = flatten_settings(b)
    different = {}
    for name in a | b:
        pair = [a.get(name, ABSENT), b.get(name, ABSENT)]
        if pair[0] != pair[1]:
            different[name] = pair
    return different


def _relative_distance(
    a: CheckpointReader, b: CheckpointReader, name: str, progress: ProgressCallback
) -> float | None:
    """Return |a - b| / max(|a|, |b|) of a tensor; None if values are not finite."""
    distance = 0.0
    squares_a = 0.0
    squares_b = 0.0
    for slice_a, slice_b in zip(_slices(a, name), _slices(b, name), strict=True):
        progress(slice_a.nbytes + slice_b.nbytes)
        x = slice_a.double()
        y = slice_b.double()
        distance += (x - y).square().sum().item()
        squares_a += x.square().sum().item()
        squares_b += y.square().sum().item()
    if not math.isfinite(distance):
        return None
    if distance == 0.0:
        return 0.0
    return math.sqrt(distance / max(squares_a, squares_b))
