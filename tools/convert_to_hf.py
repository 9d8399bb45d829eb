"""Write a checkpoint as a Hugging Face model that transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """FOLDER is the directory given to --save (its newest valid checkpoint is used) or one
iter_* directory in it. Every file is verified first. OUTPUT gets config.json, safetensors files and
the tokenizer. A model that came from a Hugging Face folder keeps its file names, dtypes, config and
the tensors that this program does not train. A setting that no family expresses, such as a gate of
your own, is named; --family moe_megatron expresses every model. Memory: a few matrices.
docs/huggingface.md has the families. Examples:
  python tools/convert_to_hf.py runs/mixtral/checkpoints exported
  python tools/convert_to_hf.py runs/a/checkpoints exported --family mixtral --dtype bfloat16"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "folder", metavar="FOLDER", help="directory of checkpoints, or one checkpoint"
    )
    p.add_argument("output", metavar="OUTPUT", help="new or empty directory for the model")
    p.add_argument(
        "--family",
        default="auto",
        metavar="NAME",
        help="model_type of the result, such as mixtral; auto (default): that of the Hugging Face "
        "folder from which the model came, else the first that expresses it",
    )
    p.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the parameters; auto (default): that of the Hugging Face folder from which "
        "the model came, else the compute dtype of the training; expert biases stay fp32",
    )
    p.add_argument(
        "--max-shard-size",
        default="",
        metavar="SIZE",
        help="largest file, unless one tensor is larger: 5GB, 512MiB, ...; default: the files of "
        "the Hugging Face folder from which the model came, else 5GB",
    )
    p.add_argument(
        "--load-step",
        type=int,
        default=0,
        metavar="N",
        help="iteration of the checkpoint; 0: the newest valid one (default)",
    )
    return p


def run(args: argparse.Namespace, prog: str) -> None:
    from megatron.checkpoint import consolidate as c
    from megatron.interop.hf.export import ExportOptions, convert_to_hf
    from megatron.io.progress import byte_progress_bar

    options = ExportOptions(
        family=args.family,
        dtype=c.WEIGHT_DTYPES.get(args.dtype),
        max_shard_bytes=c.parse_size(args.max_shard_size) if args.max_shard_size else None,
    )
    c.check_output(Path(args.output).resolve())
    source = c.open_for_tool(args.folder, args.load_step, prog)
    with byte_progress_bar("write") as bar:
        result = convert_to_hf(source, args.output, options, bar.update, bar.reset)
    print(
        f"{source.path} -> {args.output}: {result.family}, {result.num_tensors} tensors, "
        f"{result.nbytes / 1e6:,.1f} MB in {len(result.files)} files"
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: run(args, p.prog))


if __name__ == "__main__":
    sys.exit(main())
