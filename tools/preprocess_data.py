"""Turns JSON lines into the token shards that training reads (Megatron's .bin/.idx)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EPILOG = """Writes PREFIX_KEY_document.bin, .idx and .json (a record of the tokenizer) for each key; give
PREFIX_KEY_document to training as --data-path. A line that is not a JSON object with a string under each key stops the
program with the line's number and leaves no output; blank lines are passed over. A text that encodes to no tokens stays
a document, without tokens. The special token's literal inside a text is ordinary text. Example:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod
    --tokenizer-type GPT2BPETokenizer --vocab-file dataset/gpt2-vocab.json --merge-file dataset/gpt2-merges.txt"""


def parser() -> argparse.ArgumentParser:
    from megatron.config.schema import TOKENIZERS

    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON-lines files, taken in this order")
    p.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path and first part of the output's names")
    p.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY",
                   help="keys of the texts; each becomes a dataset of its own (default: text)")
    p.add_argument("--append-eod", action="store_true",
                   help="end each document with the end-of-document token; training wants it")
    p.add_argument("--workers", type=int, default=0, metavar="N",
                   help="threads of the tokenizer library (default: all cores)")
    p.add_argument("--tokenizer-type", default="GPT2BPETokenizer", choices=TOKENIZERS, help="kind of tokenizer")
    p.add_argument("--vocab-file", default="", metavar="FILE", help="vocab.json of GPT2BPETokenizer")
    p.add_argument("--merge-file", default="", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    p.add_argument("--tokenizer-model", default="", metavar="FILE",
                   help="tokenizer.json or its folder (HuggingFaceTokenizer), .model (SentencePiece, Llama2), "
                        ".tiktoken (Tiktoken), or the vocabulary size (NullTokenizer)")
    return p


def main() -> int:
    from tqdm import tqdm

    from megatron.config.schema import TokenizerConfig, require
    from megatron.data.preprocess import preprocess
    from megatron.data.tokenizer import build_tokenizer

    p = parser()
    a = p.parse_args()
    start = time.perf_counter()
    try:
        require(a.workers >= 0, "--workers", a.workers, "0 (all cores) or more")
        tokenizer = build_tokenizer(
            TokenizerConfig(a.tokenizer_type, a.vocab_file, a.merge_file, a.tokenizer_model), a.workers)
        size = sum(os.path.getsize(path) for path in a.input if os.path.isfile(path))
        with tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            totals = preprocess(a.input, a.output_prefix, a.json_keys, tokenizer, append_eod=a.append_eod,
                                progress=bar.update)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    seconds = time.perf_counter() - start
    for t in totals:
        print(f"{t.prefix}: {t.documents} documents, {t.tokens} tokens, {t.bytes} bytes, "
              f"{t.tokens / max(1, t.bytes):.4f} tokens/byte, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
