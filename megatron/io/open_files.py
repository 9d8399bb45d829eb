"""The limit of files that a process may have open (`ulimit -n`)."""

from __future__ import annotations

import resource

_ENOUGH = 1 << 16
"""Programs that close all possible descriptors one by one need a bound."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of this process and its children to the hard one, at most to 65,536.

    Shells often set 1,024, which sockets to hundreds of ranks and pipes to worker processes
    exceed. A higher limit is kept.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _ENOUGH
    if hard != resource.RLIM_INFINITY:
        target = min(target, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
