"""Continues prompts with a checkpoint.

    python tools/generate_text.py --load runs/x/checkpoints
    torchrun --nproc-per-node 2 tools/generate_text.py --load runs/x/checkpoints

Any number of ranks can be started. Experts are sharded as in training if that fits the number
of ranks; otherwise every rank holds all experts. Each continuation is printed on one line,
`> prompt|continuation`, with newlines and other control characters shown as escapes. It is
the same with any other prompts, in any order.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, surrogates, and separators of lines and paragraphs."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", required=True, help="directory of checkpoints: --save of the training run"
    )
    parser.add_argument(
        "--load-step",
        type=int,
        default=0,
        help="iteration of the checkpoint; 0: the newest (default)",
    )
    parser.add_argument(
        "--gate-path",
        nargs="+",
        action="extend",
        default=[],
        help="files with the model's gate, if it is neither built-in nor installed",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        help="one or more prompts; may be repeated (default 'def ')",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        help="tokens to generate per prompt (default 32)",
    )
    _add_sampling_flags(parser)
    parser.add_argument(
        "--moe-eval-capacity-factor",
        type=float,
        default=0.0,
        help="capacity factor of the experts, under which the text for a prompt depends on the "
        "other prompts; 0: no token is dropped, whatever the training run used (default)",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.prompt = args.prompt or ["def "]  # a default would be extended, not replaced
    return args


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about how each token is chosen."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="0: always choose the most likely token (default 0.7)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="sample from this much of the probability mass (default 0.9)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="sample from this many most likely tokens; 0: all (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")


def run(args: argparse.Namespace) -> None:
    """Generate and print the continuations."""
    from megatron.inference.generate import generate
    from megatron.initialize import build_inference_model, initialize_inference
    from megatron.moe.gate_registry import import_gate_files

    import_gate_files(args.gate_path)
    capacity_factor = args.moe_eval_capacity_factor
    run = initialize_inference(args.load, args.load_step, capacity_factor)
    model = build_inference_model(run)
    tokenizer = run.tokenizer
    prompts = [tokenizer.encode(p).tolist() for p in args.prompt]
    outputs = generate(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        eod=tokenizer.eod,
        seed=args.seed,
        vocab_size=tokenizer.vocab_size,
        independent_prompts=capacity_factor == 0,
    )
    if run.groups.is_rank0:
        for prompt, ids in zip(args.prompt, outputs, strict=True):
            print(one_line(f"> {prompt}|{tokenizer.decode(ids)}"), flush=True)


def one_line(text: str) -> str:
    """Escape characters that end a line, act on a terminal or make a file binary."""
    shown = []
    for character in text:
        if unicodedata.category(character) in _ESCAPED:
            character = character.encode("unicode_escape").decode("ascii")
        shown.append(character)
    return "".join(shown)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
