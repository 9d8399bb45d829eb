"""Shows which experts a model uses for each token of a text, as one HTML page.

    python tools/inspect_routing.py --load runs/x/checkpoints --file story.txt --output page.html
    python tools/inspect_routing.py --load runs/x/checkpoints --text "def f(x):" --trace f.trace
    python tools/inspect_routing.py --from-trace f.trace --output page.html

The page needs no network: tokens coloured by their number of experts, the experts of each token,
what each expert is used for, loads, and experts that are used together. --trace writes the
experts and weights of all tokens to a file, see megatron/moe/routing_trace_file.py. Under the
launcher, ranks share the experts of a checkpoint as in its training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from megatron.config.tool_flags import add_load_flags

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_load_flags(parser, required=False)
    parser.add_argument("--text", nargs="+", default=[], help="texts, each one document")
    parser.add_argument(
        "--file",
        nargs="+",
        default=[],
        help="text files in UTF-8, each one document; - reads the standard input",
    )
    parser.add_argument(
        "--from-trace",
        help="read a trace file instead of running the model. With --load, the trace must be of "
        "this model, whose tokenizer decodes token ids without text",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="tokens of all texts that the model runs on; the rest is cut (default 16384)",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens that the model sees at most; longer texts are cut into windows; 0: as many "
        "as it has positions (default)",
    )
    parser.add_argument("--output", help="HTML page")
    parser.add_argument(
        "--page-tokens",
        type=int,
        help="tokens that the page shows at most, and as many as fit 5 MB; its statistics are "
        "over all tokens (default 2000)",
    )
    parser.add_argument("--trace", help="trace file to write")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return parser().parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Record or read a trace, and write the page and the trace file."""
    from megatron.analysis.inspect_routing import InspectionInputs, write_inspection
    from megatron.moe.gate_registry import import_gate_files

    inputs = InspectionInputs(
        load=args.load or "",
        load_step=args.load_step,
        texts=tuple(args.text),
        files=tuple(args.file),
        from_trace=args.from_trace or "",
        max_tokens=args.max_tokens,
        window=args.window,
    )
    import_gate_files(args.gate_path)
    for line in write_inspection(inputs, args.output, args.trace, args.page_tokens):
        print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
