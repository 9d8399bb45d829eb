"""Continues prompts with a checkpoint: `deepspeed --num_gpus 2 tools/generate_text.py --load runs/x/checkpoints`.

Any number of ranks may be started: as many as shared the experts in the training share them here if that divides the
number of ranks, else each has all. Each continuation is printed as one line, `> prompt|continuation`, with newlines
shown as \\n.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", required=True, help="folder given to --save of the training run"
    )
    parser.add_argument(
        "--load-step",
        type=int,
        default=0,
        help="iteration of the checkpoint; 0: the newest (default)",
    )
    parser.add_argument("--prompt", nargs="+", default=["def "], help="one or more beginnings")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="tokens to add to each (default 32)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="0: always the likeliest token (default 0.7)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="sample from this much probability mass (default 0.9)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from this many tokens; 0: all (default)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from megatron.inference.generate import generate
    from megatron.initialize import build_engine, build_run_model, initialize_inference

    run = initialize_inference(args.load, args.load_step)
    engine = build_engine(run, build_run_model(run))
    tokenizer = run.tokenizer
    prompts = [tokenizer.encode(p).tolist() for p in args.prompt]
    outputs = generate(
        engine.model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        eod=tokenizer.eod,
        seed=args.seed,
        vocab_size=tokenizer.vocab_size,
    )
    if run.groups.is_rank0:
        for prompt, ids in zip(args.prompt, outputs, strict=True):
            print(f"> {prompt}|{tokenizer.decode(ids)}".replace("\n", "\\n"), flush=True)


def main() -> int:
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse()))


if __name__ == "__main__":
    raise SystemExit(main())
