"""Caching allocator for large CPU tensors: reusing pages avoids page faults.

The C library maps every block above 32 MB separately and unmaps it when it is freed, so
each use of a large tensor starts with a page fault per 4 KB, which costs more than the
writes: on a 2-core machine a gather of 128 MB took 54 ms into a new tensor and 9 to 13
ms into a reused one. CUDA tensors have torch's caching allocator; this is the same idea
for the CPU.

The alternative, mallopt(M_MMAP_MAX, 0) with a high M_TRIM_THRESHOLD, makes a training step
equally fast, but fragments the heap when sizes vary from step to step, as they do with a
threshold gate: the process grows. `python benchmarks/host_allocator.py` compares the two.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MIN_CACHED_BYTES = 2**20
"""Size below which the C library itself reuses freed memory."""
_ALIGNMENT = 64
"""Alignment of tensors in bytes: a cache line."""
_idle: list[np.ndarray] = []
_lock = threading.Lock()


def empty_cached(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor like torch.empty, in reused memory if possible.

    The memory becomes idle, and available to a tensor of similar size, once nothing
    refers to it any more.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if device.type != "cpu" or size < _MIN_CACHED_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    block = _take_block(size)
    start = -block.ctypes.data % _ALIGNMENT
    view = block[start : start + size]
    # The tensor's storage owns the view; when it is freed, the block is idle again.
    # list.append is atomic and needs no lock.
    weakref.finalize(view, _idle.append, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(tuple(shape))


def idle_bytes() -> int:
    """Return the number of bytes that are cached for later tensors."""
    return sum(block.nbytes for block in _idle)


def release_idle() -> None:
    """Return all idle memory to the operating system."""
    with _lock:
        _idle.clear()


def _take_block(size: int) -> np.ndarray:
    """Return the smallest idle block of up to twice the size, or a new one.

    A new block replaces as much idle memory, so that the cache does not grow without
    bound.
    """
    with _lock:
        fitting = []
        for position, block in enumerate(_idle):
            if size + _ALIGNMENT <= block.nbytes <= 2 * size:
                fitting.append((block.nbytes, position))
        if fitting:
            _, position = min(fitting)
            return _idle.pop(position)
        # An eighth more, because the next tensor may be slightly larger: the number of
        # assignments varies from step to step.
        block = np.empty(size + size // 8 + _ALIGNMENT, dtype=np.uint8)
        freed = 0
        while _idle and freed < block.nbytes:
            freed += _idle.pop(0).nbytes
        return block
