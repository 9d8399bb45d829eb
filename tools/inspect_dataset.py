"""Shows what token datasets (.bin/.idx pairs) hold, finds faults in them, and repairs one kind."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.tokenizer.base import Tokenizer

EPILOG = """Exit code: 0 all sound, 1 a fault in files that can be read, 2 corrupt or missing files,
or a mistake in the flags. --repair is for shards of other tools whose index leaves the
end-of-document token out of the lengths, so that document i starts i tokens early; it writes a
correct pair. Examples:
  python tools/inspect_dataset.py data/corpus_text_document --full --tokenizer-type GPT2BPETokenizer
    --vocab-file dataset/gpt2-vocab.json --merge-file dataset/gpt2-merges.txt
  python tools/inspect_dataset.py old_text_document --repair new_text_document"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from megatron.config.flag_parser import add_section_flags
    from megatron.config.tokenizer import TokenizerConfig

    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "prefix", nargs="+", metavar="PREFIX", help="dataset, with or without .bin or .idx"
    )
    p.add_argument(
        "--documents",
        type=int,
        default=3,
        metavar="N",
        help="show the first N documents (default: 3)",
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="show the first N tokens of each (default: 64)",
    )
    p.add_argument(
        "--full",
        action="store_true",
        help="read all tokens: their range, where the end-of-document id is, checksums",
    )
    p.add_argument(
        "--json",
        metavar="FILE",
        help="also write what was found to FILE: a list, an entry per PREFIX",
    )
    p.add_argument("--repair", metavar="OUT", help="write the corrected pair to this prefix")
    add_section_flags(
        p,
        TokenizerConfig,
        "The tokenizer that decodes the documents shown and is compared with the record. "
        "Without any of these flags, the documents are decoded by the recorded tokenizer if its "
        "files are still there.",
    )
    return p


def build_tokenizer_of(args: argparse.Namespace) -> Tokenizer | None:
    """Build the tokenizer that the flags describe; None if they describe none."""
    from megatron.config.flag_parser import section_values
    from megatron.config.tokenizer import TokenizerConfig
    from megatron.tokenizer.build import build_tokenizer

    values = section_values(args, TokenizerConfig)
    if not any(values.values()):
        return None
    return build_tokenizer(TokenizerConfig(**values))


def inspect(
    prefix: str, args: argparse.Namespace, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Inspect one dataset, repairing it first if requested, and print what is found.

    Returns:
        What is found, as JSON values.
    """
    from megatron.data.indexed.describe import describe
    from megatron.data.indexed.inspect import scan, summarize
    from megatron.data.indexed.opened import open_dataset
    from megatron.data.indexed.reader import dataset_prefix
    from megatron.data.indexed.repair import repair
    from megatron.io.progress import byte_progress_bar

    opened = open_dataset(prefix, tokenizer)
    size = opened.dataset.tokens.nbytes
    if args.repair:
        out = dataset_prefix(args.repair)
        with byte_progress_bar(total=2 * size) as bar:
            eod = repair(opened, out, tokenizer, bar.update)
        print(f"{prefix} -> {out}: {opened.uncounted_tokens} documents end with {eod} now")
        opened = open_dataset(out, tokenizer)
    found = summarize(opened, tokenizer, args.documents, args.tokens)
    if args.full:
        with byte_progress_bar(total=size) as bar:
            found["full"], problems = scan(opened, tokenizer, bar.update)
        found["faults"] += problems
    print(*describe(found), sep="\n", flush=True)
    return found


def inspect_all(args: argparse.Namespace, prog: str) -> int:
    """Inspect every dataset, and return the exit code.

    An error in one dataset is printed and does not prevent the inspection of the others.
    """
    from megatron.config.fields import require
    from megatron.data.indexed.reader import dataset_prefix

    for flag in ("documents", "tokens"):
        value = getattr(args, flag)
        require(value >= 0, f"--{flag}", value, "0 or more")
    require(
        not args.repair or len(args.prefix) == 1, "PREFIX with --repair", args.prefix, "one"
    )
    is_folder = bool(args.json) and os.path.isdir(args.json)
    require(not is_folder, "--json", args.json, "a file; this is a folder")
    tokenizer = build_tokenizer_of(args)
    found = []
    failed = False
    for prefix in map(dataset_prefix, args.prefix):
        try:
            found.append(inspect(prefix, args, tokenizer))
        except BrokenPipeError:  # stdout was closed; `run_tool` handles it
            raise
        except (ValueError, OSError) as error:
            failed = True
            found.append({"prefix": prefix, "error": str(error)})
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
    if args.json:
        write_json(args.json, found)
    if failed:
        return 2
    return int(any(entry["faults"] for entry in found))


def write_json(path: str, found: list[dict[str, Any]]) -> None:
    """Write the findings to a file."""
    import orjson

    from megatron.io.atomic_write import write_bytes

    write_bytes(path, orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")


def main() -> int:
    """Run the program, and return its exit code."""
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args()
    return run_tool(p.prog, lambda: inspect_all(args, p.prog))


if __name__ == "__main__":
    sys.exit(main())
