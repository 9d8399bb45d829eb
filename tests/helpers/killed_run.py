"""A run that kills itself after a row of metrics, so that the place is always the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from helpers import killable, wandb_files
from helpers.waiting import wait_until


def run_until_killed(argv: list[str], iteration: int, port: int, output: str) -> None:
    """In a forked process: train until the training row of an iteration is written.

    W&B has written the row to its file by then: what a kill within a tenth of a second loses is
    not the subject here.
    """
    from megatron.training.metric_writers import MetricsWriters

    write = MetricsWriters.write
    folder = Path(argv[argv.index("--wandb-save-dir") + 1])

    def is_in_file() -> bool:
        rows = wandb_files.history(folder)
        return bool(rows) and rows[-1].get("train/iteration") == iteration

    def write_and_die(self: MetricsWriters, row: dict) -> None:
        write(self, row)
        if (row["kind"], row["iteration"]) == ("train", iteration):
            wait_until(is_in_file, f"the row of iteration {iteration} in W&B's file")
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsWriters.write = write_and_die
    killable.run(argv, 0, 1, port, output)
