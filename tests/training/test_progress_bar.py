"""The progress bar on a terminal."""

from __future__ import annotations

import sys

import pytest

from megatron import log
from megatron.training.progress_bar import ProgressBar


def test_progress_bar_needs_a_terminal(printed, capsys):
    handlers = list(log.get_logger().handlers)
    with ProgressBar(total=5) as bar:
        bar.move_to(1)
        log.get_logger().info("line")
        assert log.get_logger().handlers == handlers
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_log_lines_appear_above_the_bar(printed, monkeypatch, capsys, rank):
    handlers = list(log.get_logger().handlers)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar(total=5, initial=2, unit="samples") as bar:
        bar.move_to(3)
        log.get_logger().info("line")
        out, err = capsys.readouterr()
        assert out.endswith(" line\n")
        if rank == 0:
            # tqdm clears its line before the log line is written and redraws it
            # afterwards.
            assert "2/5" in err and "samples" in err and err.count("\r") > 2
        else:
            assert err == ""
        bar.move_to(5)
    assert "5/5" in capsys.readouterr().err or rank
    assert log.get_logger().handlers == handlers
