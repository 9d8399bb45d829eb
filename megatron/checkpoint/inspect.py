"""What is in a checkpoint, read from its files without building anything, and how two checkpoints differ.

A fault is something wrong in a checkpoint that can be read all the same. What cannot be read is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import directory
from megatron.checkpoint.reader import CheckpointReader
from megatron.io.progress import ProgressCallback as Progress
from megatron.model.parameter_count import MODEL_PARTS, part_of

NOT_THERE = "(not there)"


def one_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a folder of checkpoints whose files seem whole.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_dir() and directory.is_checkpoint(path):
        return path.resolve()
    rows = summarize_directory(path)
    for row in rows:
        if row["newest"]:
            return path / row["name"]
    raise FileNotFoundError(
        f"{path} has no whole checkpoint: {rows[0]['faults'][0]}. Give another folder, or one "
        "checkpoint"
    )


def faults_of(
    path: Path,
    manifest: dict[str, Any],
    verify: bool = False,
    progress: Progress = lambda read: None,
) -> list[str]:
    """What is wrong with the files of a checkpoint. The hashes of the small ones are always compared.

    Args:
        verify: compare the hashes of the tensors' files, too, which reads all of them.
        progress: called with the bytes just dealt with.
    """
    faults = []
    for name, (size, _) in manifest["files"].items():
        try:
            directory.check_files(
                path, [name], manifest, hashes=verify or name.endswith(".json")
            )
        except directory.CorruptCheckpointError as error:
            faults.append(str(error))
        progress(size)
    return faults


def summarize_directory(
    folder: Path, verify: bool = False, progress: Progress = lambda read: None
) -> list[dict[str, Any]]:
    """What there is of each checkpoint in a folder, completed last first, the broken ones without a manifest at the
    end: name, newest, iteration, serial, saved_at, bytes, faults. See `faults_of`.

    Raises:
        FileNotFoundError: there are none.
    """
    good, bad = directory.list_checkpoints(folder)
    if not good and not bad:
        raise FileNotFoundError(
            f"{folder} is not a folder of checkpoints. Give the folder of --save of a run, or one "
            "checkpoint of it"
        )
    rows, newest = [], True
    for path, manifest in good:
        faults = faults_of(path, manifest, verify, progress)
        rows.append(
            {
                "name": path.name,
                "newest": newest and not faults,
                "iteration": manifest["iteration"],
                "serial": manifest["serial"],
                "bytes": _bytes(manifest),
                "faults": faults,
                "saved_at": ""
                if faults
                else directory.read_json(path / "state.json")["saved_at"],
            }
        )
        newest = newest and bool(faults)
    return rows + [{"name": "", "newest": False, "faults": [text]} for text in bad]


def _bytes(manifest: dict[str, Any]) -> int:
    return sum(size for size, _ in manifest["files"].values())


def summarize_checkpoint(
    path: Path,
    *,
    verify: bool = False,
    tensors: bool = False,
    progress: Progress = lambda read: None,
) -> dict[str, Any]:
    """What a checkpoint is and holds, ready for JSON.

    Args:
        path: as `one_of` returns it.
        verify: compare the hashes of all files.
        tensors: read every weight and buffer: its dtype, smallest and largest value and norm, and how many of its
            values are not finite, which is a fault.
        progress: called with the bytes just read.

    Raises:
        ValueError: its description is missing or damaged; the message names the file.
    """
    manifest = directory.read_manifest(path)
    faults = faults_of(path, manifest, verify, progress)
    directory.check_files(
        path, [name for name in manifest["files"] if name.endswith(".json")], manifest
    )
    state = directory.read_json(path / "state.json")
    shards = CheckpointReader(path)
    names = {
        name: {"shape": list(shape), "pieces": shards.num_pieces(name)}
        for name, shape in shards.shapes.items()
    }
    buffers = (
        {}
        if faults
        else {
            name: {"shape": list(shards.buffer_entry(name).shape), "pieces": 1}
            for name in shards.buffers
        }
    )
    parts = dict.fromkeys(MODEL_PARTS, 0)
    for name, shape in shards.shapes.items():
        parts[part_of(name)] += math.prod(shape)
    found = {
        "path": str(path),
        "iteration": manifest["iteration"],
        "serial": manifest["serial"],
        **state,
        "config": directory.read_json(path / "run.json"),
        "files": {
            n: {"bytes": size, "sha256": sha} for n, (size, sha) in manifest["files"].items()
        },
        "bytes": _bytes(manifest),
        "verified": verify,
        "kinds": shards.kinds,
        "parameters": {"total": sum(parts.values()), "parts": parts},
        "tensors": names,
        "buffers": buffers,
        "faults": faults,
    }
    if tensors and not faults:
        for name, entry in (names | buffers).items():
            entry |= _statistics(shards, name, progress)
            if entry["not_finite"]:
                found["faults"].append(
                    f"{path}: {entry['not_finite']} values of {name} are not finite"
                )
    return found


def _values(shards: CheckpointReader, name: str) -> Iterator[Tensor]:
    """The weight or buffer of a name, slice after slice, flattened."""
    if name in shards.buffers:
        yield shards.buffer(name).flatten()
    else:
        yield from shards.slices("weight", name)


def _statistics(shards: CheckpointReader, name: str, progress: Progress) -> dict[str, Any]:
    """dtype; min and max (None: no values) and norm of the finite values; how many are not finite."""
    buffer = name in shards.buffers
    dtype = shards.buffer_entry(name).dtype if buffer else shards.dtype("weight", name)
    low, high, squares, strange = math.inf, -math.inf, 0.0, 0
    for values in _values(shards, name):
        progress(values.nbytes)
        finite = values[values.isfinite()].double()
        strange += len(values) - len(finite)
        if len(finite):
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
            squares += finite.square().sum().item()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "min": low if low <= high else None,
        "max": high if low <= high else None,
        "norm": math.sqrt(squares),
        "not_finite": strange,
    }


def compare_checkpoints(
    a: dict[str, Any],
    b: dict[str, Any],
    *,
    tensors: bool = False,
    progress: Progress = lambda read: None,
) -> dict[str, Any]:
    """In what two checkpoints differ, ready for JSON: [value of a, value of b] by name.

    Args:
        a, b: as `facts` returns them; when one has faults, buffers and values are not compared.
        tensors: also compare the values of the tensors that both have in one shape: |a - b| / max(|a|, |b|), with
            norms; None where values are not finite.
        progress: called with the bytes just read.
    """
    whole = not (a["faults"] or b["faults"])
    first, second = (f["tensors"] | (f["buffers"] if whole else {}) for f in (a, b))
    shapes = {
        name: [t["shape"] for t in (first[name], second[name])]
        for name in first
        if name in second and first[name]["shape"] != second[name]["shape"]
    }
    found = {
        "paths": [a["path"], b["path"]],
        "progress": _changed(a["progress"], b["progress"]),
        "run": _changed(
            *(
                {
                    "samples per step": f["global_batch_size"],
                    "steps of the whole run": f["iterations"],
                    "optimizer steps": f["optimizer"]["steps"],
                    "saved at": f["saved_at"],
                    "parameters": f["parameters"]["total"],
                }
                for f in (a, b)
            )
        ),
        "topology": _changed(a["topology"], b["topology"]),
        "configuration": _changed(_flat(a["config"]), _flat(b["config"])),
        "tokenizer": _changed(a["identity"], b["identity"]),
        "data": _changed(_flat(a["data"]), _flat(b["data"])),
        "versions": _changed(a["versions"], b["versions"]),
        "tensors": {
            "only_first": [name for name in first if name not in second],
            "only_second": [name for name in second if name not in first],
            "shapes": shapes,
        },
    }
    if tensors and whole:
        shards = [CheckpointReader(f["path"]) for f in (a, b)]
        found["tensors"]["values"] = {
            name: _distance(*shards, name, progress)
            for name in first
            if name in second and name not in shapes
        }
    return found


def _changed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    pairs = {name: [a.get(name, NOT_THERE), b.get(name, NOT_THERE)] for name in a | b}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{section.name: value}."""
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
    }


