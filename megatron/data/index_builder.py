"""Building of the sample indices while all ranks wait without a time limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.data.sampling.blend import Samples
from megatron.data.sampling.index_cache import unwritable_reason
from megatron.log import warn_on_rank0
from megatron.parallel.background import BackgroundTask
from megatron.parallel.forked import ErrorClassifier, ForkedWork
from megatron.parallel.groups import Groups, all_gather_objects

Splits = dict[str, Samples | None]


def all_can_store(folders: Sequence[str], groups: Groups) -> bool:
    """Return whether every node can write the folders of the index cache.

    Rank 0 logs a node that cannot. Of its own, `cached_arrays` warns when an index is missing,
    which a cache that is read-only but complete does not need.

    Raises:
        OSError: this process has too many open files.
    """
    reason = ""
    if groups.local_rank == 0:
        reason = next(filter(None, map(unwritable_reason, folders)), "")
    reasons = all_gather_objects(reason, groups)
    failed = [rank for rank, found in enumerate(reasons) if found]
    if failed and failed[0] != 0:
        warn_on_rank0(
            "cannot write the index cache on the node of rank %d (%s): every rank keeps the "
            "indices in its memory. Set --data-cache-path to a folder that all nodes can write",
            failed[0],
            reasons[failed[0]],
        )
    return not failed


def build_on_ranks(
    build: Callable[[], Splits], groups: Groups, takes_part: bool = True
) -> Splits | None:
    """Build in a thread of each rank, in memory, and wait until all ranks are done.

    The wait has no time limit, as in `build_on_each_node`. A thread takes part in no collective,
    but its shuffles of 10^9 elements hold the GIL for longer than other ranks may wait.

    Args:
        takes_part: whether this rank builds; it waits for those that do in any case.

    Returns:
        What `build` returned; None if this rank does not take part.

    Raises:
        ValueError, OSError: `build` raised it on this rank.
    """
    built: list[Splits] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            built.append(build())
        except (ValueError, OSError) as error:  # raised below, with its type and traceback
            errors.append(error)

    task = BackgroundTask("building the sample indices in memory", run)
    if takes_part:
        task.start()
    task.wait_for_all(groups)
    task.outcomes(groups)
    if errors:
        raise errors[0]
    return built[0] if built else None


def build_on_each_node(
    build: Callable[[], object], groups: Groups, classify: ErrorClassifier
) -> None:
    """Fill the index cache in a process of each node, and wait until all nodes are done.

    Indices of 10^9 documents take longer than a collective may. The ranks meet in a series of
    short collectives instead, which end when a rank dies. A builder that dies is noticed by the
    rank that started it, and ends with that rank. Each index is committed to the cache when it
    is finished, so that a run that is started again continues with the next one.

    Args:
        build: opens the data of the run, with indices in the cache; its result is not used.
        classify: see `ForkedWork`.

    Raises:
        ValueError, OSError: `build` raised it on some node; then all ranks raise it.
        RuntimeError: `build` has a mistake; its process has printed the traceback.
    """
    builds = groups.local_rank == 0
    # Forked before the collectives, whose threads take locks that the child would inherit.
    wait = _start_builder(build, classify) if builds else lambda: None
    task = BackgroundTask("building the sample indices", wait)
    if builds:
        task.start()
    task.wait_for_all(groups)
    for outcome in task.outcomes(groups):
        if outcome.error:
            raise OSError(outcome.error)
        if outcome.result is not None:
            raise outcome.result


def _start_builder(
    build: Callable[[], object], classify: ErrorClassifier
) -> Callable[[], Exception | None]:
    """Start the builder's process; return a function that waits for it and returns its error."""
    try:
        return ForkedWork("builds the sample indices", build, classify).wait
    except OSError as error:
        failure = error
    return lambda: failure
