"""Shows what token shards (.bin/.idx pairs) hold, finds faults in them, and repairs one kind."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.tokenizer.base import Tokenizer

EPILOG = """Exit code: 0 all sound, 1 a fault in files that can be read, 2 damaged or missing files, or a mistake in the
flags. --repair is for shards of other tools whose index leaves the end-of-document token out of the lengths, so that
document i starts i tokens early; it writes a correct pair. Examples:
  python tools/inspect_dataset.py data/corpus_text_document --full --tokenizer-type GPT2BPETokenizer
    --vocab-file dataset/gpt2-vocab.json --merge-file dataset/gpt2-merges.txt
  python tools/inspect_dataset.py old_text_document --repair new_text_document"""


def parser() -> argparse.ArgumentParser:
    from megatron.config.schema import TOKENIZERS

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
        help="the first N tokens of each (default: 64)",
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
    p.add_argument(
        "--tokenizer-type",
        default="",
        choices=TOKENIZERS,
        help="to decode with and to compare with the record (default: GPT2BPETokenizer if its files are "
        "given, else none)",
    )
    p.add_argument(
        "--vocab-file", default="", metavar="FILE", help="vocab.json of GPT2BPETokenizer"
    )
    p.add_argument(
        "--merge-file", default="", metavar="FILE", help="merges.txt of GPT2BPETokenizer"
    )
    p.add_argument(
        "--tokenizer-model", default="", metavar="FILE", help="as in preprocess_data.py"
    )
    return p


def tokenizer_of(a: argparse.Namespace) -> Tokenizer | None:
    from megatron.config.schema import TokenizerConfig
    from megatron.tokenizer.build import build_tokenizer

    if not (a.tokenizer_type or a.vocab_file or a.merge_file or a.tokenizer_model):
        return None
    return build_tokenizer(
        TokenizerConfig(
            a.tokenizer_type or "GPT2BPETokenizer",
            a.vocab_file,
            a.merge_file,
            a.tokenizer_model,
        )
    )


def inspect(prefix: str, a: argparse.Namespace, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is found in one pair: printed, and returned for JSON."""
    from tqdm import tqdm

    from megatron.data.indexed.inspect import describe, open_dataset, repair, scan, summarize
    from megatron.data.indexed.reader import prefix_of

    def bar(total: int) -> tqdm:
        return tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    pair = open_dataset(prefix, tokenizer)
    size = pair.dataset.tokens.nbytes
    if a.repair:
        out = prefix_of(a.repair)
        with bar(2 * size) as b:
            eod = repair(pair, out, tokenizer, b.update)
        print(f"{prefix} -> {out}: {pair.uncounted} documents end with {eod} now")
        pair = open_dataset(out, tokenizer)
    found = summarize(pair, tokenizer, a.documents, a.tokens)
    if a.full:
        with bar(size) as b:
            found["full"], faults = scan(pair, tokenizer, b.update)
        found["faults"] += faults
    print(*describe(found), sep="\n", flush=True)
    return found


def inspect_all(a: argparse.Namespace, prog: str) -> int:
    """The exit code."""
    import orjson

    from megatron.config.schema import require
    from megatron.data.indexed.reader import prefix_of
    from megatron.io.atomic_write import write_bytes

    for flag in ("documents", "tokens"):
        require(getattr(a, flag) >= 0, f"--{flag}", getattr(a, flag), "0 or more")
    require(not a.repair or len(a.prefix) == 1, "PREFIX with --repair", a.prefix, "one")
    require(
        not (a.json and os.path.isdir(a.json)), "--json", a.json, "a file; this is a folder"
    )
    tokenizer = tokenizer_of(a)
    found, damaged = [], False
    for prefix in map(prefix_of, a.prefix):
        try:
            found.append(inspect(prefix, a, tokenizer))
        except BrokenPipeError:  # of our own output
            raise
        except (ValueError, OSError) as error:  # the other pairs are still worth seeing
            damaged = True
            found.append({"prefix": prefix, "error": str(error)})
            print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
    if a.json:
        write_bytes(a.json, orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    return 2 if damaged else int(any(f["faults"] for f in found))


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # documents have characters that a terminal may not have
    return run_tool(p.prog, lambda: inspect_all(a, p.prog))


if __name__ == "__main__":
    sys.exit(main())