def _distance(
    a: CheckpointReader, b: CheckpointReader, name: str, progress: Progress
) -> float | None:
    apart, sizes = 0.0, [0.0, 0.0]
    for x, y in zip(_values(a, name), _values(b, name), strict=True):
        progress(x.nbytes + y.nbytes)
        x, y = x.double(), y.double()
        apart += (x - y).square().sum().item()
        sizes = [sizes[0] + x.square().sum().item(), sizes[1] + y.square().sum().item()]
    if not math.isfinite(apart):
        return None
    return math.sqrt(apart / max(sizes)) if apart else 0.0


def describe_listing(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What `listing` found, as lines of text."""
    broken = sum(bool(row["faults"]) for row in rows)
    lines = [
        f"{folder}: {len(rows)} checkpoints" + (f", {broken} of them broken" if broken else "")
    ]
    for row in rows:
        if row["faults"]:
            lines += [f"  {'BROKEN':8}{fault}" for fault in row["faults"]]
        else:
            mark = "newest" if row["newest"] else ""
            lines.append(
                f"  {mark:8}{row['name']:24}{row['saved_at']:28}{row['bytes'] / 1e6:>12,.1f} MB"
            )
    return lines


def describe_checkpoint(found: dict[str, Any]) -> list[str]:
    """What `facts` found, as lines of text."""
    moe, topology, progress = found["config"]["moe"], found["topology"], found["progress"]
    gate = {
        moe["gate"]: ", ".join(f"{n} {v}" for n, v in found["config"]["gate_options"].items())
    }
    weights = " and ".join(
        {"weight": "weights", "exp_avg": "moments"}[k]
        for k in found["kinds"]
        if k != "exp_avg_sq"
    )
    lines = [
        found["path"],
        *_table(
            {
                "iteration": f"{progress['iteration']:,} of {found['iterations']:,}",
                "seen": f"{progress['consumed_samples']:,} samples, {progress['consumed_tokens']:,} tokens",
                "optimizer": f"{found['optimizer']['steps']:,} steps, {found['global_batch_size']:,} samples each",
                "saved": found["saved_at"],
                "made with": f"{topology['ranks']} ranks, experts shared by {topology['expert_parallel_size']}, ZeRO "
                f"{topology['zero_stage']}, {topology['precision']}",
                "holds": f"{weights} of {len(found['tensors'])} parameters, {found['bytes'] / 1e6:,.1f} MB in "
                f"{len(found['files'])} files",
            }
        ),
    ]
    parts = {
        part: f"{number:>16,}"
        for part, number in found["parameters"]["parts"].items()
        if number
    }
    lines += ["parameters", *_table({**parts, "total": f"{found['parameters']['total']:>16,}"})]
    if moe["num_experts"]:
        lines += [f"gate, for {moe['num_experts']} experts", *_table(gate)]
    lines += [
        "tokenizer",
        *_table({n.removeprefix("tokenizer_"): v for n, v in found["identity"].items()}),
    ]
    lines += [
        "data",
        *_table(
            {
                prefix: ", ".join(f"{n} {v}" for n, v in files.items())
                or "no files when it was saved"
                for prefix, files in found["data"].items()
            }
            or {"none": "on record"}
        ),
    ]
    lines += ["versions", *_table(found["versions"])]
    lines += [
        "files, verified" if found["verified"] else "files (--verify compares their hashes)",
        *_table(
            {
                name: f"{file['bytes']:>16,}  {file['sha256']}"
                for name, file in found["files"].items()
            }
        ),
    ]
    return lines


def describe_tensors(found: dict[str, Any]) -> list[str]:
    """The tensors of `facts` as lines of text: also their values, if they were read."""
    rows = [("tensor", "shape", "pieces", "dtype", "min", "max", "norm", "")]
    for name, entry in (found["tensors"] | found["buffers"]).items():
        values = [""] * 5
        if "dtype" in entry:
            numbers = [
                "" if entry[n] is None else f"{entry[n]:.4g}" for n in ("min", "max", "norm")
            ]
            values = [
                entry["dtype"],
                *numbers,
                f"{entry['not_finite']} NOT FINITE" if entry["not_finite"] else "",
            ]
        rows.append((name, str(entry["shape"]), str(entry["pieces"]), *values))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]


def describe_differences(found: dict[str, Any]) -> list[str]:
    """What `differences` found, as lines of text."""
    lines = [f"first   {found['paths'][0]}", f"second  {found['paths'][1]}"]
    for section in (
        "progress",
        "run",
        "topology",
        "configuration",
        "tokenizer",
        "data",
        "versions",
    ):
        if found[section]:
            lines += [
                section,
                *_table({name: f"{a} -> {b}" for name, (a, b) in found[section].items()}),
            ]
    tensors = found["tensors"]
    rows = dict.fromkeys(tensors["only_first"], "only in the first")
    rows |= dict.fromkeys(tensors["only_second"], "only in the second")
    rows |= {name: f"{a} -> {b}" for name, (a, b) in tensors["shapes"].items()}
    lines += ["tensors", *_table(rows or {"none": "differs in name or shape"})]
    if "values" in tensors:
        told = {
            name: "not finite" if d is None else f"{d:.3e}" if d else "equal"
            for name, d in tensors["values"].items()
        }
        lines += ["values: |first - second| / the larger norm", *_table(told)]
    return lines


def _table(rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items()]
