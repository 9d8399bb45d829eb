"""Files of prompts, and the file of their continuations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from megatron.config.fields import require, shortened
from megatron.data.ingest.formats import FILE_FORMATS
from megatron.data.ingest.records import FlagNames
from megatron.data.ingest.texts import read_texts
from megatron.inference.text import Continuation
from megatron.io.atomic_write import write_bytes

_FLAGS = FlagNames(
    input="--prompt-file", keys="--prompt-key", skip_advice="leave the line empty"
)


def read_prompts(path: str, key: str) -> list[str]:
    """Read the prompts of a file.

    A file of JSON lines, of a table or compressed, as its suffix says (see
    `megatron.data.ingest.formats`), has a prompt under `key` of each record. Any other file is
    text in UTF-8 with a prompt on each line. Empty lines are skipped.

    Raises:
        ValueError: the file has no prompt, or is not what its suffix says.
        OSError: the file cannot be read.
    """
    if Path(path).suffix.lower() in FILE_FORMATS:
        prompts = _read_records(path, key)
    else:
        prompts = _read_lines(path)
    if not any(prompts):
        raise ValueError(
            f"--prompt-file {path} has no prompt; allowed: one on each line, or under the key "
            f"{key!r} of each JSON line (--prompt-key)"
        )
    return [prompt for prompt in prompts if prompt]


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {path} is not text in UTF-8 (byte {error.start}); allowed: UTF-8, or "
            f"a file with one of the suffixes {' '.join(FILE_FORMATS)}"
        ) from None
    # Not `splitlines`: a prompt may contain other separators, such as U+2028.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read_records(path: str, key: str) -> list[str]:
    return list(itertools.chain.from_iterable(read_texts(path, key, _FLAGS)))


def require_fitting_prompt(tokens: Sequence[int], text: str, max_positions: int) -> None:
    """Raise ValueError if a prompt is empty or has more tokens than the model has positions."""
    require(
        0 < len(tokens) <= max_positions,
        f"the number of tokens of the prompt {shortened(text)}",
        len(tokens),
        f"1 to the model's {max_positions} positions",
        "Cut the prompt.",
    )


def write_continuations(
    path: str, prompts: Sequence[str], continuations: Sequence[Continuation]
) -> None:
    """Write JSON lines with the keys prompt, text, tokens and end, see `Continuation`."""
    lines = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        record = {
            "prompt": prompt,
            "text": continuation.text,
            "tokens": continuation.tokens,
            "end": continuation.end,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    # Surrogates, which a prompt on the command line may have, become escapes of JSON.
    write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))
