"""Building modules without values, to know their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_device() -> Iterator[None]:
    """Create the modules and tensors of this context on `meta`, where they take no memory."""
    with torch.device("meta"), _SkipInitialization():
        yield


class _SkipInitialization(TorchFunctionMode):
    """Leaves out random initialization, which has no effect on `meta`.

    torch implements it there in Python and imports its compiler for that, which takes as long
    as importing torch: tools/analyze_model.py took 5.0 s instead of 2.7 s.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        in_nn_init = getattr(func, "__module__", "") == "torch.nn.init"
        if in_nn_init or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
