"""Text of the summaries and differences that `inspect` returns, for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config.gate_layers import parse_gate_layers

_DIFFERENCE_SECTIONS = (
    "progress",
    "run",
    "topology",
    "configuration",
    "tokenizer",
    "data",
    "gates",
    "expert_types",
    "versions",
)


def format_directory(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows of `summarize_directory` as lines of text."""
    num_broken = sum(bool(row["faults"]) for row in rows)
    title = f"{folder}: {len(rows)} checkpoints"
    if num_broken:
        title += f", {num_broken} of them broken"
    lines = [title]
    has_later = False
    for row in rows:
        if row["faults"]:
            lines += [f"  {'BROKEN':8}{fault}" for fault in row["faults"]]
            continue
        mark = ""
        if row["newest"]:
            # The file `latest` was edited if a valid checkpoint was completed later.
            mark = "latest" if has_later else "newest"
        has_later = True
        size = f"{row['bytes'] / 1e6:>12,.1f} MB"
        lines.append(f"  {mark:8}{row['name']:24}{row['saved_at']:28}{size}")
    return lines


def format_checkpoint(summary: dict[str, Any]) -> list[str]:
    """Format a summary of a checkpoint, without its tensors, as lines of text."""
    files_title = "files (--verify compares their hashes)"
    if summary["verified"]:
        files_title = "files, verified"
    files = {}
    for name, file in summary["files"].items():
        files[name] = f"{file['bytes']:>16,}  {file['sha256']}"
    tokenizer = {}
    for name, value in summary["identity"].items():
        tokenizer[name.removeprefix("tokenizer_")] = value
    return [
        summary["path"],
        *_table(_overview(summary)),
        "parameters",
        *_table(_parameters(summary["parameters"])),
        *_gate_lines(summary["config"]),
        *_code_lines("gates", summary.get("gates", {})),
        *_code_lines("expert types", summary.get("expert_types", {})),
        "tokenizer",
        *_table(tokenizer),
        "data",
        *_table(_data(summary["data"])),
        "versions",
        *_table(summary["versions"]),
        files_title,
        *_table(files),
    ]


def _overview(summary: dict[str, Any]) -> dict[str, str]:
    progress = summary["progress"]
    topology = summary["topology"]
    contents = f"weights of {len(summary['tensors'])} parameters"
    if summary["kinds"] != ["weight"]:
        contents = f"weights and moments of {len(summary['tensors'])} parameters"
    frozen = sum(entry.get("frozen", False) for entry in summary["tensors"].values())
    if frozen:
        contents += f", {frozen} of them frozen, without moments"
    return {
        "iteration": f"{progress['iteration']:,} of {summary['iterations']:,}",
        "seen": f"{progress['consumed_samples']:,} samples, "
        f"{progress['consumed_tokens']:,} tokens",
        "optimizer": f"{summary['optimizer']['steps']:,} steps, "
        f"{summary['global_batch_size']:,} samples each",
        "saved": summary["saved_at"],
        "made with": f"{topology['ranks']} ranks, "
        f"experts shared by {topology['expert_parallel_size']}, "
        f"ZeRO {topology['zero_stage']}, {topology['precision']}",
        "holds": f"{contents}, {summary['bytes'] / 1e6:,.1f} MB in {len(summary['files'])} files",
    }


def _parameters(parameters: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for part, number in parameters["parts"].items():
        if number:
            rows[part] = f"{number:>16,}"
    rows["total"] = f"{parameters['total']:>16,}"
    if parameters["trainable"] != parameters["total"]:
        rows["trainable"] = f"{parameters['trainable']:>16,}"
    return rows


def _gate_lines(config: dict[str, Any]) -> list[str]:
    moe = config["moe"]
    if not moe["num_experts"]:
        return []
    rows = {}
    for gate in parse_gate_layers(moe["gate"]).gates:
        # Runs of earlier versions store nothing for a gate without options.
        rows[gate] = _name_value_list(config["gate_options"].get(gate, {}))
    title = "gate"
    if "@" in moe["gate"]:
        title = f"gates {moe['gate']}"
    return [
        f"{title}, for {moe['num_experts']} experts",
        *_table(rows),
        "expert type",
        *_table({moe["expert_type"]: _name_value_list(config["expert_options"])}),
    ]


def _code_lines(kind: str, origins: dict[str, dict[str, str]]) -> list[str]:
    """Format where gates come from, which checkpoints of earlier versions do not record.

    Args:
        kind: gates or expert types.
        origins: their origins by name.
    """
    rows = {}
    for name, origin in origins.items():
        words = [origin.get(key, "") for key in ("kind", "package", "path", "sha256")]
        rows[name] = "  ".join(word for word in words if word)
    return [f"code of {kind}", *_table(rows)] if rows else []


def _data(data: dict[str, dict[str, Any]]) -> dict[str, str]:
    if not data:
        return {"none": "on record"}
    rows = {}
    for prefix, files in data.items():
        rows[prefix] = _name_value_list(files) or "no files when it was saved"
    return rows


def _name_value_list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def format_tensors(summary: dict[str, Any]) -> list[str]:
    """Format the tensors of a summary as lines of text, with their statistics if it has any."""
    rows = [("tensor", "shape", "pieces", "dtype", "min", "max", "norm", "")]
    for name, entry in (summary["tensors"] | summary["buffers"]).items():
        rows.append(
            (name, str(entry["shape"]), str(entry["pieces"]), *_statistics_cells(entry))
        )
    widths = []
    for column in range(len(rows[0])):
        widths.append(max(len(row[column]) for row in rows))
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _statistics_cells(entry: dict[str, Any]) -> list[str]:
    if "dtype" not in entry:
        return [""] * 5
    cells = [entry["dtype"]]
    for key in ("min", "max", "norm"):
        if entry[key] is None:
            cells.append("")
        else:
            cells.append(f"{entry[key]:.4g}")
    remarks = []
    if entry["not_finite"]:
        remarks.append(f"{entry['not_finite']} NOT FINITE")
    if "frozen" in entry:
        remarks.append("frozen")
    return [*cells, ", ".join(remarks)]


def format_differences(comparison: dict[str, Any]) -> list[str]:
    """Format a result of `compare_checkpoints` as lines of text."""
    first, second = comparison["paths"]
    lines = [f"first   {first}", f"second  {second}"]
    for section in _DIFFERENCE_SECTIONS:
        if comparison[section]:
            lines += [section, *_table(_arrows(comparison[section]))]
    tensors = comparison["tensors"]
    rows = dict.fromkeys(tensors["only_first"], "only in the first")
    rows |= dict.fromkeys(tensors["only_second"], "only in the second")
    rows |= _arrows(tensors["shapes"])
    lines += ["tensors", *_table(rows or {"none": "differs in name or shape"})]
    if "values" in tensors:
        distances = {name: _distance(value) for name, value in tensors["values"].items()}
        lines += ["values: |first - second| / the larger norm", *_table(distances)]
    return lines


def _arrows(pairs: dict[str, list[Any]]) -> dict[str, str]:
    return {name: f"{old} -> {new}" for name, (old, new) in pairs.items()}


def _distance(value: float | None) -> str:
    if value is None:
        return "not finite"
    if value == 0.0:
        return "equal"
    return f"{value:.3e}"


def _table(rows: dict[str, Any]) -> list[str]:
    """Format names and values as aligned, indented lines."""
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items()]
