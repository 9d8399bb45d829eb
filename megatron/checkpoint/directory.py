"""Directory of a run's checkpoints: listing, finding the newest valid one, commit, retention.

    <save>/iter_0000300/     a complete checkpoint
        manifest.json        size and SHA-256 of every other file, written last
        run.json             the configuration, usable with --config
        state.json           progress and metadata of the run: megatron.checkpoint.metadata
        index.json           every tensor and where its shards are: megatron.checkpoint.shards
        rank_00000.safetensors, rank_00001.safetensors, ...
    <save>/latest, latest.json   name of the checkpoint to resume from: megatron.checkpoint.latest
    <save>/checkpoint.partial/   staging directory: a lock, and iter_* while it is written

A checkpoint gets its name by a rename, when all of it is on the disk. Checkpoints are numbered in
the order of their completion (`serial`): after a return to an earlier iteration the newest one is
not the one with the highest iteration.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron.checkpoint.latest import (
    LATEST,
    LATEST_RECORD,
    latest_problem,
    read_latest,
    read_latest_record,
    write_latest,
)
from megatron.checkpoint.manifest import (
    MANIFEST,
    CorruptCheckpointError,
    check_files,
    read_manifest,
    read_serial,
    write_manifest,
)
from megatron.config.fields import require
from megatron.config.format_version import NewerVersionError
from megatron.io.atomic_write import fsync_directory, temporary_pattern
from megatron.io.sha256 import FileDigest
from megatron.log import get_logger

_REPLACED = ".replaced"
"""Suffix of an old checkpoint while the new one of the same iteration takes its name"""


class CheckpointEntry(NamedTuple):
    """A checkpoint with a well-formed manifest; its other files are not verified yet."""

    path: Path
    manifest: dict[str, Any]
    newer: NewerVersionError | None = None
    """Why the checkpoint cannot be used, if a newer version of this program wrote it; its
    manifest here then has only iteration and serial"""


def checkpoint_name(iteration: int) -> str:
    """Return the directory name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int | None:
    """Return the iteration in the directory name of a checkpoint; None for other names."""
    found = re.fullmatch(rf"iter_(\d{{7,}})({re.escape(_REPLACED)})?", path.name)
    if found is None:
        return None
    return int(found.group(1))


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is one checkpoint, valid or not, rather than a run's directory."""
    return iteration_of(path) is not None or (path / MANIFEST).is_file()


def is_hf_folder(path: str | Path) -> bool:
    """Return whether a path is the folder of a Hugging Face model instead of checkpoints."""
    return (Path(path) / "config.json").is_file()


def read_entry(path: Path) -> CheckpointEntry:
    """Read the manifest of a checkpoint.

    Raises:
        CorruptCheckpointError: The manifest is not valid, or belongs to another iteration than
            the directory name.
    """
    manifest = read_manifest(path)
    if iteration_of(path) not in (None, manifest["iteration"]):
        raise CorruptCheckpointError(
            f"{path} is the checkpoint of iteration {manifest['iteration']} under another name"
        )
    return CheckpointEntry(path, manifest)


def list_checkpoints(directory: str | Path) -> tuple[list[CheckpointEntry], list[str]]:
    """List the checkpoints of a directory by their manifests.

    Returns:
        (checkpoints with a valid manifest, newest first; what is wrong with the others).
    """
    entries, problems = list_with_newer_versions(directory)
    readable = [entry for entry in entries if entry.newer is None]
    problems += [str(entry.newer) for entry in entries if entry.newer is not None]
    return readable, problems


def list_with_newer_versions(
    directory: str | Path,
) -> tuple[list[CheckpointEntry], list[str]]:
    """List checkpoints as `list_checkpoints`, with those of newer versions of this program.

    Those keep their place in the order of completion, so that none of them is passed over for
    an older checkpoint. One whose serial number this version does not find is the newest.
    """
    directory = Path(directory)
    entries = []
    problems = []
    newer = []
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if iteration_of(path) is None:
                continue
            try:
                entries.append(read_entry(path))
            except NewerVersionError as error:
                newer.append((path, error))
            except (CorruptCheckpointError, OSError) as error:
                problems.append(str(error))
    last = max((entry.manifest["serial"] for entry in entries), default=0)
    for path, error in newer:
        serial = read_serial(path)
        if serial is None:
            serial = last + 1
        manifest = {"iteration": iteration_of(path), "serial": serial}
        entries.append(CheckpointEntry(path, manifest, error))
    entries.sort(key=lambda entry: entry.manifest["serial"], reverse=True)
    return entries, problems


# Finding the newest valid checkpoint


