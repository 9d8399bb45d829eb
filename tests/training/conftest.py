"""Fixtures of the tests of training."""

from __future__ import annotations

import re

import pytest

from megatron import log


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that returns what was logged since, without the time of day."""
    monkeypatch.setenv("RANK", "0")
    logger = log.get_logger()
    before = (logger.level, logger.propagate, list(logger.handlers))
    log.setup()
    yield lambda: re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", capsys.readouterr().out)
    level, propagate, handlers = before
    logger.setLevel(level)
    logger.propagate = propagate
    logger.handlers = handlers
