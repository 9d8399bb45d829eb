"""A folder of checkpoints: which are there and whole, how one is published, and which are deleted.

    <save>/iter_0000300/     a complete checkpoint
        manifest.json        size and SHA-256 of every other file, written last
        run.json             the configuration, fit for --config
        state.json           how far the run is and what it is: megatron.checkpoint.saver
        index.json           every tensor and where its pieces are: megatron.checkpoint.reader
        rank_00000.safetensors, rank_00001.safetensors, ...
    <save>/latest            name of the checkpoint that was completed last
    <save>/checkpoint.partial/   one that is being written

A checkpoint appears under its name by a rename, when all of it is on the disk. Checkpoints are numbered in the order in
which they were completed (`serial`): after a return to an earlier iteration the newest is not the one with the highest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.fields import require
from megatron.io import atomic_write
from megatron.io.atomic_write import fsync_directory
from megatron.io.sha256 import file_sha256

LOGGER = logging.getLogger("megatron")
FORMAT = "moe-megatron checkpoint 1"
MANIFEST, LATEST, REPLACED = "manifest.json", "latest", ".replaced"


class CorruptCheckpointError(ValueError):
    """A checkpoint that is incomplete or damaged; the message names the file and what is wrong with it."""


def checkpoint_name(iteration: int) -> str:
    """Folder name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int | None:
    """Iteration of a checkpoint's folder, by its name; None: it is not one."""
    found = re.fullmatch(rf"iter_(\d{{7,}})({re.escape(REPLACED)})?", path.name)
    return int(found.group(1)) if found else None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint itself (whole or not), and not the folder of several."""
    return iteration_of(path) is not None or (path / MANIFEST).is_file()


def write_text(path: Path, text: str) -> tuple[int, str]:
    """Write a small file, synced and renamed; its (bytes, SHA-256), as a manifest has them."""
    content = text.encode()
    atomic_write.write_bytes(path, content)
    return len(content), hashlib.sha256(content).hexdigest()


def read_json(path: Path) -> Any:
    """Content of a JSON file of a checkpoint. Raises Broken, naming it, if there is none or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of the checkpoint in folder `path`: iteration, serial, files {name: [bytes, sha256]}.

    Raises:
        Broken: there is none, or it was changed after it was written.
    """
    if not (path / MANIFEST).exists() and any(path.glob("*_model_states.pt")):
        raise CorruptCheckpointError(
            f"{path} has DeepSpeed's own files and no {MANIFEST}: it is of an earlier version of this program "
            "or of another one, and cannot be read"
        )
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptCheckpointError(f"{path / MANIFEST} is not the manifest of a {FORMAT!r}")
    if manifest.get("checksum") != _checksum(manifest):
        raise CorruptCheckpointError(f"{path / MANIFEST} is damaged: its checksum does not fit")
    if not _is_well_formed(manifest):
        raise CorruptCheckpointError(f"{path / MANIFEST} says what no manifest says")
    if iteration_of(path) not in (None, manifest["iteration"]):
        raise CorruptCheckpointError(
            f"{path} is the checkpoint of iteration {manifest['iteration']} under another name"
        )
    return manifest


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    """Also that every file is in the folder itself."""
    files = manifest.get("files")
    return (
        all(type(manifest.get(key)) is int for key in ("iteration", "serial"))
        and isinstance(files, dict)
        and all(
            Path(name).name == name
            and isinstance(what, list)
            and [type(w) for w in what] == [int, str]
            for name, what in files.items()
        )
    )


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(
    path: Path, names: Iterable[str], manifest: dict[str, Any], hashes: bool = True
) -> None:
    """Whether these files of a checkpoint are what they were when it was written.

    Args:
        hashes: read them; without, only their sizes are compared.

    Raises:
        Broken: one is missing, has another size, or another SHA-256.
    """
    for name in names:
        size, sha256 = manifest["files"][name]
        try:
            there = (path / name).stat().st_size
            if there != size:
                raise CorruptCheckpointError(
                    f"{path / name} has {there} bytes, {size} were written"
                )
            if hashes and file_sha256(path / name) != sha256:
                raise CorruptCheckpointError(
                    f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
                )
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{path / name} is missing") from None
        except OSError as error:
            raise CorruptCheckpointError(
                f"{path / name} cannot be read: {error.strerror}"
            ) from None


def list_checkpoints(folder: str | Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """(checkpoints of a folder with their manifests, completed last first; what is wrong with the others)."""
    good, bad = [], []
    paths = (
        sorted(p for p in Path(folder).iterdir() if iteration_of(p) is not None)
        if Path(folder).is_dir()
        else []
    )
    for path in paths:
        try:
            good.append((path, read_manifest(path)))
        except (CorruptCheckpointError, OSError) as error:
            bad.append(str(error))
    good.sort(key=lambda found: found[1]["serial"], reverse=True)
    return good, bad


def next_serial(folder: str | Path) -> int:
    """The serial of the next checkpoint of a folder."""
    return (
        max((manifest["serial"] for _, manifest in list_checkpoints(folder)[0]), default=0) + 1
    )


def commit_checkpoint(
    partial: Path, folder: Path, iteration: int, files: dict[str, tuple[int, str]]
) -> Path:
    """Turn a finished work folder into the checkpoint of an iteration, and name it in `latest`.

    One that is there already under this name is replaced; at no moment are both gone.

    Raises:
        OSError: it cannot be done; or a file has not the size that was written.
    """
    try:
        check_files(partial, files, {"files": files}, hashes=False)
    except CorruptCheckpointError as error:
        raise OSError(f"{error}: the disk lost what it took") from None
    manifest = {
        "format": FORMAT,
        "iteration": iteration,
        "serial": next_serial(folder),
        "files": {name: list(files[name]) for name in sorted(files)},
    }
    manifest["checksum"] = _checksum(manifest)
    atomic_write.write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    fsync_directory(partial)
    target = folder / checkpoint_name(iteration)
    old = target.with_name(target.name + REPLACED)
    if target.exists():
        _remove(old)
        os.rename(target, old)
    os.rename(partial, target)
    fsync_directory(folder)
    atomic_write.write_text(folder / LATEST, target.name)
    fsync_directory(folder)
    _remove(old)
    return target


def apply_retention(
    folder: Path, keep_last: int, keep_every: int, damaged: Iterable[str] = ()
) -> list[str]:
    """Delete complete checkpoints: all but the `keep_last` newest (0: keep all) and those of iterations divisible by
    `keep_every` (0: none). What is broken stays, for somebody to look at. Returns the names of the deleted.

    Args:
        damaged: names of checkpoints of which only a file is, which their manifests do not show.
    """
    if not keep_last:
        return []
    whole = [found for found in list_checkpoints(folder)[0] if found[0].name not in damaged]
    old = [
        path
        for path, manifest in whole[keep_last:]
        if not (keep_every and manifest["iteration"] % keep_every == 0)
    ]
    return [path.name for path in old if _remove(path)]


def remove_stale(folder: Path) -> None:
    """Delete what a killed run left half deleted or half written."""
    for doomed in folder.glob(".iter_*.deleted"):
        _delete(doomed)
    for half in folder.glob(f"{LATEST}.*.tmp"):
        half.unlink()


def _remove(path: Path) -> bool:
    """Delete a folder; whether it is gone. It first loses its name, so that no half of it is taken for a damaged
    checkpoint."""
    if not path.exists():
        return True
    doomed = path.with_name(f".{path.name}.deleted")
    return _delete(doomed) and _delete(path, doomed)


def _delete(path: Path, doomed: Path | None = None) -> bool:
    """Delete a folder, if it is there, under the name of `doomed`. That it cannot be deleted is no reason to stop."""
    try:
        if path.exists():
            shutil.rmtree(path.rename(doomed) if doomed else path)
    except OSError as error:
        LOGGER.warning("%s cannot be deleted: %s. Delete it by hand", path, error)
        return False
    return True


def select_checkpoints(options: CheckpointConfig) -> list[tuple[Path, dict[str, Any]]]:
    """The checkpoints (with their manifests) that --load and --load-step may mean, the wanted one first. None with
    --load-or-init when there is nothing at all. Other files than manifests are not looked at yet.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the one of --load-step is not there, or has no manifest.
    """
    path = Path(options.load)
    if path.is_dir() and is_checkpoint(path):
        require(
            not options.load_step,
            "--load-step",
            options.load_step,
            "only with the folder of the checkpoints",
            f"{path} is one checkpoint.",
        )
        return [(path, read_manifest(path.resolve()))]
    good, bad = list_checkpoints(path)
    if options.load_step:
        chosen = [found for found in good if found[1]["iteration"] == options.load_step]
        if not chosen:
            broken = [text for text in bad if checkpoint_name(options.load_step) in text]
            there = ", ".join(str(m["iteration"]) for _, m in sorted(good)) or "none"
            raise ValueError(
                f"--load-step is {options.load_step}; "
                + (broken[0] if broken else f"whole checkpoints in {options.load}: {there}")
            )
        return chosen[:1]
    marker = path / LATEST
    if (
        marker.is_file()
        and not (path / (name := marker.read_text(errors="replace").strip())).is_dir()
    ):
        bad.append(f"{marker} names {name}, which is not there")
    for text in bad:
        LOGGER.warning("%s; not used", text)
    if not good and (bad or not options.load_or_init):
        raise _nothing(path, bad)
    return good


def _nothing(folder: str | Path, bad: list[str]) -> FileNotFoundError:
    there = f"; what is there cannot be used: {'; '.join(bad)}" if bad else ""
    advice = "" if bad else ", or add --load-or-init"
    return FileNotFoundError(
        f"--load is {str(folder)!r}, which holds no checkpoint{there}. Point --load at the folder "
        f"given to --save of an earlier run, leave it out{advice}"
    )
