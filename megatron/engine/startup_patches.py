"""Patches that shorten start-up by avoiding work that no run needs.

The gains in the docstrings are seconds of one process on a two-core CPU machine with
the files in the page cache (torch 2.13, DeepSpeed 0.19.8), patched against unpatched.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def freeze_gc() -> Iterator[None]:
    """Exempt existing objects from garbage collection while DeepSpeed starts.

    DeepSpeed calls `gc.collect()` before each memory figure it prints, about ten times
    per start. Gain: 0.24 s per collection, because torch's objects are not traversed.
    """
    if gc.get_freeze_count():  # frozen by the caller, who also unfreezes
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def skip_triton_probe() -> None:
    """Let DeepSpeed find Triton unavailable without importing it; for the CPU only.

    DeepSpeed's expert-parallel layer probes for Triton kernels when it is imported, and
    without a GPU it never uses them. Gain: 0.24 to 0.4 s.
    """
    if "triton" in sys.modules:
        return
    sys.modules["triton"] = None  # makes `import triton` raise ImportError
    try:
        importlib.import_module("deepspeed.ops.triton_ops._triton")
    finally:
        del sys.modules["triton"]


def skip_shm_operator() -> None:
    """Start DeepSpeed on the CPU without its operator for all-reduces in shared memory.

    DeepSpeed compiles it when torch.distributed is started, but calls it only in layers of
    its own tensor parallelism for inference. Gain: 15 s to a minute at the first start, and
    no start needs a compiler or can wait for one.
    """
    module = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without `torch.compile` on its functions.

    ZeRO imports Muon whatever the optimizer is, and `torch.compile` imports
    torch._dynamo and torch._inductor. No run uses Muon. Gain: 5 s, of which
    torch._dynamo takes 3 s.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = original


class UncompiledAdamMethods:
    """Methods of torch's Adam without the decorator for torch.compile; a mixin.

    The first call of a method with that decorator (`torch._disable_dynamo`) imports
    torch._dynamo. The functions inside the decorator give the same results. Gain: 3 s,
    provided that nothing else imports torch._dynamo.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
