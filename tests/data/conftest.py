"""Fixtures of the tests of preprocessing."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.corpora import corpus, job
from megatron.data.ingest import encode as encode_module
from megatron.data.ingest.encode import EncoderPool
from megatron.data.ingest.preprocess import preprocess


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Start the workers without waiting, and leave the first chunks to them."""
    monkeypatch.setattr(encode_module, "ALONE_SECONDS", 0)
    real = EncoderPool._submit

    def wait(self, chunk):
        future = real(self, chunk)
        return future if chunk else future.result() or future

    monkeypatch.setattr(EncoderPool, "_submit", wait)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> tuple[list[str], Path]:
    """(names of the files, prefix of what they become in one piece): with unusable records, which are skipped."""
    folder = tmp_path_factory.mktemp("bad")
    names = corpus(folder / "in", bad=True)
    preprocess(job(names, folder / "whole", skip_errors=True))
    return names, folder / "whole"
