"""Tokenizers by Megatron's names, behind one interface: text -> ids, many texts -> one flat array and lengths.

Text is untrusted: the literal string of a special token (`<|endoftext|>`, `</s>`) in a document encodes as the ordinary
text it is and never becomes the special id; ids of special tokens are added by the caller. Two limits that come with
the file and not from here: a HuggingFace tokenizer without merges (WordLevel) whose vocabulary holds the literal as a
word, and user-defined symbols of a SentencePiece model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron.config.schema import TokenizerConfig

if TYPE_CHECKING:
    import gigatoken
    import tokenizers

LOGGER = logging.getLogger("megatron")

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>", "<EOD>", "<|im_end|>", "<|eot_id|>",
                   "[EOS]", "<EOS>")
"""literals that mark the end of a document, in the order they are looked for when the files do not say"""

LARGEST_NULL = 2**31 - 2
"""vocabulary size of a NullTokenizer: the id after it, the end of documents, is an int32"""
COMPARED_DOCUMENTS, COMPARED_CHARACTERS = 16, 1 << 12
"""documents, and characters of each, on which the fast encoder must agree with the reference one"""


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        name: the `--tokenizer-type`.
        vocab_size: largest id + 1, special tokens included, padding not.
        eod: id that ends a document.
        bos: id put before every text by `encode`, or None.
        fingerprint: sha256 hex of the vocabulary and merges: equal fingerprints give ids the same meaning.
        difference: how the fast encoder, where there is one, once differed from the reference; else empty.
    """

    name: str
    vocab_size: int
    eod: int
    fingerprint: str
    bos: int | None = None
    difference: str = ""

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids of one text, without an end-of-document id."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 ids of all texts one after the other, int64 length of each)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids beyond the vocabulary (its padding) have none. BPE kinds spell special tokens out."""
        return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def compare(self, documents: int) -> None:  # noqa: B027 - most have no fast encoder
        """Compare the fast encoder on that many documents from the next batch on; 0: trust it."""

    def use_reference(self) -> None:  # noqa: B027
        """Use the reference implementation from now on."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


CACHE_BYTES = 192 << 20
"""by which the process may grow before the fast encoder is loaded anew: several times what most text makes of it"""

LOOKED_AT = 1 << 18  # characters, which take 4 bytes each meanwhile
NEW_FROM = 0x378  # the first code point that is not assigned
ALL_NEW_FROM = 0x40000  # nothing is assigned here but tags and private use


@lru_cache(maxsize=1)
def new_characters() -> np.ndarray:
    """bool [ALL_NEW_FROM]: code points that this Python's Unicode does not know.

    Two libraries split text alike only where their Unicode tables agree. gigatoken knows version 17, `tokenizers` and
    tiktoken know 16: they differ in 4,657 characters (found by trying all), none of which is in Python's tables before
    3.15. What an older table knows, all know alike.
    """
    return np.fromiter((unicodedata.category(chr(c)) == "Cn" for c in range(ALL_NEW_FROM)), bool, ALL_NEW_FROM)


def texts_with_new_characters(texts: list[str]) -> set[int]:
    """Numbers of the texts on which the fast encoder is not to be trusted."""
    found: set[int] = set()
    group, characters = [], 0  # looked at together: texts can be short, and each look costs some microseconds
    for i, text in enumerate(texts):
        if not text.isascii():
            group.append(i)
            characters += len(text)
        if characters >= LOOKED_AT or (group and i == len(texts) - 1):
            if _has_new("".join([texts[k] for k in group])):
                found.update(k for k in group if _has_new(texts[k]))
            group, characters = [], 0
    return found


def _has_new(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = codes[codes >= NEW_FROM]
    return bool(len(codes)) and bool((codes >= ALL_NEW_FROM).any() or new_characters()[codes].any())


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class FastBPE(Tokenizer):
    """A tokenizer with a reference implementation and, where it can load the vocabulary, gigatoken in front of it.

    The first documents of each instance are encoded by both. On a difference this instance says so and uses only the
    reference from then on: it is slower by one to two orders of magnitude, but right. Texts with characters that are
    new in Unicode always go to the reference.
    """

    _fast: gigatoken.Tokenizer | None = None
    _load: Callable[[], gigatoken.Tokenizer]
    _resident = 0
    """bytes of memory of the process when `_fast` was loaded"""
    _to_compare = COMPARED_DOCUMENTS

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        doubtful = texts_with_new_characters(texts) if self._fast is not None else set()
        if self._fast is not None and texts and self._to_compare:
            self._compare([text for i, text in enumerate(texts) if i not in doubtful] if doubtful else texts)
        if self._fast is None or not texts:
            return flatten(self._reference(texts))
        self._bound_memory()
        if not doubtful:
            return self._encode_fast(texts)
        ids, lengths = self._encode_fast([text for i, text in enumerate(texts) if i not in doubtful])
        rows, fast = [], iter(np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else ())
        right = iter(self._reference([texts[i] for i in sorted(doubtful)]))
        for i in range(len(texts)):
            rows.append(np.array(next(right), np.uint32) if i in doubtful else next(fast))
        return np.concatenate(rows), np.array([*map(len, rows)], np.int64)

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._fast.encode_batch(texts).layout  # an awkward ListOffsetArray: flat content and offsets
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0]:offsets[-1]], np.diff(offsets)

    def _bound_memory(self) -> None:
        """gigatoken remembers every word that it has seen; load it anew when that has become too much."""
        resident = resident_bytes()
        self._resident = self._resident or resident
        if resident - self._resident > CACHE_BYTES:
            self._fast = None  # frees the old one before there is a new one
            self._fast = self._load()
            self._resident = resident_bytes()

    def compare(self, documents: int) -> None:
        self._to_compare = documents

    def use_reference(self) -> None:
        self._fast = None

    def _compare(self, texts: list[str]) -> None:
        sample = [t[:COMPARED_CHARACTERS] for t in texts[:self._to_compare]]
        for text, right, fast in zip(sample, self._reference(sample), self._fast.encode_batch_list(sample)):
            if list(right) != list(fast):
                self.difference = (
                    f"gigatoken encodes a document differently from the reference implementation of {self.name} (it "
                    f"starts with {text[:40]!r}): using the reference, which is much slower")
                LOGGER.warning("%s", self.difference)
                self.use_reference()
                return
        self._to_compare -= len(sample)

    def _load_fast(self, load: Callable[[], gigatoken.Tokenizer]) -> gigatoken.Tokenizer | None:
        """Call `load`; a vocabulary that gigatoken does not support leaves the reference alone, with a warning."""
        self._load = load
        try:
            return load()
        except Exception as error:  # gigatoken raises plain RuntimeError, ValueError or OSError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            LOGGER.warning("gigatoken cannot load this %s (%s): using the reference implementation, which is much "
                           "slower", self.name, reason)
            return None

    @abstractmethod
    def _reference(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Ids of each text by the reference implementation."""


class HuggingFaceTokenizer(FastBPE):
    """A `tokenizers.Tokenizer`; its own truncation, padding and special-token template are switched off.

    Args:
        name: the `--tokenizer-type`.
        tokenizer: changed in place.
        source: what the vocabulary came from, for messages.
        eod_token: literal of the end-of-document token when the files name it.
    """

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, source: str, eod_token: str | None = None):
        import gigatoken

        self.name = name
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # literals of special tokens are text
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = digest(sorted((i, token) for token, i in vocabulary.items()), spec["model"].get("merges"))
        self.eod = find_eod(vocabulary.get, source, eod_token)
        # gigatoken has no switch for it, but knows only the special tokens it is given
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
        self._fast = self._load_fast(lambda: gigatoken.Tokenizer.from_json(json.dumps(spec)))

    def _reference(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; with `bos`, every text starts with the begin-of-sequence id (Llama 2).

    Raises:
        ValueError: the file is no model, or lacks the special tokens.
    """

    def __init__(self, name: str, path: str, threads: int, bos: bool):
        import sentencepiece

        self.name, self._threads = name, threads
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer-model {path} is not a SentencePiece model ({one_line(error)})") from None
        self.vocab_size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self.fingerprint = digest([(i, p, model.get_score(i)) for i, p in enumerate(pieces)])
        eod = pieces[model.eos_id()] if model.eos_id() >= 0 else None
        self.eod = find_eod({p: i for i, p in enumerate(pieces)}.get, path, eod)
        if bos and model.bos_id() < 0:
            raise ValueError(f"--tokenizer-model {path} has no begin-of-sequence token, which Llama2Tokenizer puts "
                             f"before every document. Use SentencePieceTokenizer")
        self.bos = model.bos_id() if bos else None

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(self._model.encode(texts, add_bos=self.bos is not None, num_threads=self._threads))

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTION + "?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTION + "?")
TIKTOKEN = {  # a .tiktoken file has ranks only: file name -> (split regex, its name in gigatoken, special tokens)
    "r50k_base": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt2",
                  {"<|endoftext|>": 50256}),
    "cl100k_base": (CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+", "cl100k",
                    {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                     "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k_base": (CASED_WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", "o200k",
                   {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


class TiktokenTokenizer(FastBPE):
    """One of OpenAI's encodings from its `.tiktoken` file of ranks, recognised by the file's name.

    Raises:
        ValueError: tiktoken is not installed, the encoding is unknown, or the file is malformed.
    """

    name = "TiktokenTokenizer"

    def __init__(self, path: str):
        try:
            import tiktoken
        except ImportError:
            raise ValueError(f"--tokenizer-type {self.name} needs the package tiktoken, which is not installed. "
                             f"Install it: pip install tiktoken") from None
        import gigatoken

        stem = Path(path).stem
        if stem not in TIKTOKEN:
            raise ValueError(f"--tokenizer-model {path} has no known encoding in its name; allowed: "
                             f"{', '.join(f'{n}.tiktoken' for n in TIKTOKEN)}. Rename the file to its encoding")
        pattern, scheme, specials = TIKTOKEN[stem]
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank)
                     for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"--tokenizer-model {path} is not a .tiktoken file ({one_line(error)})") from None
        self._encoding = tiktoken.Encoding(stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size = self._encoding.n_vocab
        self.eod = specials["<|endoftext|>"]
        named = [(rank, token.hex()) for token, rank in ranks.items()] + [(i, token) for token, i in specials.items()]
        self.fingerprint = digest(sorted(named))
        self._fast = self._load_fast(lambda: gigatoken.Tokenizer.from_tiktoken(path, scheme, {}))

    def _reference(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


class NullTokenizer(Tokenizer):
    """Text is ids already, written in decimal and separated by blanks; the end-of-document id follows the vocabulary.

    Args:
        size: number of ordinary ids; `vocab_size` is one more, as in Megatron.
    """

    name = "NullTokenizer"

    def __init__(self, size: int):
        self.eod, self.vocab_size = size, size + 1
        self.fingerprint = digest([self.name, size])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As in the base class. Raises ValueError for a word that is no id below the vocabulary size."""
        words = [text.split() for text in texts]
        for word in chain.from_iterable(words):
            if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size):
                raise ValueError(f"{word[:40]!r} is no token id for {self.name}; allowed: 0 to {self.eod}, written in "
                                 f"decimal and separated by blanks")
        return flatten([[int(word) for word in row] for row in words])

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; the end-of-document id is 256 and decodes to nothing."""

    name = "ByteTokenizer"
    vocab_size, eod = 257, 256

    def __init__(self):
        self.fingerprint = digest([self.name])

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(data), np.uint8).astype(np.uint32)
        return ids, np.array([len(d) for d in data], np.int64)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def build_tokenizer(config: TokenizerConfig, threads: int = 0) -> Tokenizer:
    """The tokenizer that the flags name.

    Args:
        threads: threads of the encoding library; 0: all cores. Takes effect before the first text of the process.
    Raises:
        FileNotFoundError: a file it needs is not given or not there.
        ValueError: a file is malformed, or names no end-of-document token.
    """
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by gigatoken and tokenizers
    kind, model = config.tokenizer_type, config.tokenizer_model
    if kind == "GPT2BPETokenizer":
        return _gpt2(config)
    if kind == "HuggingFaceTokenizer":
        return _huggingface(model)
    if kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        path = _file(model, "--tokenizer-model", kind, "the .model file")
        return SentencePieceTokenizer(kind, path, threads or -1, bos=kind == "Llama2Tokenizer")
    if kind == "TiktokenTokenizer":
        return TiktokenTokenizer(_file(model, "--tokenizer-model", kind, "the .tiktoken file"))
    if kind == "NullTokenizer":
        if not (model.isascii() and model.isdecimal() and len(model) < 20 and 0 < int(model) <= LARGEST_NULL):
            raise ValueError(f"--tokenizer-model is {model!r}; allowed for NullTokenizer: the vocabulary size, 1 to "
                             f"{LARGEST_NULL} (ids are stored as int32)")
        return NullTokenizer(int(model))
    return ByteTokenizer()


def _gpt2(config: TokenizerConfig) -> Tokenizer:
    """GPT-2's byte-level BPE from its two files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    advice = "GPT-2's: bash dataset/download_vocab.sh"
    vocab = _file(config.vocab_file, "--vocab-file", config.tokenizer_type, f"vocab.json ({advice})")
    merges = _file(config.merge_file, "--merge-file", config.tokenizer_type, f"merges.txt ({advice})")
    try:
        backend = Backend(models.BPE.from_file(vocab, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"--vocab-file {vocab} and --merge-file {merges} are not the two files of a byte-level BPE "
                         f"({one_line(error)})") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's regex
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(config.tokenizer_type, backend, vocab)


def _huggingface(model: str) -> Tokenizer:
    """A tokenizer.json, or the folder it is in, whose tokenizer_config.json may name the end-of-document token."""
    from tokenizers import Tokenizer as Backend

    path = Path(model) / "tokenizer.json" if model and Path(model).is_dir() else Path(model)
    file = _file(model and str(path), "--tokenizer-model", "HuggingFaceTokenizer", "tokenizer.json or its folder")
    settings = path.parent / "tokenizer_config.json"
    eod_token = None
    try:
        if path.name == "tokenizer.json" and settings.is_file():
            eod_token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        backend = Backend.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"--tokenizer-model {model} is not a HuggingFace tokenizer ({one_line(error)})") from None
    if isinstance(eod_token, dict):  # an AddedToken spelt out
        eod_token = eod_token.get("content")
    return HuggingFaceTokenizer("HuggingFaceTokenizer", backend, file, eod_token)


def _file(path: str, flag: str, kind: str, what: str) -> str:
    """`path`, which must be an existing file."""
    if not path:
        raise FileNotFoundError(f"{flag} is not set; {kind} needs {what}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path} does not exist; {kind} needs {what}")
    return path


def find_eod(id_of: Callable[[str], int | None], source: str, named: str | None = None) -> int:
    """Id of the end-of-document token: the one the files name, else the first known literal.

    Args:
        id_of: literal -> id or None.
    Raises:
        ValueError: none is in the vocabulary.
    """
    tried = [*([named] if named else []), *END_OF_DOCUMENT]
    for literal in tried:
        if (found := id_of(literal)) is not None:
            return found
    raise ValueError(f"{source} has no end-of-document token; tried {' '.join(tried)}. Add one to the vocabulary")


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 ids one row after the other, int64 length of each row)."""
    lengths = np.fromiter(map(len, rows), np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), np.uint32, count=int(lengths.sum())), lengths


def digest(*content: object) -> str:
    """sha256 hex of plain content."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
