"""Evaluates a checkpoint or a Hugging Face folder on tasks of lm-evaluation-harness.

    python tools/evaluate.py --load runs/x/checkpoints --tasks lambada_openai,hellaswag
    torchrun --nproc-per-node 8 tools/evaluate.py --load runs/x/checkpoints --tasks mmlu

Any number of ranks can be started; they share the examples. Experts are sharded as in training
if that fits the number of ranks; otherwise every rank holds all experts. docs/evaluation.md
says how the numbers are normalised and how to evaluate without a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.evaluation.lm_harness import HarnessModel
    from megatron.evaluation.task_suite import TaskSuite
    from megatron.inference.chat import ChatTemplate
    from megatron.initialize import Run


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model_flags(parser)
    _add_task_flags(parser)
    _add_prompt_flags(parser)
    _add_output_flags(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    command_line = parser()
    args = command_line.parse_args(argv)
    if not args.list_tasks and not (args.load and args.tasks):
        command_line.error("--load and --tasks are needed, or --list-tasks alone")
    return args


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    from megatron.config.tool_flags import add_load_flags

    add_load_flags(parser, required=False)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="rows per forward pass of a rank (default 8)"
    )


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=lambda text: [name for name in text.split(",") if name],
        help="tasks, groups or tags of the harness, or paths of task files, with commas between",
    )
    parser.add_argument(
        "--list-tasks", action="store_true", help="print the names of all tasks and end"
    )
    parser.add_argument(
        "--include-path",
        nargs="+",
        action="extend",
        default=[],
        help="folders with further task files",
    )
    parser.add_argument(
        "--limit",
        type=float,
        help="examples of each task, for a quick look: a number, or a fraction below 1 "
        "(default: all)",
    )


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-fewshot",
        type=int,
        help="solved examples before each question (default: each task's own number)",
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="prompts are messages of a conversation, in the template of the tokenizer's files; "
        "solved examples are earlier messages",
    )
    parser.add_argument(
        "--system-instruction", help="first message, or first line, of every prompt"
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bootstrap-iters",
        type=int,
        default=1000,
        help="resamples for standard errors that have no formula; 0: no standard errors "
        "(default 1000)",
    )
    parser.add_argument(
        "--output", help="JSON file that the results are written to, with the tasks' settings"
    )
    parser.add_argument(
        "--log-samples",
        action="store_true",
        help="include every prompt and answer in the JSON file",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, print a table, and write the JSON file."""
    from megatron.evaluation.lockstep import LockstepRanks
    from megatron.initialize import initialize_inference
    from megatron.moe.gate_registry import import_gate_files

    _check(args)
    if args.list_tasks:
        list_tasks(args.include_path)
        return
    import_gate_files(args.gate_path)
    run = initialize_inference(args.load, args.load_step)
    # Before the model is built: a wrong flag shows immediately.
    suite = LockstepRanks(run.groups, {}).run(lambda: _load_tasks(args))
    template = find_template(args, run)
    harness_model = build_model_of_run(args, run, template)
    harness_model.ranks.run(lambda: _evaluate(args, run, suite, harness_model))


def find_template(args: argparse.Namespace, run: Run) -> ChatTemplate | None:
    """Return the chat template of --apply-chat-template.

    Raises:
        ValueError: there is none.
    """
    from megatron.config.fields import require
    from megatron.evaluation.source import folders_of_tokenizer
    from megatron.inference.chat import find_chat_template

    if not args.apply_chat_template:
        return None
    folders = folders_of_tokenizer(run, args.load)
    template = find_chat_template(folders)
    require(
        template is not None,
        "--apply-chat-template",
        True,
        "for a tokenizer with a chat template in tokenizer_config.json or chat_template.jinja",
        f"Looked in {', '.join(map(str, folders))}.",
    )
    return template


def build_model_of_run(
    args: argparse.Namespace, run: Run, template: ChatTemplate | None
) -> HarnessModel:
    """Build the model, and the harness's model around it."""
    from megatron.evaluation.lm_harness import build_harness_model
    from megatron.evaluation.scoring import TokenScorer
    from megatron.evaluation.source import folders_of_tokenizer
    from megatron.evaluation.text_generation import TextGenerator
    from megatron.inference.chat import find_end_tokens
    from megatron.initialize import build_inference_model

    model = build_inference_model(run)
    tokenizer = run.tokenizer
    max_positions = model.config.max_positions
    scorer = TokenScorer(
        model, run.groups, tokenizer.vocab_size, max_positions, args.batch_size
    )
    end_tokens = find_end_tokens(folders_of_tokenizer(run, args.load))
    if template is not None:
        end_tokens |= template.end_tokens
    if tokenizer.eod is not None:
        end_tokens.add(tokenizer.eod)
    generator = TextGenerator(
        model, run.groups, tokenizer, args.batch_size, end_tokens=frozenset(end_tokens)
    )
    return build_harness_model(scorer, generator, tokenizer, "--tasks", template)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for a value that is not allowed."""
    from megatron.config.fields import require
    from megatron.config.tool_flags import require_output_file

    require(
        args.num_fewshot is None or args.num_fewshot >= 0,
        "--num-fewshot",
        args.num_fewshot,
        "0 or more",
    )
    is_limit = args.limit is None or 0 < args.limit < 1 or args.limit.is_integer()
    require(
        is_limit and (args.limit is None or args.limit > 0),
        "--limit",
        args.limit,
        "a positive integer, or a fraction between 0 and 1",
    )
    require(
        args.bootstrap_iters == 0 or args.bootstrap_iters > 1,
        "--bootstrap-iters",
        args.bootstrap_iters,
        "0, or 2 or more",
    )
    require(
        not args.log_samples or bool(args.output),
        "--log-samples",
        True,
        "only with --output FILE",
    )
    if args.output:
        require_output_file(args.output)


def _load_tasks(args: argparse.Namespace) -> TaskSuite:
    from megatron.evaluation.task_suite import TaskSuite

    return TaskSuite(args.tasks, "--tasks", args.include_path, args.num_fewshot)


def _evaluate(
    args: argparse.Namespace, run: Run, suite: TaskSuite, harness_model: HarnessModel
) -> None:
    """Run the tasks and report the results, on rank 0."""
    from lm_eval.utils import make_table

    from megatron.evaluation.source import describe_source
    from megatron.evaluation.task_suite import RunOptions
    from megatron.io import atomic_write

    options = RunOptions(
        args.limit,
        args.bootstrap_iters,
        args.log_samples,
        args.apply_chat_template,
        args.system_instruction,
    )
    results = suite.run(harness_model, args.tasks, options)
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    sys.stdout.flush()
    if args.output:
        settings = {**describe_source(run, args.load), **_settings(args)}
        described = {**settings, **results}
        text = json.dumps(described, indent=2, default=str, ensure_ascii=False)
        atomic_write.write_text(args.output, text + "\n")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the evaluation that are in no task file."""
    from importlib.metadata import version

    return {
        "lm_eval_version": version("lm_eval"),
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "bootstrap_iters": args.bootstrap_iters,
        "chat_template": args.apply_chat_template,
        "system_instruction": args.system_instruction,
    }


def list_tasks(include_paths: list[str]) -> None:
    """Print the names of all tasks, groups and tags, one per line."""
    from megatron.evaluation.task_suite import known_tasks
    from megatron.optional_packages import require_package

    require_package("lm_eval", "eval", "--list-tasks")
    print(*known_tasks(include_paths).all_tasks, sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
