"""Backward passes without a derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order_only(backward: Callable) -> Callable:
    """Mark the backward pass of an autograd Function as not differentiable.

    With create_graph=True it raises. torch's `once_differentiable` raises only when the
    incoming gradient depends on something: for a loss such as y.sum() it returns
    gradients without a graph, and second derivatives lack what flows through them.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # Gradient mode is on in a backward pass with create_graph=True only.
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward")
            raise RuntimeError(
                f"create_graph is True and the graph contains {name.lstrip('_')}, which has no "
                "second derivative; allowed: False. Write that part of the model in plain "
                "torch operations to differentiate it twice"
            )
        return backward(ctx, *grads)

    checked.is_first_order_only = True
    return checked
