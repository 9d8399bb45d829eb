"""Fixtures for the tests of preprocessing."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.corpora import preprocess_config, write_corpus
from megatron.data.ingest import encoder_pool
from megatron.data.ingest.encoder_pool import EncoderPool
from megatron.data.ingest.preprocess import preprocess


@pytest.fixture
def start_workers_first(monkeypatch) -> None:
    """Start the workers at the first chunk, and wait until one is ready to encode it."""
    monkeypatch.setattr(encoder_pool, "_START_WORKERS_SECONDS", 0)
    submit = EncoderPool._submit

    def submit_and_wait(self, chunk):
        future = submit(self, chunk)
        if chunk is None:
            future.result()
        return future

    monkeypatch.setattr(EncoderPool, "_submit", submit_and_wait)


@pytest.fixture(scope="module")
def bad_corpus(tmp_path_factory) -> tuple[list[str], Path]:
    """A corpus with unusable records: (paths, prefix of the output of an uninterrupted run)."""
    folder = tmp_path_factory.mktemp("bad")
    names = write_corpus(folder / "in", bad=True)
    preprocess(preprocess_config(names, folder / "reference", skip_errors=True))
    return names, folder / "reference"
