"""Mutated files: random damage, the same for the same seed, and programs that read it."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT_SECONDS = 30
_JSON_VALUES = (
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "1e999",
    "NaN",
    "9" * 5000,
    "9" * 40,
    '""',
    '"text"',
    '"\\ud800"',
    "[]",
    "[1]",
    "{}",
    '{"a": 1}',
    "[" * 100_000 + "]" * 100_000,
)
_EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Damage a file once to three times."""
    for _ in range(draw.randint(1, 3)):
        data = draw.choice(_MUTATIONS)(data, draw)
    return data


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Replace or remove a value of a JSON object, which remains JSON, possibly deep inside."""
    content = json.loads(data)
    parent = content
    key = draw.choice(sorted(parent))
    while isinstance(parent[key], dict) and parent[key] and draw.random() < 0.8:
        parent = parent[key]
        key = draw.choice(sorted(parent))
    parent[key] = "@"
    if draw.random() < 0.2:
        del parent[key]
    value = draw.choice(_JSON_VALUES)
    return json.dumps(content).replace('"@"', value).encode()


def _flip_bit(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return b"\1"
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def _flip_early_bit(data: bytes, draw: random.Random) -> bytes:
    """Headers are short, and most faults are there."""
    return _flip_bit(data[:64], draw) + data[64:]


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randint(0, len(data))]


def _append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 40))


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(data))
    new = draw.randbytes(draw.randint(1, 12))
    return data[:at] + new + data[at + len(new) :]


def _cut_out(data: bytes, draw: random.Random) -> bytes:
    start = draw.randint(0, len(data))
    return data[:start] + data[draw.randint(start, len(data)) :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start = draw.randint(0, len(data))
    stop = draw.randint(start, len(data))
    return data[:stop] + data[start:stop] + data[stop:]


def _set_number(data: bytes, draw: random.Random) -> bytes:
    """Set a 64-bit number to one of the values at which arithmetic fails."""
    at = draw.randint(0, max(0, len(data) - 8))
    return data[:at] + struct.pack("<q", draw.choice(_EXTREMES)) + data[at + 8 :]


def _zeros(data: bytes, draw: random.Random) -> bytes:
    """A crashed file system leaves zeros in place of data."""
    return bytes(len(data))


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bit,
    _flip_bit,
    _flip_early_bit,
    _truncate,
    _append,
    _overwrite,
    _cut_out,
    _repeat,
    _set_number,
    _zeros,
)


def run_forked(main: Callable[[], int], argv: list[str], output: Path) -> tuple[int, str]:
    """Run a program in a forked process; return its exit code and what it printed.

    A program that takes longer than LIMIT_SECONDS ends with the code -SIGALRM.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT_SECONDS)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(descriptor, number)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False))
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False))
            sys.argv = argv
            code = main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def assert_read_or_refused(code: int, text: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Assert that a program succeeded, or ended with code 2 and one line about the reason."""
    assert "Traceback" not in text, text
    if code in allowed:
        return
    assert code == 2, f"exit code {code}: {text}"
    errors = [line for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1 and text.rstrip().endswith(errors[0]), text
