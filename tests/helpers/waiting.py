"""Waiting for a condition, with a limit that holds on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_SECONDS = 120.0


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = LIMIT_SECONDS
) -> None:
    """Poll until `condition()` is true.

    Raises:
        AssertionError: it is not within `seconds`; the message names `what`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.01)
