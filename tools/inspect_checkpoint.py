"""Show what a checkpoint holds, whether it is valid, and how two checkpoints differ."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """PATH is the directory given to --save (its checkpoints are listed and the newest is
shown) or one iter_* directory in it. Sizes of files are always compared with the manifest, hashes
with --verify. Exit code: 0 all checkpoints are valid, 1 a checkpoint is broken or has values that
are not finite, 2 nothing could be shown, or a wrong flag. Examples:
  python tools/inspect_checkpoint.py runs/a/checkpoints --verify
  python tools/inspect_checkpoint.py runs/a/checkpoints/iter_0000300 runs/b/checkpoints --tensors"""


class Report(NamedTuple):
    """What was found, in the two forms that can be printed."""

    found: dict[str, Any]
    """For --json"""
    lines: list[str]
    """As text"""
    faults: list[str]
    """Problems of the checkpoints"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("path", metavar="PATH", help="directory of checkpoints, or one checkpoint")
    p.add_argument(
        "other", metavar="PATH2", nargs="?", help="a second one, compared with the first"
    )
    p.add_argument("--verify", action="store_true", help="compare the hashes of all files")
    p.add_argument(
        "--tensors",
        action="store_true",
        help="list every tensor with its shape, pieces, dtype, smallest and largest value and "
        "norm; for two checkpoints, the relative difference of every tensor",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    return p


def inspect(args: argparse.Namespace) -> int:
    """Print what was found and return the exit code."""
    from megatron.io.progress import byte_progress_bar
    from megatron.log import printable

    with byte_progress_bar() as bar:
        if args.other:
            report = compare(args, bar.update)
        else:
            report = show(Path(args.path), args, bar.update)
    if args.json:
        print(json.dumps(report.found, indent=1), flush=True)
    else:
        print("\n".join(map(printable, report.lines)), flush=True)
    for fault in report.faults:
        print(f"fault: {printable(fault)}", file=sys.stderr)
    return int(bool(report.faults))


def compare(args: argparse.Namespace, progress) -> Report:
    """Compare two checkpoints."""
    from megatron.checkpoint import inspect as i
    from megatron.checkpoint.inspect_text import format_differences

    summaries = []
    faults = []
    for path in (args.path, args.other):
        checkpoint = i.resolve_checkpoint(Path(path))
        summary = i.summarize_checkpoint(checkpoint, verify=args.verify, progress=progress)
        summaries.append(summary)
        faults += summary["faults"]
    found = i.compare_checkpoints(*summaries, tensors=args.tensors, progress=progress)
    found["faults"] = faults
    return Report(found, format_differences(found), faults)


def show(path: Path, args: argparse.Namespace, progress) -> Report:
    """Show one checkpoint, or list those of a directory and show the newest one."""
    from megatron.checkpoint import inspect as i
    from megatron.checkpoint.directory import is_checkpoint
    from megatron.checkpoint.inspect_text import format_directory

    if path.is_dir() and is_checkpoint(path):
        found = i.summarize_checkpoint(
            path.resolve(), verify=args.verify, tensors=args.tensors, progress=progress
        )
        return Report(found, format_summary(found, args), found["faults"])
    rows = i.summarize_directory(path, args.verify, progress)
    found = {"folder": str(path), "checkpoints": rows}
    lines = format_directory(path, rows)
    faults = []
    for row in rows:
        faults += row["faults"]
    for row in rows:
        if row["newest"]:
            newest = i.summarize_checkpoint(
                path / row["name"], tensors=args.tensors, progress=progress
            )
            newest["verified"] = args.verify  # when the directory was summarized
            found["newest"] = newest
            lines += ["", *format_summary(newest, args)]
            faults += newest["faults"]
    return Report(found, lines, faults)


def format_summary(summary: dict[str, Any], args: argparse.Namespace) -> list[str]:
    from megatron.checkpoint.inspect_text import format_checkpoint, format_tensors

    lines = format_checkpoint(summary)
    if args.tensors:
        lines += ["", *format_tensors(summary)]
    return lines


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: inspect(args))


if __name__ == "__main__":
    sys.exit(main())