@dataclass
class CheckpointSelection:
    """The checkpoints that a path and an iteration can mean, found by their manifests alone."""

    path: Path
    """Directory of a run's checkpoints, or one checkpoint"""
    step: int = 0
    """Iteration that was requested; 0: the newest"""
    candidates: list[CheckpointEntry] = field(default_factory=list)
    """Checkpoints in the order of preference: newest first"""
    problems: list[str] = field(default_factory=list)
    """What is wrong with checkpoints that are not candidates"""
    available: list[int] = field(default_factory=list)
    """Iterations of all checkpoints of the directory that have a valid manifest"""
    is_single: bool = False
    """Whether the path is one checkpoint"""
    note: str = ""
    """Why later checkpoints are no candidates: the file `latest` was edited to go back"""

    @property
    def is_empty(self) -> bool:
        """Whether there is no checkpoint at all, not even a corrupt one."""
        return not self.candidates and not self.problems


class ValidCheckpoint(NamedTuple):
    """The newest valid checkpoint of a selection."""

    path: Path
    manifest: dict[str, Any]
    corrupt: list[Path]
    """Newer checkpoints whose files are damaged"""
    problems: list[str]
    """What is wrong with all checkpoints that were passed over"""


Verifier = Callable[[CheckpointEntry], list[str]]
"""Returns what is wrong with the files of a checkpoint; an empty list means that it is valid"""


def select_checkpoints(path: Path, step: int = 0) -> CheckpointSelection:
    """Select the checkpoints that `path` and `step` can mean, without reading their tensors.

    Without a step these are all, or, if a user edited the file `latest`, the one that it names
    and those completed before it.

    Args:
        path: Directory of a run's checkpoints, or one checkpoint.
        step: Iteration of the checkpoint in the directory; 0: the newest one.

    Raises:
        ValueError: A step is given for a path that is one checkpoint.
        CorruptCheckpointError: The path is one checkpoint, and its manifest is not valid.
    """
    if path.is_dir() and is_checkpoint(path):
        require(
            not step,
            "--load-step",
            step,
            "only with the directory of a run's checkpoints",
            f"{path} is one checkpoint.",
        )
        entry = read_entry(path.resolve())
        return CheckpointSelection(path, candidates=[entry], is_single=True)
    candidates, problems = list_with_newer_versions(path)
    available = sorted(e.manifest["iteration"] for e in candidates if e.newer is None)
    if step:
        candidates = [entry for entry in candidates if entry.manifest["iteration"] == step]
        problems = [problem for problem in problems if checkpoint_name(step) in problem]
        return CheckpointSelection(path, step, candidates, problems, available)
    selection = CheckpointSelection(path, step, candidates, problems, available)
    _follow_latest(selection)
    return selection


def _follow_latest(selection: CheckpointSelection) -> None:
    """Remove candidates that were completed after the one that a user wrote into `latest`."""
    directory = selection.path
    problem = latest_problem(directory)
    if problem:
        selection.problems.append(problem)
        return
    name = read_latest(directory)
    older = [entry for entry in selection.candidates if entry.path.name == name]
    if not older or older[0] is selection.candidates[0]:
        return
    (named,) = older
    newest = selection.candidates[0]
    record = read_latest_record(directory)
    if record is None:
        selection.problems.append(
            f"{directory / LATEST} names {name}, but {newest.path.name} was completed later, and "
            f"no {LATEST_RECORD} shows whether the name was edited; --load-step "
            f"{named.manifest['iteration']} resumes from it"
        )
        return
    was_killed_before_update = newest.manifest["serial"] > record.serial
    if was_killed_before_update or name == record.name:
        return
    later = [
        entry
        for entry in selection.candidates
        if entry.manifest["serial"] > named.manifest["serial"]
    ]
    selection.candidates = [entry for entry in selection.candidates if entry not in later]
    selection.note = (
        f"{directory / LATEST} was edited to {name}: "
        f"{', '.join(entry.path.name for entry in later)}, completed later, will not be used"
    )


def find_newest_valid(
    selection: CheckpointSelection,
    verify: Verifier,
    advice: str = "Give the directory of --save of a run, or one checkpoint in it",
) -> ValidCheckpoint:
    """Return the first candidate whose files are valid. The one finder of checkpoints.

    Args:
        verify: Checks the files of a candidate: all hashes, only sizes, or a share per rank.
        advice: What the user can do, appended to the message when there is no valid checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint, or none is valid.
        CorruptCheckpointError: The selection is one checkpoint, and it is not valid.
        NewerVersionError: A newer version of this program wrote the checkpoint that would be
            used. Resuming from an older one would abandon steps.
    """
    corrupt = []
    problems = list(selection.problems)
    for entry in selection.candidates:
        if entry.newer is not None:
            raise entry.newer
        found = verify(entry)
        if not found:
            return ValidCheckpoint(entry.path, entry.manifest, corrupt, problems)
        corrupt.append(entry.path)
        problems += found
    if selection.is_single:
        raise CorruptCheckpointError(
            f"{'; '.join(problems)}. Use another checkpoint, or restore its files from a copy"
        )
    raise _not_found(selection, problems, advice)


