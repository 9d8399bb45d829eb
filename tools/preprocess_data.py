"""Tokenizes text into the token shards that training reads (Megatron's .bin/.idx)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """Inputs are JSON lines (.jsonl, .json, or any other name), the same
compressed (.gz, .bz2, .xz, .zst), and Parquet (.parquet): files, quoted globs, folders, - for
standard input (JSON lines), hf:NAME for a Hugging Face dataset. They are read in the given
order, the files of a folder or glob by name.

Writes PREFIX_KEY_document.bin, .idx and .json (a record of the tokenizer) for each key; give
PREFIX_KEY_document to training as --data-path. With --split-sentences the names end in
_sentence. A record without a string under each key stops the program with its file and line;
with --on-error skip it goes to PREFIX.rejected.jsonl instead. Blank lines are ignored. A text
that encodes to no tokens stays a document, without tokens. The literal of a special token
inside a text is ordinary text.

The work is done in PREFIX.partial/ and renamed at the end: a pair whose .idx exists is
complete. After an interruption, the same command continues; the result is the same, also with
another number of workers. A worker takes about 200 MB of memory.

Examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod
    --tokenizer-type GPT2BPETokenizer --vocab-file dataset/gpt2-vocab.json
    --merge-file dataset/gpt2-merges.txt
  zcat more/*.gz | python tools/preprocess_data.py --input - --output-prefix data/more --append-eod
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json --on-error skip"""


def parser() -> argparse.ArgumentParser:
    from megatron.config.flag_parser import add_section_flags
    from megatron.config.schema import TokenizerConfig

    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, quoted globs, folders, - or hf:NAME",
    )
    p.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="path and first part of the names of the outputs; folders are created",
    )
    p.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (columns) of the texts; each becomes its own dataset (default: text)",
    )
    p.add_argument(
        "--append-eod",
        action="store_true",
        help="end each document with the end-of-document token, which training needs",
    )
    p.add_argument(
        "--split-sentences",
        action="store_true",
        help="sentences become the sequences of a document (needs the package nltk)",
    )
    p.add_argument("--lang", help="language of --split-sentences (default: english)")
    _add_run_flags(p)
    add_section_flags(p, TokenizerConfig)
    return p


def _add_run_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of what the program does with records and processes."""
    p.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a record that cannot be used (default: stop)",
    )
    p.add_argument(
        "--max-documents",
        type=int,
        default=0,
        metavar="N",
        help="take only the first N (default: all)",
    )
    p.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that encode (default: as many as cores may be used)",
    )


def run(a: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megatron.config.fields import require
    from megatron.config.flag_parser import section_from_args
    from megatron.config.schema import TokenizerConfig
    from megatron.data.ingest.encode import EncodeConfig
    from megatron.data.ingest.encoder_pool import usable_cores
    from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun

    start = time.monotonic()
    require(
        a.lang is None or a.split_sentences, "--lang", a.lang, "only with --split-sentences"
    )
    tokenizer = section_from_args(a, TokenizerConfig)
    recipe = EncodeConfig(
        tokenizer,
        tuple(dict.fromkeys(a.json_keys)),
        a.append_eod,
        (a.lang or "english") if a.split_sentences else "",
    )
    job = PreprocessConfig(
        a.input,
        a.output_prefix,
        recipe,
        a.on_error == "skip",
        a.max_documents,
        a.workers or usable_cores(),
    )
    with (
        PreprocessRun(job) as work,
        tqdm(
            total=work.total_bytes or None,
            initial=work.bytes_read,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        for encoded in work:
            bar.update(encoded.chunk.disk_bytes)
        totals = work.finish()
    seconds = time.monotonic() - start
    for t in totals:
        print(
            f"{t.prefix}: {t.documents} documents, {t.tokens} tokens, {t.bytes} bytes, "
            f"{t.tokens / max(1, t.bytes):.4f} tokens/byte, {work.skipped} skipped, {seconds:.1f} s"
        )


def main() -> int:
    from megatron import log

    log.setup()
    p = parser()
    a = p.parse_args()
    return log.run_tool(p.prog, lambda: run(a))


if __name__ == "__main__":
    sys.exit(main())
