"""Files and packages that --gate-path names, found before the other flags are parsed.

They are imported first, because their gates' options are flags. Only paths of the command
line are imported: a run.json, which may come from elsewhere with a checkpoint, holds the paths
of its run as a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.config.fields import require
from megatron.config.flag_parser import FlagParser

ImportGateFiles = Callable[[Sequence[str]], None]
"""Imports the gates of these files and packages"""


def find_gate_paths(words: list[str]) -> tuple[str, ...]:
    """Return the absolute paths that a command line names, each once, in order.

    Raises:
        ValueError: one is neither a Python file nor a package; nothing was imported.
    """
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gate-path", nargs="+", action="extend", default=[])
    args, _ = parser.parse_known_args(words)
    return resolve_gate_paths(args.gate_path)


def resolve_gate_paths(words: Iterable[str]) -> tuple[str, ...]:
    """Return the absolute paths of gate files and packages; see `find_gate_paths`."""
    return tuple(dict.fromkeys(_resolve(word) for word in words if word))


def _resolve(word: str) -> str:
    path = Path(word).expanduser().resolve()
    is_package = (path / "__init__.py").is_file()
    require(
        is_package or (path.suffix == ".py" and path.is_file()),
        "--gate-path",
        word,
        "an existing file that ends in .py, or a folder with __init__.py",
    )
    return str(path)


def import_gate_paths(
    words: list[str], import_gate_files: ImportGateFiles | None
) -> tuple[str, ...]:
    """Import the gates of a command line, and return their paths as `find_gate_paths`.

    Args:
        import_gate_files: None: the program has no gates.
    Raises:
        ValueError: as `find_gate_paths`, or a file cannot be imported.
    """
    paths = find_gate_paths(words)
    require(
        not paths or import_gate_files is not None,
        "--gate-path",
        list(paths),
        "only in programs that import gates",
        "Leave it out.",
    )
    if paths:
        import_gate_files(paths)
    return paths


def pop_stored_paths(stored: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Remove the paths of a run.json from its sections, and return them."""
    return tuple(stored.get("moe", {}).pop("gate_path", ()))


def with_stored_paths(error: ValueError, paths: Sequence[str], where: str) -> ValueError:
    """Return an error about the gate of a run.json that says where that run had it from.

    Args:
        paths: as `pop_stored_paths`.
        where: the run.json.
    """
    if not paths:
        return error
    return ValueError(
        f"{error}. The run of {where} had --gate-path {' '.join(paths)}; a path in a file is "
        "never imported: give --gate-path again"
    )
