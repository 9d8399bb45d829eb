"""Makes an MoE model from a dense one.

    python tools/upcycle.py runs/dense/checkpoints runs/moe --num-experts 8 --topk 2
    python tools/upcycle.py Llama-3.2-1B runs/moe --strategy kmeans --num-experts 16 --topk 4

The first argument is the dense model: a directory of checkpoints, one checkpoint, or a Hugging Face
folder of a Llama, Qwen2 or Qwen3 model. The second is a new directory of checkpoints, which
training continues with --load. Flags are those of training that concern MoE layers and gates, the
seed, and those of this program; docs/upcycling.md describes them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.interop.upcycle.convert import UpcycleResult

PROG = "upcycle.py"
_GATE_FLAGS = "The flags of a gate: pretrain_gpt.py --gate NAME --help"


def run(argv: list[str]) -> None:
    """Upcycle the model that the arguments name, and print sizes and what to expect.

    Raises:
        ValueError: an argument, the dense model or the sample of text is refused.
        OSError: a file cannot be read or written.
    """
    from megatron.config.fields import require

    paths = argv[:2]
    require(
        len(paths) == 2 and not any(path.startswith("-") for path in paths),
        "the first two arguments",
        " ".join(paths),
        "the dense model and a new directory",
        f"For example: {PROG} runs/dense/checkpoints runs/moe --num-experts 8",
    )
    from megatron.interop.upcycle.convert import upcycle
    from megatron.interop.upcycle.dense_source import open_dense_source
    from megatron.interop.upcycle.flags import parse_request
    from megatron.io.progress import byte_progress_bar

    source = open_dense_source(paths[0])
    request = parse_request(source.config, argv[2:])
    with byte_progress_bar("write") as bar:
        result = upcycle(source, request, paths[1], bar.update, bar.reset)
    print(report(result))


def print_help() -> None:
    """Print the help of this program's flags and of those of MoE layers."""
    from megatron.config.flag_parser import add_flag
    from megatron.config.flags import flags_of
    from megatron.config.moe import MoEConfig
    from megatron.config.short_help import new_parser
    from megatron.interop.upcycle.options import UpcycleOptions

    parser = new_parser(f"{PROG} SOURCE OUTPUT", None, f"{__doc__}\n{_GATE_FLAGS}")
    sections = {"upcycling": UpcycleOptions, "MoE layers": MoEConfig}
    for title, cls in sections.items():
        group = parser.add_argument_group(title)
        for flag in flags_of(cls, title):
            add_flag(group, flag, flag.default)
    print(parser.format_help(), end="")


def report(result: UpcycleResult) -> str:
    """Return sizes and what to expect, for the end of the output."""
    dense = result.dense_size
    moe = result.moe_size
    active = f"{moe.active_min:,}"
    if moe.active_max != moe.active_min:
        active = f"{moe.active_min:,} to {moe.active_max:,}"
    return (
        f"{result.table}\n{result.path}: {moe.total:,} parameters, {active} active per token; the "
        f"dense model has {dense.total:,}\nBefore training, {result.description}."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help-all"} & set(arguments):
        print_help()
        return 0
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
