"""Large CPU tensors from memory that is used again: fresh pages cost more than what is written into them.

The C library maps every block above 32 MB anew and gives it back when it is freed, so that each use of a large tensor
begins with a page fault per 4 KB: on a 2-core machine a gather of 128 MB took 54 ms into a new tensor and 9 to 13 ms
into one that was there. CUDA tensors have torch's caching allocator; this is the same idea for the CPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**20
"""bytes; below, the C library keeps freed memory by itself"""
ALIGNMENT = 64
_idle: list[np.ndarray] = []
_lock = threading.Lock()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor as from torch.empty; when nothing refers to its memory any more, that is kept for the
    next one of about its size."""
    numbers = int(np.prod(shape, dtype=np.int64))
    size = numbers * dtype.itemsize
    if device.type != "cpu" or size < SMALLEST:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    block = _take(size)
    start = -block.ctypes.data % ALIGNMENT
    view = block[start : start + size]
    # The tensor's storage holds the view, and with its end the block is idle again. (list.append needs no lock.)
    weakref.finalize(view, _idle.append, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(tuple(shape))


def idle_bytes() -> int:
    """What is kept for later."""
    return sum(block.nbytes for block in _idle)


def release() -> None:
    """Give all idle memory back to the system."""
    with _lock:
        _idle.clear()


def _take(size: int) -> np.ndarray:
    """The smallest idle block that fits and is not twice too large, or a new one in place of as much idle memory."""
    with _lock:
        fits = [
            i for i, block in enumerate(_idle) if size + ALIGNMENT <= block.nbytes <= 2 * size
        ]
        if fits:
            return _idle.pop(min(fits, key=lambda i: _idle[i].nbytes))
        # An eighth to spare, for the next tensor may be a little larger: how many rows a gate chooses varies.
        block = np.empty(size + size // 8 + ALIGNMENT, dtype=np.uint8)
        freed = 0
        while _idle and freed < block.nbytes:
            freed += _idle.pop(0).nbytes
        return block
