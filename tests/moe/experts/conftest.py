"""Fixtures for tests of the experts' Triton kernels."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def checked_memory():
    """Check in the interpreter that loads and stores stay within the kernel's arguments.

    The interpreter's copies of the arguments are disabled, because some are of 4 GB and
    all are on the CPU already. Compiled kernels are not checked.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    spans = []
    init_args = interpreter.GridExecutor._init_args_hst
    load = interpreter._interpreter.load
    store = interpreter._interpreter.store

    def record(self, args, kwargs):
        spans.clear()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor):
                memory = argument.untyped_storage()
                spans.append((memory.data_ptr(), memory.data_ptr() + memory.nbytes()))
        return init_args(self, args, kwargs)

    def check(addresses, size):
        inside = [(addresses >= first) & (addresses + size <= last) for first, last in spans]
        assert sum(inside).all(), "outside of the arguments' memory"

    def checked_load(addresses, mask, other, dtype):
        check(addresses[mask], dtype.itemsize)
        return load(addresses, mask, other, dtype)

    def checked_store(addresses, values, mask):
        check(addresses[mask], values.itemsize)
        return store(addresses, values, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", record)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        patch.setattr(interpreter._interpreter, "load", checked_load)
        patch.setattr(interpreter._interpreter, "store", checked_store)
        yield
