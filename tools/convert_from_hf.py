"""Convert a Hugging Face model to a checkpoint that --load continues."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """SOURCE is the folder of a Hugging Face model: config.json and safetensors files. OUTPUT
becomes a directory of checkpoints with one, of iteration 0: train it with --load OUTPUT, read its
flags with --config OUTPUT/iter_0000000/run.json, or generate text from it. Weights are stored in
fp32. Every tensor of the source is mapped, declared as unused by its family, or an error. Memory: a
few matrices. docs/huggingface.md has the families. Examples:
  python tools/convert_from_hf.py Mixtral-8x7B-v0.1 runs/mixtral
  python tools/generate_text.py --load runs/mixtral --prompt 'The capital of France is'"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", metavar="SOURCE", help="folder of a Hugging Face model")
    p.add_argument("output", metavar="OUTPUT", help="new or empty directory of checkpoints")
    return p


def run(args: argparse.Namespace) -> None:
    from megatron.interop.hf.convert import convert_from_hf
    from megatron.io.progress import byte_progress_bar

    with byte_progress_bar("write") as bar:
        result = convert_from_hf(args.source, args.output, bar.update, bar.reset)
    print(
        f"{args.source} -> {result.path}: {result.family}, {result.num_tensors} tensors, "
        f"{result.num_parameters:,} parameters in fp32"
    )
    if result.kept:
        print(f"kept aside for export: {len(result.kept)} tensors, such as {result.kept[0]}")
    if result.dropped:
        print(
            f"without effect, dropped: {len(result.dropped)} tensors: {result.dropped[0]} ..."
        )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
