"""Shows what a checkpoint holds, whether it is whole, and how two of them differ."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """PATH is what was given to --save (the checkpoints in it are listed and the newest is shown) or one iter_*
folder in it. Sizes of files are always compared with what was written, their hashes with --verify. Exit code: 0 all
that was looked at is whole, 1 a checkpoint is broken or has values that are not finite, 2 nothing could be shown, or
a mistake in the flags. Examples:
  python tools/inspect_checkpoint.py runs/mine/checkpoints --verify
  python tools/inspect_checkpoint.py runs/mine/checkpoints/iter_0000300 runs/other/checkpoints --tensors"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("path", metavar="PATH", help="folder of checkpoints, or one checkpoint")
    p.add_argument(
        "other", metavar="PATH2", nargs="?", help="a second one, to compare the first with"
    )
    p.add_argument("--verify", action="store_true", help="compare the hashes of all files")
    p.add_argument(
        "--tensors",
        action="store_true",
        help="list every tensor with its shape, pieces, dtype, smallest and largest value and norm; of two "
        "checkpoints, the relative difference of every tensor",
    )
    p.add_argument("--json", action="store_true", help="print what was found as JSON")
    return p


def inspect(a: argparse.Namespace) -> int:
    """The exit code."""
    from tqdm import tqdm

    from megatron.checkpoint import inspect as i

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        if a.other:
            both = [
                i.summarize_checkpoint(i.one_of(Path(p)), verify=a.verify, progress=bar.update)
                for p in (a.path, a.other)
            ]
            found = i.compare_checkpoints(*both, tensors=a.tensors, progress=bar.update)
            found["faults"] = [fault for facts in both for fault in facts["faults"]]
            lines, faults = i.describe_differences(found), found["faults"]
        else:
            found, lines, faults = look_at(Path(a.path), a, bar.update)
    print(json.dumps(found, indent=1) if a.json else "\n".join(lines), flush=True)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(faults))


def look_at(path: Path, a: argparse.Namespace, progress) -> tuple[dict, list[str], list[str]]:
    """(what there is for JSON, the same as text, faults) of a checkpoint, or of a folder and its newest one."""
    from megatron.checkpoint import directory
    from megatron.checkpoint import inspect as i

    if path.is_dir() and directory.is_checkpoint(path):
        found = i.summarize_checkpoint(
            path.resolve(), verify=a.verify, tensors=a.tensors, progress=progress
        )
        return found, describe(found, a), found["faults"]
    rows = i.summarize_directory(path, a.verify, progress)
    found, lines = {"folder": str(path), "checkpoints": rows}, i.describe_listing(path, rows)
    faults = [fault for row in rows for fault in row["faults"]]
    for row in rows:
        if row["newest"]:
            newest = i.summarize_checkpoint(
                path / row["name"], tensors=a.tensors, progress=progress
            ) | {"verified": a.verify}
            found["newest"] = newest
            lines += ["", *describe(newest, a)]
            faults += newest["faults"]
    return found, lines, faults


def describe(found: dict, a: argparse.Namespace) -> list[str]:
    from megatron.checkpoint import inspect as i

    return i.describe_checkpoint(found) + (
        ["", *i.describe_tensors(found)] if a.tensors else []
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    return run_tool(p.prog, lambda: inspect(a))


if __name__ == "__main__":
    sys.exit(main())
