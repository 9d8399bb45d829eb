"""Building of the sample indices while all ranks wait without a time limit."""

from __future__ import annotations

from collections.abc import Callable

from megatron.parallel.background import BackgroundTask
from megatron.parallel.forked import ForkedWork
from megatron.parallel.groups import Groups


def build_on_each_node(build: Callable[[], object], groups: Groups) -> None:
    """Fill the index cache in a process of each node, and wait until all nodes are done.

    Indices of 10^9 documents take longer than a collective may. The ranks meet in a series of
    short collectives instead, which end when a rank dies. A builder that dies is noticed by the
    rank that started it, and ends with that rank. Each index is committed to the cache when it
    is finished, so that a run that is started again continues with the next one.

    Args:
        build: opens the data of the run, with indices in the cache; its result is not used.

    Raises:
        ValueError, OSError: `build` raised it on some node; then all ranks raise it.
        RuntimeError: `build` failed in another way; its process has printed the traceback.
    """

    def build_in_a_process() -> Exception | None:
        return ForkedWork("builds the sample indices", build).wait()

    task = BackgroundTask("building the sample indices", build_in_a_process)
    if groups.local_rank == 0:
        task.start()
    task.wait_for_all(groups)
    for outcome in task.outcomes(groups):
        if outcome.error:
            raise OSError(outcome.error)
        if outcome.result is not None:
            raise outcome.result
