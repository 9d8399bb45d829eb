"""Trains a tokenizer, byte-level BPE or SentencePiece, on documents; the same input gives the same file."""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.data.ingest.records import Chunk, ParsedChunk

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST = {
    "bpe": 257,
    "sentencepiece": 260,
}  # bytes and special tokens; the symbol for a blank
SENTENCE = 1024
"""characters of a sentence at most: SentencePiece drops one of more than so many bytes as it is told, here 4 of each"""
THREADS = 16
"""of SentencePiece, whatever the machine: sums of floating-point numbers, and so the model, depend on it"""
BLANK = "\u2581"
ESCAPES = {BLANK: "\ue000\ue001", "\ue000": "\ue000\ue002"}
"""SentencePiece writes a blank as U+2581, and would read that character back as a blank; so it is written otherwise"""
RESERVED = "\u2585"
"""SentencePiece's own mark of an unknown character: it drops a sentence that contains it"""

EPILOG = """Inputs are JSON lines (.jsonl, .json, or any other name), the same compressed (.gz, .zst), and Parquet
(.parquet): files, quoted globs, folders, - for standard input (JSON lines), hf:NAME for a Hugging Face dataset. A
record without a string under each key stops the program with its file and line; --on-error skip leaves it out.

--kind bpe: text is split as GPT-2 splits it. The end-of-document token <|endoftext|> has id 0, the bytes follow. Use
the result with --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json.
--kind sentencepiece: <unk>, <s>, </s> and the bytes come first; </s> ends a document. Every text survives encoding and
decoding unchanged. The training text is held in memory, several times: set --max-bytes when there is much. Use the
result with --tokenizer-type SentencePieceTokenizer (or Llama2Tokenizer) --tokenizer-model tokenizer.model.

--max-bytes trains on a random sample of the documents, drawn from the whole input.

Examples:
  python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output tokenizer.json
  python tools/train_tokenizer.py --input 'shards/*.jsonl.zst' --kind sentencepiece --vocab-size 32000
    --max-bytes 1000000000 --output tokenizer.model"""


