"""Files that replace long data flags on the command line."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import DataConfig
from megatron.data.sampling.blend import parse_blend
from megatron.io.untrusted import parse_json, read_text_file

_SPLITS = ("train", "valid", "test")
_LONGEST_FILE = 1 << 27  # bytes


def read_data_args(data: DataConfig) -> DataConfig:
    """Return the configuration with the content of --data-args-path, or of
    --per-split-data-args-path, in the fields that it replaces.

    A checkpoint then records and compares the content. Prefixes are relative to the working
    directory, as on the command line.

    Raises:
        ValueError: a file cannot be read, or its content is not what the flag expects.
    """
    if data.data_args_path:
        return _with_data_path(data)
    if data.per_split_data_args_path:
        return _with_split_paths(data)
    return data


def _with_data_path(data: DataConfig) -> DataConfig:
    flag = "--data-args-path"
    path = data.data_args_path
    words = _split(_read(flag, path), f"{flag} {path}")
    _check_blend(words, flag, path)
    return replace(data, data_path=words, data_args_path="")


def _with_split_paths(data: DataConfig) -> DataConfig:
    flag = "--per-split-data-args-path"
    path = data.per_split_data_args_path
    text = _read(flag, path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {path} is not JSON: {error}") from None
    require(
        isinstance(content, dict) and bool(content) and set(content) <= set(_SPLITS),
        f"the content of {flag} {path}",
        content,
        "a JSON object with train, valid and test, or some of them",
    )
    fields: dict[str, Any] = {"per_split_data_args_path": ""}
    for split, value in content.items():
        where = f"{flag} {path}: {split}"
        words = value
        if isinstance(value, str):
            words = list(_split(value, where))
        require(
            isinstance(words, list) and all(isinstance(w, (str, int, float)) for w in words),
            where,
            value,
            "a list of weights and prefixes",
        )
        words = tuple(map(str, words))
        _check_blend(words, where, "")
        fields[f"{split}_data_path"] = words
    return replace(data, **fields)


def _split(text: str, where: str) -> tuple[str, ...]:
    """Split a text into words; a prefix with blanks is quoted, as on the command line."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; quote a prefix with blanks or quotes: 'my data/corpus'"
        ) from None


def _read(flag: str, path: str) -> str:
    try:
        return read_text_file(path, _LONGEST_FILE)
    except OSError as error:
        raise ValueError(
            f"{flag} is {path!r}, which cannot be read: {error.strerror}; give the path of a file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"{flag} is {path!r}, which is not UTF-8 text; give the path of a text file"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{flag} is {path!r}, but {error}; give a file of prefixes and weights"
        ) from None


def _check_blend(words: tuple[str, ...], flag: str, path: str) -> None:
    """Check weights and prefixes here: later messages would name the flag that is replaced."""
    where = f"{flag} {path}".strip()
    require(bool(words), where, "", "weights and prefixes, or prefixes alone")
    parse_blend(words, where)
