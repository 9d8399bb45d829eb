"""Progress reporting of long file operations."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int], object]
"""Called with the number of bytes processed since the last call, as `tqdm.update` is."""


def no_progress(count: int) -> None:
    """Ignore progress; the default of functions that take a `ProgressCallback`."""
