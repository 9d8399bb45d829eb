"""Trains a byte-level BPE tokenizer on JSON lines; the same input gives the same file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and the end-of-document token

EPILOG = """Text is split as GPT-2 splits it. The end-of-document token <|endoftext|> has id 0, the bytes follow. Use
the result with --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json. Example:
  python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output tokenizer.json"""


def texts(inputs: list[str], key: str, max_bytes: int) -> Iterator[list[str]]:
    """Batches of documents, in order, as long as they have at most `max_bytes` of UTF-8 together (0: all).

    Raises like `read_jsonl`, and ValueError when there is no document.
    """
    from megatron.data.preprocess import read_jsonl

    taken = documents = 0
    for path in inputs:
        for _, batch in read_jsonl(path, [key]):
            kept = []
            for text in batch[key]:
                taken += len(text.encode()) if max_bytes else 0
                if max_bytes and taken > max_bytes and documents:
                    yield kept
                    return
                kept.append(text)
                documents += 1
            yield kept
    if not documents:
        raise ValueError(f"--input {' '.join(inputs)} has no documents")


def train(batches: Iterator[list[str]], vocab_size: int, output: str) -> int:
    """Train, write the file under a temporary name and rename it. Returns the vocabulary size reached."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], show_progress=sys.stderr.isatty(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(batches, trainer)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save(str(temp))
        os.replace(temp, target)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temp)
    return tokenizer.get_vocab_size()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON-lines files")
    p.add_argument("--vocab-size", type=int, required=True, metavar="N",
                   help=f"tokens, the {SMALLEST} for bytes and end of document included; fewer if the text has fewer")
    p.add_argument("--output", required=True, metavar="FILE", help="tokenizer.json to write")
    p.add_argument("--json-key", default="text", metavar="KEY", help="key of the text (default: text)")
    p.add_argument("--max-bytes", type=int, default=0, metavar="N",
                   help="train on the first documents up to this many bytes; at least one (default: all)")
    a = p.parse_args()
    from megatron.config.schema import require

    start = time.perf_counter()
    try:
        require(a.vocab_size >= SMALLEST, "--vocab-size", a.vocab_size, f"{SMALLEST} or more")
        require(a.max_bytes >= 0, "--max-bytes", a.max_bytes, "0 (all) or more")
        size = train(texts(a.input, a.json_key, a.max_bytes), a.vocab_size, a.output)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(f"{a.output}: {size} tokens, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
