"""Times the stages of a run's start, up to the end of the first step."""

from __future__ import annotations

import time

from megatron.log import get_logger


class StartupTimer:
    """Wall-clock seconds of each stage of the start, logged once in one line.

    Args:
        since: start of the first stage, as `time.time`; None: now.
    """

    def __init__(self, since: float | None = None):
        self._stage_start = time.time() if since is None else since
        self._seconds: dict[str, float] = {}
        self._logged = False

    def mark(self, stage: str) -> None:
        """End the stage with this name and begin the next one."""
        now = time.time()
        self._seconds[stage] = now - self._stage_start
        self._stage_start = now

    def end(self, stage: str) -> None:
        """End the last stage and log all of them; later calls do nothing."""
        if self._logged:
            return
        self.mark(stage)
        self._logged = True
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._seconds.items())
        get_logger().info("start-up: %.2f s: %s", sum(self._seconds.values()), stages)
