"""Writes the whole tensors of a checkpoint, of any number of ranks, to one folder of safetensors files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """FOLDER is what was given to --save (its newest whole checkpoint is taken) or one iter_* folder in it. Every
file is verified first. OUTPUT gets model.safetensors, or several such files with an index, as Hugging Face names them;
parameters and buffers keep the names they have in this program; run.json, consolidated.json (where it comes from, how
far the run was) and SHA256SUMS lie beside them. Memory: a few slices of one tensor. Examples:
  python tools/consolidate_checkpoint.py runs/mine/checkpoints runs/mine/model --dtype bfloat16
  python tools/consolidate_checkpoint.py runs/mine/checkpoints/iter_0000300 runs/mine/at300 --optimizer"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "folder", metavar="FOLDER", help="folder of the checkpoints, or one checkpoint"
    )
    p.add_argument("output", metavar="OUTPUT", help="new or empty folder for the result")
    p.add_argument(
        "--load-step",
        type=int,
        default=0,
        metavar="N",
        help="iteration of the checkpoint; 0: the newest whole one (default)",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: float32, as they are trained); buffers and moments stay as they "
        "are",
    )
    p.add_argument(
        "--optimizer",
        action="store_true",
        help="also write the two moments of every parameter, to optimizer.safetensors",
    )
    p.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file, unless one tensor is larger: 5GB (default), 512MiB, ...",
    )
    return p


def run(a: argparse.Namespace, prog: str) -> None:
    from tqdm import tqdm

    from megatron.checkpoint import consolidate as c
    from megatron.config.schema import require

    def bar(what: str) -> tqdm:
        return tqdm(desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    require(a.load_step >= 0, "--load-step", a.load_step, "0 or more")
    options = c.ConsolidateOptions(
        c.DTYPES[a.dtype], a.optimizer, c.parse_size(a.max_shard_size)
    )
    c.check_output(Path(a.output).resolve())
    with bar("verify") as b:
        source, manifest, passed_over = c.find_valid_checkpoint(
            Path(a.folder), a.load_step, b.update
        )
    for problem in passed_over:
        print(f"{prog}: warning: {problem}; not used", file=sys.stderr)
    with bar("write") as b:
        result = c.consolidate(source, manifest, a.output, options, b.update, b.reset)
    print(
        f"{source} -> {a.output}: {result.tensors} tensors in {a.dtype}, {sum(result.files.values()) / 1e6:,.1f} MB "
        f"in {len(result.files)} files"
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    return run_tool(p.prog, lambda: run(a, p.prog))


if __name__ == "__main__":
    sys.exit(main())
