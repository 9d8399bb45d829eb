"""Bytes of tensors that are alive, and their peak, on any device including `meta`.

The peak of a training step is measured with this on the CPU, where torch has no counterpart of
`torch.cuda.max_memory_allocated`, and predicted with it on `meta`, where the same operations run
without values. Two other ways were tried: the process's resident set also counts what the C
library keeps, and torch's profiler misses tensors that a communication thread frees, so that its
sum grows from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages of all tensors that operations return while this mode is active.

    A storage counts once, however many views it has, until its last tensor is gone. What a
    kernel allocates and frees inside one operation is not seen.

    Args:
        device: type of the device whose tensors count.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device
        self.bytes = 0
        """bytes alive now"""
        self.kept = 0
        """bytes that count in `peak_with_kept` although their tensors are gone"""
        self.peak_with_kept = 0
        """largest sum of `bytes` and `kept` since the last `reset_peak`"""
        self.peak = 0
        """most bytes alive since the start or the last `reset_peak`"""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, which may have been made while the mode was not active."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        self.peak_with_kept = max(self.peak_with_kept, self.bytes + self.kept)
        weakref.finalize(storage, self._remove, key).atexit = False

    def add_all(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors."""
        for tensor in tensors:
            self.add(tensor)

    def reset_peak(self) -> int:
        """Start a new peak at what is alive now; return the last one."""
        last = self.peak
        self.peak = self.bytes
        self.peak_with_kept = self.bytes + self.kept
        return last

    def _remove(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
