"""Continues prompts with a checkpoint or a Hugging Face model folder.

    python tools/generate_text.py --load runs/x/checkpoints --prompt "def " "import "
    python tools/generate_text.py --load runs/x/checkpoints --interactive
    torchrun --nproc-per-node 2 tools/generate_text.py --load runs/x/checkpoints \\
        --prompt-file prompts.jsonl --output continuations.jsonl

Any number of ranks can be started. Experts are sharded as in training if that fits the number
of ranks; otherwise every rank holds all experts. Each line of a prompt is printed after `> `, and
each line of its continuation after `| `, with control characters other than tabs and newlines
shown as escapes. A continuation is the same with any other prompts, in any order. The speed is
printed to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.inference.chat import LineReader
    from megatron.inference.text import Continuation
    from megatron.inference.transcript import Transcript
    from megatron.initialize import Run
    from megatron.model.gpt import GPT

_KEEP_ALIVE_SECONDS = 60.0
"""Longest time for which other ranks wait for a line of the user in one collective"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from megatron.config.tool_flags import add_load_flags

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_load_flags(parser)
    _add_prompt_flags(parser)
    _add_sampling_flags(parser)
    _add_running_flags(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    args = parser().parse_args(argv)
    if not (args.prompt or args.prompt_file or args.interactive):
        args.prompt = ["def "]  # a default of the flag would be extended, not replaced
    return args


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about prompts and about where their continuations go."""
    parser.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        help="one or more prompts; may be repeated (default 'def ')",
    )
    parser.add_argument(
        "--prompt-file",
        default="",
        help="text with a prompt on each line, or JSON lines (.jsonl, .json, also compressed)",
    )
    parser.add_argument(
        "--prompt-key",
        default="prompt",
        help="key of the prompt in JSON lines (default 'prompt')",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="continue each line of the standard input, as a conversation if the tokenizer has "
        "a chat template",
    )
    parser.add_argument(
        "--stream", action="store_true", help="print text while it is generated"
    )
    parser.add_argument(
        "--output",
        default="",
        help="write JSON lines with prompt, text, tokens and the reason of the end instead of "
        "printing (with --stream: as well)",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about how each token is chosen and where a continuation ends."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        help="tokens to generate per prompt (default 32)",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        action="extend",
        default=[],
        help="strings that end a continuation, which is cut before them; may be repeated",
    )
    parser.add_argument(
        "--greedy", action="store_true", help="always choose the most likely token"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="divisor of the logits; 0: as --greedy (default 0.7)",
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
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample from tokens with at least this multiple of the largest probability; 0: all "
        "(default)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: make tokens that the text already has less likely (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")


def _add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about how the model runs."""
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="most prompts that run together; 0: all (default 32)",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute the keys and values of all tokens again for each new one",
    )
    parser.add_argument(
        "--moe-eval-capacity-factor",
        type=float,
        default=0.0,
        help="capacity factor of the experts, under which the text for a prompt depends on the "
        "other prompts; 0: no token is dropped, whatever the training run used (default)",
    )


