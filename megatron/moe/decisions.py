"""Discrete decisions of a gate: recorded in a forward pass, repeated in its recomputation.

Activation recomputation runs a layer again during the backward pass. Its input may then
differ in the last bits, for example because other kernels or another order of a sum
computed it, and an expert that came just before the next one may come just after it. The
gradients would then belong to other experts than the output did.

So a layer records which decisions its gate took in the first forward pass, and the
recomputed pass takes the same. A decision is what a gate's formula computes from floating
point values but has no derivative: the indices of topk, sort or argmax, comparisons,
nonzero, rounding, casts to integers, the side of a relu, and numbers that Python reads
from a tensor. Whatever is differentiable, such as the values of topk or a softmax, is
computed from the values of the recomputed pass, at the recorded indices.

Both are modes of torch's dispatcher below autograd, so they see the operations inside any
gate, without its help, and autograd saves the repeated indices for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_VALUES_AND_INDEX = {
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.max.dim,
    aten.min.dim,
    aten.kthvalue.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.cummax.default,
    aten.cummin.default,
}
"""Operations that return (values, indices), where values = input.gather(dim, indices)"""

_DECIDE = "a function passed to decide"
"""Takes the place of the operation in entries of `decide`: a bound method or a lambda is
another object in each pass"""

_RELU = {aten.relu.default, aten.relu_.default}

_WITHOUT_DERIVATIVE = {
    aten.sign,
    aten.sgn,
    aten.round,
    aten.floor,
    aten.ceil,
    aten.trunc,
    aten.heaviside,
    aten.bernoulli,
    aten.sign_,
    aten.sgn_,
    aten.round_,
    aten.floor_,
    aten.ceil_,
    aten.trunc_,
    aten.heaviside_,
    aten.gt_,
    aten.ge_,
    aten.lt_,
    aten.le_,
    aten.eq_,
    aten.ne_,
}
"""Operations whose floating point output is a decision. One whose output is boolean or
integer always is"""


class DecisionRecorder(TorchDispatchMode):
    """Records the decisions of the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.entries: list[tuple[Any, tuple]] = []
        """(operation, its outputs) in order; indices in the smallest sufficient dtype"""
        self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._paused and _is_decision(func, args, out):
            self.entries.append((func, _record(func, args, kwargs or {}, out)))
        return out

    def decide(self, function: Callable, *args: Any) -> Any:
        """Call a function; its outputs are one decision, whatever runs inside."""
        self._paused = True
        try:
            with torch.no_grad():
                out = function(*args)
        finally:
            self._paused = False
        self.entries.append((_DECIDE, _copies(out)))
        return out


