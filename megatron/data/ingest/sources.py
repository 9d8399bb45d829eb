"""Opening document sources: what the words after `--input` stand for."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence

from megatron.data.ingest.formats import (
    FILE_FORMATS,
    DocumentSource,
    HuggingFace,
    JsonLines,
    PipeSource,
)
from megatron.data.ingest.records import TOOL_FLAGS, FlagNames


def open_sources(inputs: Sequence[str], flags: FlagNames = TOOL_FLAGS) -> list[DocumentSource]:
    """Open the sources that `--input` names, in the given order.

    Args:
        inputs: files, glob patterns (with `**`, too), folders (searched recursively for
            visible files of a known format, in the order of their names), `-` for standard
            input, `hf:NAME[@CONFIG][:SPLIT]`. The suffix of a file selects its format; a
            named file with any other suffix, or without one, contains JSON lines.
        flags: flags that error messages refer to.

    Raises:
        FileNotFoundError: an input does not exist, or a pattern matches no file.
        ValueError: a folder has no file of a known format, an input is
            named twice, or an optional package is missing.
        OSError: a folder or file cannot be examined.
    """
    paths = expand_inputs(inputs, flags)
    return [_open(number, path, flags) for number, path in enumerate(paths)]


def expand_inputs(inputs: Sequence[str], flags: FlagNames = TOOL_FLAGS) -> list[str]:
    """List the paths that `open_sources` opens. Raises what it raises, except for reading."""
    paths = []
    for entry in inputs:
        paths += _expand(entry, flags)
    _check_unique(paths, flags)
    return paths


def _check_unique(paths: Sequence[str], flags: FlagNames) -> None:
    """Raise ValueError if two paths lead to the same file."""
    names: dict[tuple[int, int] | str, str] = {}
    for path in paths:
        name = path if path == "-" or path.startswith("hf:") else os.path.abspath(path)
        key = _file_key(path)
        if key in names:
            also = "" if names[key] == name else f" (also as {names[key]})"
            raise ValueError(
                f"{flags.input} names {name} twice{also}; allowed: each once (a folder or "
                f"pattern names its files)"
            )
        names[key] = name


def _file_key(path: str) -> tuple[int, int] | str:
    """Return (device, inode) of an existing file, which all its names share."""
    if path.startswith("hf:"):
        return path
    try:
        stat = os.stat(0 if path == "-" else path)  # 0 is the descriptor of standard input
    except OSError:  # reported when the path is opened
        return os.path.abspath(path)
    return stat.st_dev, stat.st_ino


def _expand(entry: str, flags: FlagNames) -> list[str]:
    """List the paths that one word after `--input` stands for."""
    if os.path.isdir(entry):
        return _files_in(entry, flags)
    if not glob.has_magic(entry) or os.path.exists(entry):
        return [entry]
    found = []
    for path in glob.glob(entry, recursive=True):
        if not os.path.isdir(path) and not _is_staging_dir(os.path.dirname(path)):
            found.append(path)
    if not found:
        raise FileNotFoundError(f"{flags.input} {entry} matches no file")
    return sorted(found)


def _files_in(folder: str, flags: FlagNames) -> list[str]:
    """List the files of a known format below a folder, sorted by path."""
    found = []
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=_reraise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a symbolic link to a folder that contains it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in sorted(folders) if _is_searched(parent, name)]
        found += [os.path.join(parent, name) for name in files if _is_input(parent, name)]
    if not found:
        raise ValueError(
            f"{flags.input} {folder} is a folder without files of a known suffix; known: "
            f"{' '.join(FILE_FORMATS)}"
        )
    return sorted(found)


def _is_searched(parent: str, name: str) -> bool:
    return not name.startswith(".") and not _is_staging_dir(os.path.join(parent, name))


def _is_input(parent: str, name: str) -> bool:
    """Whether a file in a searched folder is an input."""
    if name.startswith(".") or _suffix(name) not in FILE_FORMATS:
        return False
    path = os.path.join(parent, name)
    if _is_sidecar(path):
        return False
    # Pipes and devices are ignored. A broken link is not: opening it reports the error.
    return os.path.isfile(path) or not os.path.exists(path)


def _is_staging_dir(folder: str) -> bool:
    """Whether a folder holds unpublished output of this package (see `StagingDir`)."""
    return folder.endswith(".partial") and os.path.isfile(os.path.join(folder, "lock"))


def _is_sidecar(path: str) -> bool:
    """Whether a file describes a .bin/.idx pair, such as streaming stores next to the text."""
    stem, suffix = os.path.splitext(path)
    return suffix == ".json" and os.path.isfile(stem + ".idx")


def _reraise(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed, which os.walk would skip."""
    raise error


def _open(number: int, path: str, flags: FlagNames) -> DocumentSource:
    if path.startswith("hf:"):
        return HuggingFace(number, path, flags)
    if path == "-":
        if sys.stdin is None:
            raise ValueError(
                f"{flags.input} - is standard input, which is closed. Send it a file or the "
                f"output of a program"
            )
        return PipeSource(number, path, flags)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{flags.input} {path} does not exist")
    if not os.path.isfile(path):
        return PipeSource(number, path, flags)
    # A file that is named explicitly holds JSON lines unless its suffix says otherwise.
    source_class = FILE_FORMATS.get(_suffix(path), JsonLines)
    return source_class(number, path, flags)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
