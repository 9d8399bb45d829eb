"""Mutations of a checkpoint, and what the four programs that read one do with the result."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helpers import handmade
from megatron.checkpoint.manifest import manifest_checksum
from megatron.io.sha256 import file_sha256

LIMIT_SECONDS = 30
_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    7,
    2**31,
    10**18,
    2**63,
    10**30,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "text",
    "two\nlines",
    "\ud800",
    "../../x",
    "x" * 5000,
    [],
    [[]],
    [1, 2, 3],
    {},
    {"a": 1},
)
_DEEP = 100_000


class Outcome(NamedTuple):
    """What a program did."""

    program: str
    code: int | None
    """Exit code; None for an exception that ended the program"""
    stderr: str

    @property
    def is_fine(self) -> bool:
        """Whether it succeeded, or ended with one line and exit code 2."""
        lines = self.stderr.splitlines()
        if self.code == 2:
            return len(lines) == 1 and "error: " in lines[0]
        if self.program == "inspect" and self.code == 1:
            return all(line.startswith("fault: ") for line in lines)
        if self.program == "consolidate":
            return self.code == 0  # with warnings
        if self.program == "generate":
            lines = [line for line in lines if not line.endswith("tokens/s")]
        return self.code == 0 and not lines


# Mutations of files


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _replace(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def mutate(path: Path, rng: random.Random) -> None:
        path.unlink()
        make(path)

    return mutate


_FILE_MUTATIONS = {
    "flip a bit": _flip,
    "truncate": _truncate,
    "delete": _replace(lambda path: None),
    "FIFO": _replace(os.mkfifo),
    "link to /dev/zero": _replace(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": _replace(lambda path: path.symlink_to(path)),
    "directory": _replace(lambda path: path.mkdir()),
    "long text": _replace(lambda path: path.write_text("9" * 5000)),
    "deep nesting": _replace(lambda path: path.write_text("[" * _DEEP + "]" * _DEEP)),
    "not UTF-8": _replace(lambda path: path.write_bytes(b"\xff\x00\n" * 99)),
}

# Mutations of values, after which hashes and checksums fit


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value inside a JSON value."""
    keys = []
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = list(range(len(content)))
    for key in keys:
        yield content, key
        yield from _places(content[key])


def _mutate_value(content: Any, rng: random.Random) -> str:
    """Change, delete or add one value of a JSON value in place; return what was done."""
    container, key = rng.choice(list(_places(content)))
    kind = rng.choice(("change", "change", "change", "delete", "add", "nest"))
    if kind == "delete":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container[rng.choice(("unknown", "x" * 5000, "two\nlines"))] = rng.choice(_VALUES)
    elif kind == "nest":
        for _ in range(rng.choice((3, 200, 500))):
            container[key] = [container[key]]
    else:
        value = rng.choice(_VALUES)
        if isinstance(container[key], (int, float)) and rng.random() < 0.3:
            value = container[key] * rng.choice((-1, 2, 10**6))
        container[key] = value
        return f"{key!r:.50} = {value!r:.50}"
    return f"{kind} {key!r:.50}"


def _mutate_json(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    what = _mutate_value(content, rng)
    path.write_text(json.dumps(content))
    return what


def _mutate_header(path: Path, rng: random.Random) -> str:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    what = _mutate_value(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return what


def _sign(folder: Path) -> None:
    """Make hashes and checksum of the manifest fit the files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    files = manifest.get("files")
    if isinstance(files, dict):
        for name in files:
            if len(name) < 100 and (folder / name).is_file():
                file = folder / name
                files[name] = [file.stat().st_size, file_sha256(file)]
    sign_manifest(path, manifest)


def sign_manifest(path: Path, manifest: Any) -> None:
    """Write a manifest with the checksum of its content."""
    if isinstance(manifest, dict):
        manifest["checksum"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))


def mutate(folder: Path, rng: random.Random) -> str:
    """Mutate the checkpoint in `folder`, or the files next to it, and return what was done."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    kind = rng.choice(
        ("file", "json", "json", "json", "header", "manifest", "version", "latest")
    )
    if kind == "file":
        path = rng.choice(files)
    elif kind == "latest":
        path = rng.choice(sorted(folder.parent.glob("latest*")))
    elif kind == "json":
        path = folder / rng.choice(("run.json", "state.json", "index.json"))
        what = _mutate_json(path, rng)
        _sign(folder)
        return f"{path.name}: {what}"
    elif kind == "header":
        path = rng.choice([path for path in files if path.suffix == ".safetensors"])
        what = _mutate_header(path, rng)
        _sign(folder)
        return f"{path.name}: {what}"
    elif kind == "version":
        path = folder / rng.choice(("manifest.json", "run.json", "state.json", "index.json"))
        content = json.loads(path.read_text())
        content["version"] = rng.choice(_VALUES)
        path.write_text(json.dumps(content))
        _sign(folder)
        return f"{path.name}: 'version' = {content['version']!r:.50}"
    else:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        what = _mutate_value(manifest, rng)
        sign_manifest(path, manifest)
        return f"{path.name}: {what}"
    name = rng.choice(list(_FILE_MUTATIONS))
    _FILE_MUTATIONS[name](path, rng)
    return f"{path.name}: {name}"


# Programs


def _run(program: str, main: Callable[[], int]) -> Outcome:
    """Run a program in this process, for a limited time."""

    def expired(*_: object) -> None:
        raise AssertionError(f"{program} takes more than {LIMIT_SECONDS} s")

    err = io.StringIO()
    code = None
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = main()
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(program, code, err.getvalue())


def run_programs(folder: Path, train_argv: list[str]) -> list[Outcome]:
    """Run training, generation, inspection and consolidation on a directory of checkpoints.

    Call it in a rank of a pool of one.
    """
    from megatron import pretrain
    from megatron.engine import distributed
    from tools import generate_text

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    destroy = distributed.destroy
    distributed.destroy = lambda: None  # the pool still needs its process group
    generate = ["--load", str(folder), "--max-new-tokens", "1"]
    output = folder.with_name("consolidated")
    try:
        return [
            _run("train", lambda: pretrain.main([*train_argv, "--load", str(folder)])),
            _run("generate", lambda: generate_text.main(generate)),
            _run("inspect", lambda: handmade.main("inspect_checkpoint", folder, "--tensors")),
            _run(
                "consolidate", lambda: handmade.main("consolidate_checkpoint", folder, output)
            ),
        ]
    finally:
        distributed.destroy = destroy
        shutil.rmtree(output, ignore_errors=True)


def fuzz(base: Path, folder: Path, train_argv: list[str], seeds: range) -> list[str]:
    """Return what went wrong, by seed, when copies of a directory of checkpoints are mutated.

    Its newest checkpoint is mutated. For odd seeds there is an older, valid one.
    """
    failures = []
    for seed in seeds:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        *older, newest = sorted(folder.glob("iter_*"))
        if seed % 2 == 0:
            for path in older:
                shutil.rmtree(path)
        what = mutate(newest, random.Random(seed))
        for outcome in run_programs(folder, train_argv):
            if not outcome.is_fine:
                failures.append(
                    f"seed {seed}, {what}: {outcome.program} ended with {outcome.code}: "
                    f"{outcome.stderr[-2000:]}"
                )
    return failures
