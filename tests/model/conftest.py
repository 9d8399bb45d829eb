"""Fixtures for tests of the model."""

import pytest

from megatron.model import document_attention


@pytest.fixture(params=["mask", "batches"])
def document_path(request, monkeypatch):
    """Run a test with a mask of pairs of tokens and with batches of documents.

    Otherwise the length of the samples decides.
    """
    longest = {"mask": 1 << 30, "batches": 0}[request.param]
    monkeypatch.setattr(document_attention, "longest_masked", lambda dtype: longest)
    return request.param
