"""A small corpus for the tests of preprocessing, and the output expected from it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig

BYTE_TOKENIZER = TokenizerConfig(tokenizer_type="ByteTokenizer")
PAIR_SUFFIXES = (".bin", ".idx", ".json")
KEYS = ("text", "title")


def write_corpus(folder: Path, records: int = 400, bad: bool = False) -> list[str]:
    """Write two files of records with a text and a title, and return their paths.

    Args:
        bad: whether to insert records that cannot be used.
    """
    folder.mkdir(exist_ok=True)
    rng = random.Random(1)
    unusable = ["{", '{"text": 1}', '["text"]', '{"text": "x"}', "\ud800"]
    names = []
    for n in range(2):
        lines = []
        for i in range(records // 2):
            text = f"text {n}.{i} " + "é" * rng.randrange(60) if i % 7 else ""
            lines.append(json.dumps({"text": text, "title": f"t{i}"}))
            if bad and i % 30 == 11:
                lines.append(rng.choice(unusable))
            if i % 50 == 3:
                lines.append("")
        path = folder / f"{n}.jsonl"
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        names.append(str(path))
    return names


def reference_documents(names: list[str], key: str, limit: int = 0) -> list[list[int]]:
    """Tokenize one record at a time with the standard library.

    Args:
        limit: number of documents; 0: all.
    """
    out = []
    for name in names:
        for line in Path(name).read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                texts = [record[k] for k in KEYS]
                assert all(isinstance(text, str) for text in texts)
            except (ValueError, KeyError, TypeError, AssertionError):
                continue
            ids = [*record[key].encode()]
            out.append([*ids, 256] if ids else [])
    return out[:limit] if limit else out


def preprocess_config(names: list[str], prefix: Path, **changes) -> PreprocessConfig:
    """The job of preprocessing both keys of some files."""
    encoding = EncodeConfig(BYTE_TOKENIZER, KEYS, append_eod=True)
    return PreprocessConfig(names, str(prefix), encoding, **changes)


def output_bytes(prefix: Path, suffixes: tuple[str, ...] = PAIR_SUFFIXES) -> list[bytes]:
    """Content of the output files of both keys."""
    return [
        Path(f"{prefix}_{key}_document{suffix}").read_bytes()
        for key in KEYS
        for suffix in suffixes
    ]


def rejected_bytes(prefix: Path) -> bytes:
    """Content of the file of rejected records."""
    return Path(f"{prefix}.rejected.jsonl").read_bytes()
