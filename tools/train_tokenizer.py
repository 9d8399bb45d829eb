"""Trains a tokenizer, byte-level BPE or SentencePiece, on documents. The result is reproducible."""

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
# Smallest vocabulary by kind: bytes and special tokens, for SentencePiece also the symbol for a
# space.
SMALLEST_VOCABULARY = {"bpe": 257, "sentencepiece": 260}
# Maximum characters of a sentence. SentencePiece drops sentences longer than a limit in bytes,
# which is set to 4 per character.
MAX_SENTENCE = 1024
# Threads of SentencePiece, the same on every machine: floating-point sums, and therefore the
# model, depend on their number.
THREADS = 16
SPACE_SYMBOL = "\u2581"
# SentencePiece writes a space as U+2581 and would decode that character in a text as a space,
# so the character itself is written differently.
ESCAPES = {SPACE_SYMBOL: "\ue000\ue001", "\ue000": "\ue000\ue002"}
# SentencePiece's own symbol of an unknown character: it drops sentences that contain it.
RESERVED = "\u2585"

EPILOG = """Inputs are JSON lines (.jsonl, .json, or any other name), the same compressed (.gz,
.bz2, .xz, .zst), and Parquet (.parquet): files, quoted globs, directories, - for standard input
(JSON lines), hf:NAME for a Hugging Face dataset. A record without a string under each key stops the
program with its file and line; --on-error skip leaves it out.

--kind bpe: text is split as GPT-2 splits it. The end-of-document token <|endoftext|> has id 0,
the bytes follow. Use the result with --tokenizer-type HuggingFaceTokenizer
--tokenizer-model tokenizer.json.
--kind sentencepiece: <unk>, <s>, </s> and the bytes come first; </s> ends a document. Every
text survives encoding and decoding unchanged. The training text is held in memory several
times: set --max-bytes for large inputs. Use the result with --tokenizer-type
SentencePieceTokenizer (or Llama2Tokenizer) --tokenizer-model tokenizer.model.

--max-bytes trains on a random sample of the documents, drawn from the complete input.

Examples:
  python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output tokenizer.json
  python tools/train_tokenizer.py --input 'shards/*.jsonl.zst' --kind sentencepiece
    --vocab-size 32000 --max-bytes 1000000000 --output tokenizer.model"""


@dataclass
class Corpus:
    """The documents of the inputs, in order. Iterating reads them: a tuple of the strings of
    all keys per document.

    Raises:
        OSError: an input cannot be read; see `open_sources` and `DocumentSource.chunks`.
        ValueError: an input is malformed, a record cannot be used (unless such records are
            skipped), or there are no documents.
    """

    inputs: list[str]
    keys: list[str]
    skip_errors: bool = False
    documents: int = 0
    """Number of documents read so far"""
    skipped: int = 0
    """Number of records skipped so far"""

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
                    for document in zip(*parsed.texts.values(), strict=True):
                        self.documents += 1
                        yield document
                    lines += parsed.lines
                    bar.update(chunk.disk_bytes)
        if not self.documents:
            raise no_documents_error(self.inputs, self.skipped)

    def _reject(self, chunk: Chunk, parsed: ParsedChunk, lines: int) -> None:
        """Count the rejected records of a chunk, or raise for the first one.

        Args:
            lines: lines of the source before the chunk.
        """
        for rejected in parsed.rejected:
            if not self.skip_errors:
                raise chunk.rejection_error(rejected, lines + rejected.line)
            self.skipped += 1


@dataclass(frozen=True)
class _Candidate:
    """A document that may become part of a sample."""

    rank: tuple[int, int]
    """Negative priority and number of the document, so that the first element of a heap has
    the largest priority"""
    texts: list[bytes]

    def __lt__(self, other: _Candidate) -> bool:
        return self.rank < other.rank

    @property
    def size(self) -> int:
        """Size of the texts in bytes."""
        return sum(map(len, self.texts))

    def decoded(self) -> tuple[str, ...]:
        """Return the texts; a character that the sample's end cut in two is dropped."""
        return tuple(text.decode(errors="ignore") for text in self.texts)

    def cut(self, excess: int) -> None:
        """Remove `excess` bytes from the end of the document."""
        for i in reversed(range(len(self.texts))):
            text = self.texts[i]
            self.texts[i] = text[: max(0, len(text) - excess)]
            excess -= len(text) - len(self.texts[i])


