"""A small corpus for the tests of preprocessing, and what must come out of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron.config.schema import TokenizerConfig
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig

BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")
PAIR = (".bin", ".idx", ".json")


def corpus(folder: Path, records: int = 400, bad: bool = False) -> list[str]:
    """Two files of records with a text and a title, some empty, some unusable; returns their names."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(1)
    names = []
    for n in range(2):
        lines = []
        for i in range(records // 2):
            record = {
                "text": f"text {n}.{i} " + "é" * rng.randrange(60) if i % 7 else "",
                "title": f"t{i}",
            }
            lines.append(json.dumps(record))
            if bad and i % 30 == 11:
                lines.append(
                    rng.choice(["{", '{"text": 1}', '["text"]', '{"text": "x"}', "\ud800"])
                )
            if i % 50 == 3:
                lines.append("")
        names.append(str(folder / f"{n}.jsonl"))
        Path(names[-1]).write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    return names


def loop(names: list[str], key: str, limit: int = 0) -> list[list[int]]:
    """What must come out, one record at a time, by the standard library."""
    out = []
    for name in names:
        for line in Path(name).read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                texts = [record[k] for k in ("text", "title")]
                assert all(isinstance(t, str) for t in texts)
            except (ValueError, KeyError, TypeError, AssertionError):
                continue
            ids = [*record[key].encode()]
            out.append([*ids, 256] if ids else [])
    return out[:limit] if limit else out


def job(names: list[str], prefix: Path, **changes) -> PreprocessConfig:
    return PreprocessConfig(
        names, str(prefix), EncodeConfig(BYTES, ("text", "title"), append_eod=True), **changes
    )


def content(prefix: Path, suffixes=(".bin", ".idx", ".json")) -> list[bytes]:
    return [
        Path(f"{prefix}_{key}_document{suffix}").read_bytes()
        for key in ("text", "title")
        for suffix in suffixes
    ]