@dataclass
class Corpus:
    """The documents of the inputs, in order: for each the strings of all keys. Iterating reads them.

    Raises:
        FileNotFoundError, OSError: as `open_sources` and `Source.chunks`.
        ValueError: the same, or a record cannot be used (and is not to be skipped), or there are no documents.
    """

    inputs: list[str]
    keys: list[str]
    skip_errors: bool = False
    documents: int = 0
    skipped: int = 0

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        from tqdm import tqdm

        from megatron.data.ingest.records import no_documents_error
        from megatron.data.ingest.sources import open_sources

        sources = open_sources(self.inputs)
        with tqdm(
            total=sum(source.size for source in sources) or None,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            for source in sources:
                lines = 0
                for chunk in source.chunks(self.keys):
                    parsed = chunk.parse(self.keys)
                    self._reject(chunk, parsed, lines)
                    for document in zip(*parsed.texts.values()):
                        self.documents += 1
                        yield document
                    lines += parsed.lines
                    bar.update(chunk.disk_bytes)
        if not self.documents:
            raise no_documents_error(self.inputs, self.skipped)

    def _reject(self, chunk: Chunk, parsed: ParsedChunk, lines: int) -> None:
        for rejected in parsed.rejected:
            if not self.skip_errors:
                raise chunk.rejection_error(rejected, lines + rejected.line)
            self.skipped += 1


def sample(
    documents: Iterable[tuple[str, ...]], max_bytes: int, seed: int
) -> list[tuple[str, ...]]:
    """A random sample of `max_bytes` of UTF-8 (or everything), in the order of the input.

    Every document gets a random priority; those with the smallest are taken, and the one that exceeds the budget is
    cut. Only the sample is held in memory, and that document.
    """
    kept: list[
        tuple[int, int, list[bytes]]
    ] = []  # a heap, so negative: the largest priority comes first
    total, dropped = 0, (-1 << 64, 0)
    for number, document in enumerate(documents):
        rank = (-priority(seed, number), -number)
        if rank < dropped:
            continue
        texts = [text.encode() for text in document]
        heapq.heappush(kept, (*rank, texts))
        total += sum(map(len, texts))
        while total - (last := sum(map(len, kept[0][2]))) >= max_bytes:
            dropped = heapq.heappop(kept)[:2]
            total -= last
    excess = max(0, total - max_bytes)
    for i, text in reversed([*enumerate(kept[0][2])] if kept else []):
        kept[0][2][i] = text[: max(0, len(text) - excess)]
        excess -= len(text) - len(kept[0][2][i])
    return [
        tuple(
            text.decode(errors="ignore") for text in texts
        )  # a cut may go through a character
        for _, _, texts in sorted(kept, key=lambda entry: -entry[1])
    ]


def priority(seed: int, number: int) -> int:
    """64 random bits of a document, which depend on nothing else."""
    return int.from_bytes(
        hashlib.blake2b(b"%d %d" % (seed, number), digest_size=8).digest(), "big"
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> tuple[bytes, int]:
    """(content of tokenizer.json, vocabulary size reached). Raises what `texts` raises."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    return tokenizer.to_str(pretty=True).encode(), tokenizer.get_vocab_size()


def interruptible(work: Callable[[], object]) -> None:
    """Do work that is long outside Python, where Ctrl-C is not heard, in another thread, and hear it in this one."""
    errors = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below, in the thread that waits
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: str
) -> tuple[bytes, int]:
    """(content of the .model, vocabulary size reached).

    Args:
        model_type: unigram or bpe.
    Raises:
        ValueError: the vocabulary is too small for the characters of the text, or the text is empty.
    """
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    texts = list(texts)  # an error in an iterator would come out of the library as another one
    output = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape, unescape = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape.write_text("".join(f"{codes(a)}\t{codes(b)}\n" for a, b in ESCAPES.items()))
        unescape.write_text("".join(f"{codes(b)}\t{codes(a)}\n" for a, b in ESCAPES.items()))
        try:
            SentencePieceTrainer.train(
                sentence_iterator=sentences(texts),
                model_writer=output,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                required_chars=BLANK,  # as bytes a blank stays U+2581
                normalization_rule_name="",
                normalization_rule_tsv=str(escape),
                denormalization_rule_tsv=str(unescape),
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * SENTENCE,
                num_threads=THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(why_not_trained(str(error), vocab_size)) from None
    model = ModelProto.FromString(output.getvalue())
    model.normalizer_spec.ClearField("normalization_rule_tsv")  # a path of this moment
    model.denormalizer_spec.ClearField("normalization_rule_tsv")
    return model.SerializeToString(deterministic=True), len(model.pieces)


def codes(text: str) -> str:
    """The code points in hexadecimal, as SentencePiece's rules have them."""
    return " ".join(f"{ord(c):X}" for c in text)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Parts of lines that SentencePiece does not drop. Line feeds are left to the byte tokens."""
    for text in texts:
        for line in re.split(f"[\n{RESERVED}]", text):
            for start in range(0, len(line), SENTENCE):
                yield line[start : start + SENTENCE]


def why_not_trained(message: str, vocab_size: int) -> str:
    """Our words for an error of SentencePiece, such as `INTERNAL: file.cc(1) [(condition)] Words. 260 vs 332.`"""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size is {vocab_size}; allowed: {needed[1]} or more for this text (its characters, the bytes "
            f"and the special tokens)"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "--input has documents, but no text in them to train on"
    return f"SentencePiece cannot train on this text ({' '.join(message.split())})"


def check(a: argparse.Namespace) -> None:
    """Raise ValueError for what would otherwise fail after the training only."""
    from megatron.config.schema import require

    require(
        a.vocab_size >= SMALLEST[a.kind],
        "--vocab-size",
        a.vocab_size,
        f"{SMALLEST[a.kind]} or more with --kind {a.kind}",
    )
    require(a.max_bytes >= 0, "--max-bytes", a.max_bytes, "0 (all) or more")
    require(
        not a.model_type or a.kind == "sentencepiece",
        "--model-type",
        a.model_type,
        "only --kind sentencepiece",
    )
    require(
        os.path.basename(a.output) and not os.path.isdir(a.output),
        "--output",
        a.output,
        "a file; this is a folder" if a.output else "a file",
    )
    folder = next(parent for parent in Path(a.output).absolute().parents if parent.exists())
    require(
        folder.is_dir() and os.access(folder, os.W_OK),
        "--output",
        a.output,
        f"a place that can be written to; {folder} cannot",
    )


def parser() -> argparse.ArgumentParser:
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
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="tokens, those for bytes and the special ones included; fewer if the text has fewer",
    )
    p.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="tokenizer.json or tokenizer.model to write",
    )
    p.add_argument(
        "--kind",
        choices=tuple(SMALLEST),
        default="bpe",
        help="byte-level BPE for HuggingFaceTokenizer, or SentencePiece (default: bpe)",
    )
    p.add_argument(
        "--model-type", choices=("unigram", "bpe"), help="of SentencePiece (default: unigram)"
    )
    p.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys (columns) of the texts (default: text)",
    )
    p.add_argument(
        "--max-bytes",
        type=int,
        default=0,
        metavar="N",
        help="train on a sample of this many bytes (default: all)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="of the sample; of no effect without --max-bytes (default: 1234)",
    )
    p.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what a record that cannot be used does (default: stop)",
    )
    return p


def train(a: argparse.Namespace) -> None:
    from megatron.io.atomic_write import write_bytes

    start = time.monotonic()
    check(a)
    corpus = Corpus(a.input, list(dict.fromkeys(a.json_keys)), a.on_error == "skip")
    documents = sample(corpus, a.max_bytes, a.seed) if a.max_bytes else corpus
    texts = chain.from_iterable(documents)
    content, size = (
        train_bpe(texts, a.vocab_size)
        if a.kind == "bpe"
        else train_sentencepiece(texts, a.vocab_size, a.model_type or "unigram")
    )
    Path(a.output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(a.output, content)
    used = len(documents) if a.max_bytes else corpus.documents
    print(
        f"{a.output}: {size} tokens, trained on {used} of {corpus.documents} documents, {corpus.skipped} skipped, "
        f"{time.monotonic() - start:.1f} s"
    )


def main() -> int:
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    code = run_tool(p.prog, lambda: train(a))
    if (
        code == 130
    ):  # a thread of `interruptible` may still run, and would abort an orderly end of Python
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
