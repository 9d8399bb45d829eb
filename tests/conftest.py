"""Fixtures and settings shared by all tests.

Property tests (hypothesis) repeat the same examples in every run, so that `make test`
draws no random numbers of its own. `make test-slow` sets HYPOTHESIS_PROFILE=random, which
draws new examples and prints how to repeat a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not torch.cuda.is_available():
    # Set before any module imports triton, as transformers does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored, and the programs under test
    # would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test's own `@settings(max_examples=...)` keeps what its profile says about the rest.
settings.register_profile("derandomized", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "derandomized"))

from helpers import runs  # noqa: E402
from helpers.spawn import Ranks  # noqa: E402

REPO = Path(__file__).resolve().parents[1]


# Files with few, long tests run first; otherwise one of two workers would run them last, alone.
LONG = (
    "tests/faults/",
    "tests/multinode/",
    "tests/test_",
    "tests/training/",
    "tests/checkpoint/",
    "tests/engine/test_moe_adapter.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Give every test the same random numbers, also where it draws from the global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restored_environment():
    """Undo what a test changes in os.environ, also what the code under test sets there.

    A TORCH_EXTENSIONS_DIR left behind made later tests compile operators again.
    """
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two test processes share two cores; more threads than cores wait for each other."""
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Write a .bin/.idx pair of 60 documents of bytes, which a tiny model can learn.

    Returns its prefix.
    """
    from megatron.config.schema import TokenizerConfig
    from megatron.data.indexed.writer import IndexedWriter
    from megatron.tokenizer.build import build_tokenizer

    prefix = str(tmp_path_factory.mktemp("data") / "tiny_text_document")
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
    with IndexedWriter(prefix, np.uint16) as writer:
        for i in range(60):
            text = f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (
                4 + i % 5
            )
            writer.add_document(np.append(tokenizer.encode(text), tokenizer.eod))
        writer.finish(
            {
                "tokenizer": tokenizer.name,
                "vocab_hash": tokenizer.fingerprint,
                "eod": tokenizer.eod,
            }
        )
    return prefix


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory, ranks2) -> Path:
    """Train 20 iterations on two ranks that share the experts; returns the output folder."""
    out = tmp_path_factory.mktemp("finished")
    ranks2.run(runs.train, runs.flags(data, out, 20, *runs.EP2), timeout=300)
    return out