def run(args: argparse.Namespace) -> None:
    """Generate and print the continuations."""
    _check(args)
    from megatron.inference.prompts import read_prompts
    from megatron.initialize import build_inference_model, initialize_inference
    from megatron.moe.gate_registry import import_gate_files

    import_gate_files(args.gate_path)
    options = _generation_options(args)
    prompts = args.prompt
    if args.prompt_file:
        prompts = read_prompts(args.prompt_file, args.prompt_key)
    run = initialize_inference(args.load, args.load_step, args.moe_eval_capacity_factor)
    session = _Session(args, run, build_inference_model(run), options)
    if args.interactive:
        session.chat()
    else:
        session.continue_prompts(prompts)
    if run.groups.is_rank0:
        sys.stderr.write(session.speed())


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that exclude each other, and for values out of range."""
    from megatron.config.fields import require
    from megatron.config.tool_flags import require_output_file

    given = {
        "--prompt": bool(args.prompt),
        "--prompt-file": bool(args.prompt_file),
        "--interactive": args.interactive,
    }
    sources = [flag for flag, is_given in given.items() if is_given]
    require(len(sources) == 1, "the source of prompts", " and ".join(sources), "one of them")
    require(args.max_new_tokens > 0, "--max-new-tokens", args.max_new_tokens, "1 or more")
    require(args.batch_size >= 0, "--batch-size", args.batch_size, "1 or more, or 0 for all")
    require(all(args.stop), "--stop", "", "a text of one character or more")
    if args.greedy:
        require(
            not args.temperature,
            "--temperature",
            args.temperature,
            "none with --greedy",
            "Leave one of them out.",
        )
    if args.output:
        require(not args.interactive, "--output", args.output, "none with --interactive")
        require_output_file(args.output)


class _Session:
    """Generates text with one model, as the flags say, and measures the speed."""

    def __init__(self, args: argparse.Namespace, run: Run, model: GPT, options: dict[str, Any]):
        from megatron.inference.chat import find_end_tokens, template_folders

        self.args = args
        self.run = run
        self.model = model
        checkpoint = run.checkpoint and run.checkpoint.path
        model_file = run.config.tokenizer.tokenizer_model
        self.folders = template_folders(args.load, checkpoint, model_file)
        self.end_tokens = find_end_tokens(self.folders)
        if run.tokenizer.eod is not None:
            self.end_tokens.add(run.tokenizer.eod)
        self.options = options
        self.num_texts = 0
        self.num_tokens = 0
        self.seconds = 0.0

    def continue_prompts(self, prompts: list[str]) -> None:
        """Continue prompts, and print or write their continuations."""
        from megatron.inference.prompts import require_fitting_prompt, write_continuations
        from megatron.inference.text import encode_prompt
        from megatron.inference.transcript import Transcript

        tokens = [encode_prompt(self.run.tokenizer, prompt) for prompt in prompts]
        for prompt, row in zip(prompts, tokens, strict=True):
            require_fitting_prompt(row, prompt, self.model.config.max_positions)
        transcript = None
        is_rank0 = self.run.groups.is_rank0
        if is_rank0 and (self.args.stream or not self.args.output):
            transcript = Transcript(prompts, is_live=self.args.stream)
        continuations = self._generate(tokens, transcript)
        if is_rank0 and self.args.output:
            write_continuations(self.args.output, prompts, continuations)

    def chat(self) -> None:
        """Answer the lines of rank 0's standard input until it ends."""
        from megatron.inference.chat import Conversation, LineReader, find_chat_template
        from megatron.inference.transcript import Transcript
        from megatron.log import report_error

        is_rank0 = self.run.groups.is_rank0
        template = find_chat_template(self.folders)
        if template is not None:
            self.end_tokens |= template.end_tokens
        max_positions = self.model.config.max_positions
        conversation = Conversation(
            self.run.tokenizer, template, max_positions, self.args.max_new_tokens
        )
        reader = LineReader(sys.stdin.fileno()) if is_rank0 else None
        while (message := self._next_message(reader)) is not None:
            try:
                prompt = conversation.prompt(message)
            except ValueError as error:
                if is_rank0:
                    report_error(error)
                continue
            transcript = None
            if is_rank0:
                # A terminal has shown what was typed.
                shows_prompts = not sys.stdin.isatty()
                transcript = Transcript([message], is_live=True, shows_prompts=shows_prompts)
            (answer,) = self._generate([prompt], transcript)
            conversation.add_answer(answer.text)
        if is_rank0 and sys.stdin.isatty():
            sys.stdout.write("\n")

    def _next_message(self, reader: LineReader | None) -> str | None:
        """Return the next line of rank 0 that is not blank; None: there is none."""
        from megatron.parallel.groups import broadcast_from_rank0

        if reader is not None and sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        while True:
            line = broadcast_from_rank0(
                lambda: reader.next_line(_KEEP_ALIVE_SECONDS), self.run.groups
            )
            if line is None or line.strip():
                return line

    def _generate(
        self, tokens: list[list[int]], transcript: Transcript | None
    ) -> list[Continuation]:
        from megatron.inference.text import generate_texts

        callbacks = None if transcript is None else transcript.callbacks
        start = time.perf_counter()
        continuations = generate_texts(
            self.model,
            self.run.tokenizer,
            tokens,
            eod=self.end_tokens,
            callbacks=callbacks,
            **self.options,
        )
        self.seconds += time.perf_counter() - start
        self.num_texts += len(tokens)
        self.num_tokens += sum(len(continuation.tokens) for continuation in continuations)
        return continuations

    def speed(self) -> str:
        """Return a line with the number of tokens and the time that they took."""
        rate = self.num_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.num_texts} continuations with {self.num_tokens} tokens in "
            f"{self.seconds:.2f} s: {rate:.1f} tokens/s\n"
        )


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate_texts` that flags set."""
    from megatron.inference.sampling import Sampling

    temperature = 0.7 if args.temperature is None else args.temperature
    if args.greedy:
        temperature = 0.0
    return {
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "sampling": Sampling(
            temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
        ),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "use_cache": not args.no_cache,
        "independent_prompts": args.moe_eval_capacity_factor == 0,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
