"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from spawn import Ranks  # noqa: E402

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def ranks1():
    pool = Ranks(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks2():
    pool = Ranks(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks4():
    pool = Ranks(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO
