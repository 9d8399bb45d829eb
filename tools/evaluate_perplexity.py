"""Measures the perplexity of a checkpoint or a Hugging Face folder on any text.

    python tools/evaluate_perplexity.py --load runs/x/checkpoints --data valid.jsonl
    torchrun --nproc-per-node 8 tools/evaluate_perplexity.py --load runs/x/checkpoints \\
        --data data/wiki_text_document

A path is the prefix of a .bin/.idx pair or any input of tools/preprocess_data.py: JSON lines, also
compressed, Parquet, or a folder of them. Each document is scored on its own. Long ones are cut
into windows of the model's positions; with --stride, windows overlap and tokens see more text
before them. docs/evaluation.md says what is counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.evaluation.lockstep import LockstepRanks
    from megatron.evaluation.perplexity import WindowOptions
    from megatron.initialize import Run
    from megatron.tokenizer.base import Tokenizer


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model_flags(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, help="texts or token datasets, each measured alone"
    )
    parser.add_argument(
        "--json-key", default="text", help="field of a record with its text (default text)"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=0,
        help="tokens that the model sees at most; 0: as many as it has positions (default)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="tokens that each window after the first predicts; 0: all of a window, so that "
        "windows do not overlap (default)",
    )
    parser.add_argument(
        "--score-eod",
        action="store_true",
        help="score the end-of-document token after each document, too, as training does",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="documents of each path; 0: all (default)"
    )
    parser.add_argument("--output", help="JSON file that the figures are written to")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return parser().parse_args(argv)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    from megatron.config.tool_flags import add_load_flags

    add_load_flags(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows per forward pass of a rank (default 8)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print the figures, and write the JSON file."""
    from megatron.config.fields import require
    from megatron.config.tool_flags import require_output_file
    from megatron.evaluation.lockstep import LockstepRanks
    from megatron.evaluation.scoring import TokenScorer
    from megatron.initialize import build_inference_model, initialize_inference
    from megatron.moe.gate_registry import import_gate_files

    require(args.limit >= 0, "--limit", args.limit, "0 or more")
    if args.output:
        require_output_file(args.output)
    import_gate_files(args.gate_path)
    run = initialize_inference(args.load, args.load_step)
    options = _window_options(args, run.tokenizer, run.config.model.max_positions)
    model = build_inference_model(run)
    scorer = TokenScorer(
        model, run.groups, run.tokenizer.vocab_size, options.max_positions, args.batch_size
    )
    ranks = LockstepRanks(run.groups, {"score": scorer.score})
    ranks.run(lambda: _measure(args, run, ranks, options))


def _window_options(
    args: argparse.Namespace, tokenizer: Tokenizer, max_positions: int
) -> WindowOptions:
    """Check the flags about windows against the model."""
    from megatron.config.fields import require
    from megatron.evaluation.lm_harness import prefix_token
    from megatron.evaluation.perplexity import WindowOptions

    require(
        0 <= args.window <= max_positions,
        "--window",
        args.window,
        f"1 to {max_positions}, the positions of the model, or 0 for all of them",
    )
    window = args.window or max_positions
    require(
        0 <= args.stride <= window,
        "--stride",
        args.stride,
        f"1 to {window}, the tokens of a window, or 0 for as many",
    )
    eod = None
    if args.score_eod:
        eod = tokenizer.require_eod("--score-eod")
    return WindowOptions(prefix_token(tokenizer), window, args.stride, eod)


def _measure(
    args: argparse.Namespace, run: Run, ranks: LockstepRanks, options: WindowOptions
) -> None:
    """Measure each path and report, on rank 0."""
    from megatron.evaluation.documents import DocumentSet
    from megatron.evaluation.perplexity import measure_perplexity
    from megatron.evaluation.source import describe_source
    from megatron.io import atomic_write

    results = []
    for path in args.data:
        documents = DocumentSet(path, run.tokenizer, args.json_key)
        chosen = itertools.islice(documents.documents(), args.limit or None)
        totals = measure_perplexity(
            chosen, lambda requests: ranks.call("score", requests), options
        )
        text = "decoded" if documents.is_tokens else "original"
        result = {"data": path, "text": text, **vars(totals), **totals.figures()}
        results.append(result)
        print(describe(result), flush=True)
    if args.output:
        content = {
            **describe_source(run, args.load),
            "window": options.max_positions,
            "stride": options.stride or options.max_positions,
            "score_eod": args.score_eod,
            "results": results,
        }
        atomic_write.write_text(args.output, json.dumps(content, indent=2) + "\n")


def describe(result: dict[str, Any]) -> str:
    """Return the figures of one path as one line."""
    figures = []
    for name, label in (
        ("loss", "loss"),
        ("token_perplexity", "perplexity per token"),
        ("byte_perplexity", "per byte"),
        ("word_perplexity", "per word"),
        ("bits_per_byte", "bits per byte"),
    ):
        value = result[name]
        figures.append(f"{label} {'-' if value is None else format(value, '.6g')}")
    sizes = (
        f"{result['documents']} documents, {result['tokens']} tokens, {result['bytes']} bytes, "
        f"{result['words']} words; text: {result['text']}"
    )
    return f"{result['data']}: {', '.join(figures)} ({sizes})"


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
