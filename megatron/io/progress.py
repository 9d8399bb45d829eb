"""Progress reporting of long file operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

ProgressCallback = Callable[[int], object]
"""Called with the number of bytes processed since the last call, as `tqdm.update` is."""


def no_progress(count: int) -> None:
    """Ignore progress; the default of functions that take a `ProgressCallback`."""


def byte_progress_bar(label: str = "", total: int | None = None) -> tqdm:
    """Return a progress bar in bytes, shown only on a terminal.

    Args:
        label: shown before the bar.
        total: number of bytes; None: not known yet, see `tqdm.reset`.
    """
    from tqdm import tqdm

    is_hidden = not sys.stderr.isatty()
    return tqdm(desc=label or None, total=total, unit="B", unit_scale=True, disable=is_hidden)
