"""What the time up to the first step goes to."""

from __future__ import annotations

import time

from megatron.log import get_logger


class StartupTimer:
    """The stages from the start of the process to the end of the first step, in seconds.

    Args:
        since: when the first stage began, as `time.time`; None: now.
    """

    def __init__(self, since: float | None = None):
        self._last = time.time() if since is None else since
        self._seconds: dict[str, float] = {}
        self._said = False

    def mark(self, stage: str) -> None:
        """A stage ends here, and the next one begins."""
        now = time.time()
        self._seconds[stage], self._last = now - self._last, now

    def end(self, stage: str) -> None:
        """The last stage ends, and all are logged; later calls do nothing."""
        if self._said:
            return
        self.mark(stage)
        self._said = True
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._seconds.items())
        get_logger().info("start-up: %.2f s: %s", sum(self._seconds.values()), stages)