def sample(
    documents: Iterable[tuple[str, ...]], max_bytes: int, seed: int
) -> list[tuple[str, ...]]:
    """Return a random sample of `max_bytes` of UTF-8, or all documents, in the input's order.

    Every document gets a random priority. Those with the smallest priorities are taken, and
    the document that exceeds the budget is cut. Only the sample and that document are held in
    memory.
    """
    heap: list[_Candidate] = []
    total = 0
    largest_dropped = (-1 << 64, 0)
    for number, document in enumerate(documents):
        rank = (-priority(seed, number), -number)
        if rank < largest_dropped:
            continue
        candidate = _Candidate(rank, [text.encode() for text in document])
        heapq.heappush(heap, candidate)
        total += candidate.size
        while total - heap[0].size >= max_bytes:
            dropped = heapq.heappop(heap)
            largest_dropped = dropped.rank
            total -= dropped.size
    if heap:
        heap[0].cut(max(0, total - max_bytes))
    heap.sort(key=lambda candidate: -candidate.rank[1])
    return [candidate.decoded() for candidate in heap]


def priority(seed: int, number: int) -> int:
    """Return 64 random bits that depend on the seed and the document's number only."""
    digest = hashlib.blake2b(b"%d %d" % (seed, number), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def train_bpe(texts: Iterable[str], vocab_size: int) -> tuple[bytes, int]:
    """Train byte-level BPE. Raises what `texts` raises.

    Returns:
        The content of tokenizer.json, and the vocabulary size that was reached.
    """
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
    run_interruptibly(lambda: tokenizer.train_from_iterator(texts, trainer))
    return tokenizer.to_str(pretty=True).encode(), tokenizer.get_vocab_size()


def run_interruptibly(work: Callable[[], object]) -> None:
    """Run `work` in another thread, so that Ctrl-C interrupts this one.

    For long calls outside Python, during which signals are not handled.
    """
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
    """Train a SentencePiece model.

    Args:
        model_type: "unigram" or "bpe".
    Returns:
        The content of the .model file, and the vocabulary size that was reached.
    Raises:
        ValueError: the vocabulary is too small for the characters of the text, or the text is
            empty.
    """
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    texts = list(texts)  # the library would hide an error that an iterator raises
    output = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape = Path(folder, "escape.tsv")
        unescape = Path(folder, "unescape.tsv")
        write_rules(escape, ESCAPES)
        write_rules(unescape, {escaped: text for text, escaped in ESCAPES.items()})
        try:
            SentencePieceTrainer.train(
                sentence_iterator=sentences(texts),
                model_writer=output,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                required_chars=SPACE_SYMBOL,  # otherwise a space could become three bytes
                normalization_rule_name="",
                normalization_rule_tsv=str(escape),
                denormalization_rule_tsv=str(unescape),
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * MAX_SENTENCE,
                num_threads=THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(explain_failure(str(error), vocab_size)) from None
    model = ModelProto.FromString(output.getvalue())
    # Paths of temporary files, which would differ from run to run.
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    model.denormalizer_spec.ClearField("normalization_rule_tsv")
    return model.SerializeToString(deterministic=True), len(model.pieces)


def write_rules(path: Path, replacements: dict[str, str]) -> None:
    """Write replacements as a SentencePiece rule file: code points in hexadecimal."""
    lines = [
        f"{code_points(text)}\t{code_points(replacement)}\n"
        for text, replacement in replacements.items()
    ]
    path.write_text("".join(lines))


def code_points(text: str) -> str:
    """Return the code points of a text in hexadecimal, separated by spaces."""
    return " ".join(f"{ord(c):X}" for c in text)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield parts of lines that SentencePiece does not drop. Line feeds are left to byte tokens."""
    for text in texts:
        for line in re.split(f"[\n{RESERVED}]", text):
            for start in range(0, len(line), MAX_SENTENCE):
                yield line[start : start + MAX_SENTENCE]


def explain_failure(message: str, vocab_size: int) -> str:
    """Return an error message for one of SentencePiece.

    Args:
        message: such as `INTERNAL: file.cc(1) [(condition)] Words. 260 vs 332.`
    """
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if needed:
        return (
            f"--vocab-size is {vocab_size}; allowed: {needed[1]} or more for this text (its "
            "characters, the bytes and the special tokens)"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "--input has documents, but no text in them to train on"
    return f"SentencePiece cannot train on this text ({' '.join(message.split())})"


def check(a: argparse.Namespace) -> None:
    """Raise ValueError for mistakes that would otherwise show only after the training."""
    from megatron.config.fields import require
    from megatron.optional_packages import import_optional

    if a.kind == "sentencepiece":
        module = "sentencepiece.sentencepiece_model_pb2"  # needs protobuf, too
        import_optional(module, "sentencepiece", "--kind sentencepiece")
    smallest = SMALLEST_VOCABULARY[a.kind]
    require(
        a.vocab_size >= smallest,
        "--vocab-size",
        a.vocab_size,
        f"{smallest} or more with --kind {a.kind}",
    )
    require(a.max_bytes >= 0, "--max-bytes", a.max_bytes, "0 (all) or more")
    require(
        not a.model_type or a.kind == "sentencepiece",
        "--model-type",
        a.model_type,
        "only --kind sentencepiece",
    )
    require(bool(a.output), "--output", a.output, "a file")
    require(
        bool(os.path.basename(a.output)) and not os.path.isdir(a.output),
        "--output",
        a.output,
        "a file; this is a folder",
    )
    folder = next(parent for parent in Path(a.output).absolute().parents if parent.exists())
    require(
        folder.is_dir() and os.access(folder, os.W_OK),
        "--output",
        a.output,
        f"a place that can be written to; {folder} cannot",
    )


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="tokenizer.json or tokenizer.model to write",
    )
    add_tokenizer_flags(p)
    add_input_flags(p)
    return p


def add_tokenizer_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that describe the tokenizer."""
    p.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="tokens including bytes and special tokens; fewer if the text yields fewer",
    )
    p.add_argument(
        "--kind",
        choices=tuple(SMALLEST_VOCABULARY),
        default="bpe",
        help="byte-level BPE for HuggingFaceTokenizer, or SentencePiece (default: bpe)",
    )
    p.add_argument(
        "--model-type",
        choices=("unigram", "bpe"),
        help="type of the SentencePiece model (default: unigram)",
    )


def add_input_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that describe the text to train on."""
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, quoted globs, directories, - or hf:NAME",
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
        help="seed of the sample; no effect without --max-bytes (default: 1234)",
    )
    p.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="whether a record that cannot be used stops the program (default: stop)",
    )


def train(a: argparse.Namespace) -> None:
    """Train the tokenizer, write it and print a summary."""
    from megatron.io.atomic_write import write_bytes

    start = time.monotonic()
    check(a)
    corpus = Corpus(a.input, list(dict.fromkeys(a.json_keys)), a.on_error == "skip")
    documents = corpus
    if a.max_bytes:
        documents = sample(corpus, a.max_bytes, a.seed)
    texts = chain.from_iterable(documents)
    if a.kind == "bpe":
        content, size = train_bpe(texts, a.vocab_size)
    else:
        content, size = train_sentencepiece(texts, a.vocab_size, a.model_type or "unigram")
    Path(a.output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(a.output, content)
    used = len(documents) if a.max_bytes else corpus.documents
    print(
        f"{a.output}: {size} tokens, trained on {used} of {corpus.documents} documents, "
        f"{corpus.skipped} skipped, {time.monotonic() - start:.1f} s"
    )


def main() -> int:
    """Run the tool and return its exit code."""
    from megatron.log import run_tool

    p = parser()
    a = p.parse_args()
    code = run_tool(p.prog, lambda: train(a))
    if code == 130:
        # A thread of `run_interruptibly` may still run and would abort Python's shutdown.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
