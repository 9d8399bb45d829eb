"""The logger: what each rank prints."""

import logging
import re

import pytest

from megatron import log


@pytest.fixture(autouse=True)
def restored():
    """Leave the loggers as other tests expect them."""
    loggers = [log.get_logger(), logging.getLogger("DeepSpeed")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_rank_0_prints_from_info_up(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    logger = log.setup()
    logger.debug("quiet")
    logger.info("loss %d", 3)
    logger.warning("careful")
    logging.getLogger("megatron.config.cli").warning("from a child")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(\d\d:\d\d:\d\d) loss 3\n\d\d:\d\d:\d\d WARNING careful\n\d\d:\d\d:\d\d WARNING from a "
                        r"child\n", out)
    assert err == ""


def test_other_ranks_print_warnings_with_their_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    logger = log.setup(logging.DEBUG)
    logger.info("quiet")
    logger.error("bad")
    assert re.fullmatch(r"\[rank 3\] \d\d:\d\d:\d\d ERROR bad\n", capsys.readouterr().out)


def test_setting_up_again_replaces(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert log.setup() is log.setup("DEBUG") is log.get_logger()
    log.get_logger().debug("once")
    assert capsys.readouterr().out.count("once") == 1


def test_each_line_is_flushed(monkeypatch):
    import io
    import sys

    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", Stream())
    monkeypatch.setenv("RANK", "0")
    log.setup().info("one")
    log.get_logger().info("two")
    assert sys.stdout.flushed == 2


def test_quiet_deepspeed():
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO)
    log.quiet_deepspeed()
    assert logger.level == logging.WARNING and not logger.isEnabledFor(logging.INFO)


def test_an_error_is_one_line_and_other_ranks_wait(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(log.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "0")
    log.report_error(ValueError("--x is 1"))
    assert capsys.readouterr().err == "error: --x is 1\n" and waits == []
    monkeypatch.setenv("RANK", "2")
    log.report_error(ValueError("--x is 1"))
    assert capsys.readouterr().err == "[rank 2] error: --x is 1\n" and waits == [3]
