"""Write the full tensors of a checkpoint, of any number of ranks, to safetensors files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """FOLDER is the directory given to --save (its newest valid checkpoint is used) or one
iter_* directory in it. Every file is verified first. OUTPUT gets model.safetensors, or several such
files with an index, named as Hugging Face names them; parameters and buffers keep the names they
have in this program; run.json, consolidated.json (the source and the progress of the run) and
SHA256SUMS are written alongside. Memory: a few slices of one tensor. Examples:
  python tools/consolidate_checkpoint.py runs/a/checkpoints runs/a/model --dtype bfloat16
  python tools/consolidate_checkpoint.py runs/a/checkpoints/iter_0000300 runs/a/at300 --optimizer"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "folder", metavar="FOLDER", help="directory of checkpoints, or one checkpoint"
    )
    p.add_argument("output", metavar="OUTPUT", help="new or empty directory for the result")
    p.add_argument(
        "--load-step",
        type=int,
        default=0,
        metavar="N",
        help="iteration of the checkpoint; 0: the newest valid one (default)",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters (default: float32, as they are trained); routers have "
        "--router-dtype, buffers and moments keep theirs",
    )
    p.add_argument(
        "--router-dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters of gates (default: float32): rounded, they may choose other "
        "experts",
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


def run(args: argparse.Namespace, prog: str) -> None:
    from megatron.checkpoint import consolidate as c
    from megatron.io.progress import byte_progress_bar

    options = c.ConsolidateOptions(
        dtype=c.WEIGHT_DTYPES[args.dtype],
        router_dtype=c.WEIGHT_DTYPES[args.router_dtype],
        optimizer=args.optimizer,
        max_shard_bytes=c.parse_size(args.max_shard_size),
    )
    c.check_output(Path(args.output).resolve())
    source = c.open_for_tool(args.folder, args.load_step, prog)
    with byte_progress_bar("write") as bar:
        result = c.consolidate(source, args.output, options, bar.update, bar.reset)
    print(
        f"{source.path} -> {args.output}: {result.num_tensors} tensors in {args.dtype}, "
        f"{sum(result.files.values()) / 1e6:,.1f} MB in {len(result.files)} files"
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: run(args, p.prog))


if __name__ == "__main__":
    sys.exit(main())
