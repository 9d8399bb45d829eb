"""Shortcuts through DeepSpeed's start-up, each with its measured gain."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def freeze_gc() -> Iterator[None]:
    """Garbage collections look at new objects only: DeepSpeed collects before it prints a memory figure, and each of
    those ten times all objects of torch would be looked at, for 0.2 s."""
    if gc.get_freeze_count():  # somebody else's, and not ours to undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def skip_triton_probe() -> None:
    """Have DeepSpeed find that its own Triton kernels are of no use here, as it would, but without importing Triton.

    Its expert-parallel layer asks at import, and the answer without a GPU is always no.
    """
    if "triton" in sys.modules:
        return
    sys.modules["triton"] = None  # an import of it now fails
    try:
        importlib.import_module("deepspeed.ops.triton_ops._triton")
    finally:
        del sys.modules["triton"]
