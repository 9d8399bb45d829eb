"""Waiting for conditions in tests, which have to hold on a busy machine as well."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LIMIT_SECONDS = 120.0
"""Generous: the machine may be busy."""


def wait_until(condition: Callable[[], T], what: str, limit: float = LIMIT_SECONDS) -> T:
    """Wait until `condition()` is true, and return its value.

    Args:
        what: what is waited for, for the message of a failure.
        limit: seconds after which the test fails.
    """
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {limit:.0f} s for: {what}"
        time.sleep(0.02)


def assert_stays(condition: Callable[[], object], what: str, seconds: float = 0.3) -> None:
    """Assert that `condition()` is true for some time.

    A busy machine can make this check less sharp, but it cannot make it fail.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), f"no longer true: {what}"
        time.sleep(0.02)