class DecisionRepeater(TorchDispatchMode):
    """Runs operations with the recorded decisions in place of their own.

    Args:
        entries: of a recorder; they can be repeated any number of times.
        source: name of what decides, for errors.
    """

    def __init__(self, entries: list[tuple[Any, tuple]], source: str):
        super().__init__()
        self._entries = entries
        self._source = source
        self._next = 0

    def __exit__(self, error_type, *error):
        super().__exit__(error_type, *error)
        # Checkpointing leaves a recomputed pass by an exception as soon as it has all
        # tensors.
        assert error_type is not None or self._next == len(self._entries), self._changed(
            f"it took {self._next} decisions instead of {len(self._entries)}"
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not _is_decision(func, args, out):
            return out
        return self._repeat(func, args, kwargs or {}, out, self._recorded(func))

    def decide(self, function: Callable, *args: Any) -> Any:
        """Return what `DecisionRecorder.decide` returned for this call."""
        outputs = [_copy(output) for output in self._recorded(_DECIDE)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _recorded(self, func: Any) -> tuple:
        """Return the outputs of the next decision, which this operation must take."""
        known = self._next < len(self._entries) and self._entries[self._next][0] is func
        assert known, self._changed(f"its decision {self._next} was not {func}")
        self._next += 1
        return self._entries[self._next - 1][1]

    def _repeat(self, func: Any, args: tuple, kwargs: dict, out: Any, recorded: tuple) -> Any:
        """Return an operation's output with its decision replaced by the recorded one."""
        if func in _VALUES_AND_INDEX:
            index = recorded[0].long()
            return _gather(func, args, kwargs, index), index
        if func in _RELU:
            # At least the smallest positive number where the input was positive:
            # autograd takes the derivative from the sign of the output.
            tiny = torch.finfo(out.dtype).tiny
            value = torch.where(recorded[0], out.clamp_min(tiny), 0)
            return _replace(func, out, value)
        if isinstance(out, Tensor):
            return _replace(func, out, recorded[0])
        if not isinstance(out, tuple | list):
            return recorded[0]
        same = all(map(torch.equal, filter(_is_discrete, out), recorded))
        assert same, self._changed(f"{func} has another output, which cannot be repeated")
        return out

    def _changed(self, difference: str) -> str:
        return (
            f"{self._source} routes differently when activation recomputation runs it again: "
            f"{difference}. Its forward must run the same operations in both passes"
        )


def _is_decision(func: Any, args: tuple, out: Any) -> bool:
    """Return whether an operation computes something discrete from floating point values."""
    if isinstance(out, Tensor) and not _is_discrete(out):
        return func.overloadpacket in _WITHOUT_DERIVATIVE or func in _RELU
    outputs = out if isinstance(out, tuple | list) else [out]
    if not any(map(_is_discrete, outputs)) or not _reads_floats(args):
        return False
    name = func.overloadpacket.__name__
    is_constant = name.endswith("_like") or name.startswith("new_")
    return not is_constant and not func.is_view


def _is_discrete(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, bool | int | float)


def _reads_floats(args: tuple) -> bool:
    for arg in args:
        values = arg if isinstance(arg, tuple | list) else [arg]
        if any(isinstance(value, Tensor) and not _is_discrete(value) for value in values):
            return True
    return False


def _record(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple:
    """Return copies of the discrete outputs: a gate may write to its tensors later."""
    if func in _VALUES_AND_INDEX:
        dim = _argument(func, args, kwargs, "dim")
        size = args[0].shape[dim] if args[0].dim() else 1
        return (_compact(out[1], size),)
    if func in _RELU:
        return (~(out <= 0),)  # NaN stays NaN
    if func.overloadpacket is aten.nonzero:
        return (_compact(out, max(args[0].shape, default=1)),)
    if isinstance(out, tuple | list):
        return _copies(tuple(filter(_is_discrete, out)))
    return _copies(out)


def _compact(index: Tensor, bound: int) -> Tensor:
    """Copy indices in [0, bound) in the smallest dtype that holds them."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if bound - 1 <= torch.iinfo(dtype).max:
            return index.to(dtype)
    return index.clone()


def _copies(out: Any) -> tuple:
    outputs = out if isinstance(out, tuple | list) else [out]
    return tuple(_copy(output) for output in outputs)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _gather(func: Any, args: tuple, kwargs: dict, index: Tensor) -> Tensor:
    """Return the input's values at these indices along the operation's dimension."""
    dim = _argument(func, args, kwargs, "dim")
    if index.dim() < args[0].dim():
        return args[0].gather(dim, index.unsqueeze(dim)).squeeze(dim)
    return args[0].gather(dim, index)


def _argument(func: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """Return the value of an operation's argument, or its default."""
    names = [argument.name for argument in func._schema.arguments]
    position = names.index(name)
    if position < len(args):
        return args[position]
    return kwargs.get(name, func._schema.arguments[position].default_value)


def _replace(func: Any, out: Tensor, value: Tensor) -> Tensor:
    """Return `value` in place of an output, in its memory if the operation wrote there."""
    if func._schema.is_mutable:
        return out.copy_(value)
    return value.to(out.dtype, copy=True)
