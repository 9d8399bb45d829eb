"""Work of every rank that may take long, beside what else the ranks do, or with all of them waiting for the last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from megatron.parallel.groups import Groups, all_reduce_sum

PATIENCE_SECONDS = 1.0


class BackgroundTask:
    """Work of this rank in a thread. What goes wrong is kept, for all ranks to hear.

    Args:
        what: begins the message when it fails by a mistake of ours.
        work: what is done. Its OSError is an expected end.
    """

    def __init__(self, what: str, work: Callable[[], Any]):
        self._what, self._work, self._thread = what, work, None
        self.result: Any = None
        self.error = ""

    def start(self) -> None:
        """In a daemon thread, which does not keep a failing process alive."""
        self._thread = threading.Thread(target=self._run, name=self._what, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except OSError as error:
            self.error = str(error)
        except BaseException as error:
            self.error = f"{self._what} failed: {error!r}"
            raise

    @property
    def is_running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def running_on_any_rank(self, groups: Groups) -> bool:
        """Whether any rank's is. All ranks must ask."""
        busy = torch.tensor(float(self.is_running), device=groups.device)
        return all_reduce_sum(busy, groups).item() > 0

    def wait_for_all(self, groups: Groups) -> None:
        """Until no rank's is busy. However long that takes, no collective takes longer than a moment: a slow disk of
        one rank is not a hung one."""
        while True:
            if self._thread is not None:
                self._thread.join(PATIENCE_SECONDS)
            if not self.running_on_any_rank(groups):
                return