def _not_found(
    selection: CheckpointSelection, problems: list[str], advice: str
) -> FileNotFoundError:
    message = f"{selection.path} has no valid checkpoint"
    if selection.step:
        message += f" of iteration {selection.step}, which --load-step requests"
    if problems:
        message += f": {'; '.join(problems)}"
    elif not selection.path.is_dir():
        message = f"{selection.path} is not a directory of checkpoints"
    elif selection.available:
        iterations = ", ".join(map(str, selection.available))
        message += f"; there are checkpoints of iterations {iterations}"
    return FileNotFoundError(f"{message}. {advice}")


# Commit


def next_serial(directory: str | Path) -> int:
    """Return the serial number of the next checkpoint of a directory."""
    entries, _ = list_with_newer_versions(directory)
    return 1 + max((entry.manifest["serial"] for entry in entries), default=0)


def commit_checkpoint(
    partial: Path, directory: Path, iteration: int, files: dict[str, FileDigest]
) -> Path:
    """Turn a finished staging directory into the checkpoint of an iteration.

    An existing checkpoint of this name is replaced; at every moment one of the two is complete.

    Args:
        partial: Directory with all files of the checkpoint, synced to the disk.
        directory: Directory of the run's checkpoints.
        files: Digest of every file, by name.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: The commit fails, or a file does not have the size that was written.
    """
    try:
        check_files(partial, files, {"files": files}, hashes=False)
    except CorruptCheckpointError as error:
        raise OSError(f"{error}: the file system lost data that was written") from None
    serial = next_serial(directory)
    write_manifest(partial, iteration, serial, files)
    fsync_directory(partial)
    target = directory / checkpoint_name(iteration)
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        get_logger().info("%s of an earlier save is replaced", target)
        _remove(replaced)
        os.rename(target, replaced)
    os.rename(partial, target)
    fsync_directory(directory)
    write_latest(directory, target.name, serial)
    _remove(replaced)
    return target


# Deletion


def apply_retention(
    directory: Path, keep_last: int, keep_every: int, corrupt: Iterable[str] = ()
) -> list[str]:
    """Delete old checkpoints.

    Checkpoints without a valid manifest are kept, so that they can be examined.

    Args:
        keep_last: Number of newest checkpoints to keep; 0: keep all.
        keep_every: Keep checkpoints of iterations divisible by this number; 0: none of them.
        corrupt: Names of checkpoints with damaged files but a valid manifest. They are kept and
            do not count as newest ones.

    Returns:
        Names of the deleted checkpoints.
    """
    if not keep_last:
        return []
    entries, _ = list_checkpoints(directory)
    valid = [entry for entry in entries if entry.path.name not in corrupt]
    deleted = []
    for entry in valid[keep_last:]:
        if keep_every and entry.manifest["iteration"] % keep_every == 0:
            continue
        if _remove(entry.path):
            deleted.append(entry.path.name)
    return deleted


def remove_stale(directory: Path) -> None:
    """Delete files of a killed run that are partly written or partly deleted."""
    for deleted in directory.glob(".iter_*.deleted"):
        _try_delete(deleted)
    # The first pattern is that of temporary names of earlier versions.
    patterns = [f"{LATEST}.*.tmp", *map(temporary_pattern, (LATEST, LATEST_RECORD))]
    for pattern in patterns:
        for temporary in directory.glob(pattern):
            temporary.unlink()


def _remove(path: Path) -> bool:
    """Delete a checkpoint if it exists. Returns whether it is gone.

    It is renamed first, so that a partly deleted directory is not taken for a corrupt checkpoint.
    """
    if not path.exists():
        return True
    renamed = path.with_name(f".{path.name}.deleted")
    return _try_delete(renamed) and _try_delete(path, renamed)


def _try_delete(path: Path, renamed: Path | None = None) -> bool:
    """Delete a directory if it exists, under another name if one is given.

    A failure is logged and does not stop the run.
    """
    if not path.exists():
        return True
    try:
        if renamed is not None:
            path = path.rename(renamed)
        shutil.rmtree(path)
    except OSError as error:
        get_logger().warning("%s cannot be deleted: %s. Delete it by hand", path, error)
        return False
    return True
