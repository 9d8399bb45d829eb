"""Learning-rate schedule: a pure function of the iteration, so there is nothing to save
and a resumed run continues exactly."""

from __future__ import annotations

import math

from megatron.config.fields import require
from megatron.config.schema import OptimizerConfig


class LRSchedule:
    """Linear warm-up followed by a decay to the minimum learning rate.

    With w warm-up iterations, a decay that ends at iteration d (warm-up included), and
    i the 0-based index of the step about to be taken:

        i < w    lr (i + 1) / w              not i / w: no step has a rate of zero
        i < d    min + shape(p) (lr - min)   p = (i - w) / (d - w), as in Megatron
        i >= d   min                         (constant: lr)

    shape(p) is (1 + cos(pi p)) / 2 for cosine, 1 - p for linear, 1 for constant. wsd
    (warm-up, stable, decay: Hu et al. 2024, MiniCPM) holds 1 and falls to 0 over the
    last `lr_wsd_decay_fraction` of d, linearly as in Haegele et al. 2024.

    Args:
        iterations: optimizer steps of the full run.
        tokens_per_iteration: converts settings in tokens to iterations, rounding up.

    Raises:
        ValueError: the warm-up, or the warm-up and the decay of wsd together, takes
            longer than d iterations.
    """

    def __init__(
        self, optimizer: OptimizerConfig, *, iterations: int, tokens_per_iteration: int
    ):
        self.peak = optimizer.lr
        self.minimum = optimizer.min_lr
        self.style = optimizer.lr_decay_style
        self.decay_end = iterations
        if optimizer.lr_decay_iters:
            self.decay_end = optimizer.lr_decay_iters
        elif optimizer.lr_decay_tokens:
            self.decay_end = _ceil_divide(optimizer.lr_decay_tokens, tokens_per_iteration)
        self.warmup = _warmup_iterations(optimizer, iterations, tokens_per_iteration)
        require(
            self.warmup <= self.decay_end,
            "--lr-warmup-*",
            self.warmup,
            f"at most the {self.decay_end} iterations of the decay, of which it is a part",
            "Shorten it or lengthen --lr-decay-iters or the run.",
        )
        self.decay_start = self.warmup
        if self.style == "wsd":
            fraction = optimizer.lr_wsd_decay_fraction
            self.decay_start = self.decay_end - round(fraction * self.decay_end)
            require(
                self.warmup <= self.decay_start,
                "--lr-wsd-decay-fraction",
                fraction,
                f"what the {self.warmup} warm-up iterations leave of {self.decay_end}",
                "Shorten one of the two.",
            )

    def lr(self, iteration: int) -> float:
        """Return the learning rate of the step with this 0-based index."""
        if iteration < self.warmup:
            return self.peak * (iteration + 1) / self.warmup
        if self.style == "constant" or iteration < self.decay_start:
            return self.peak
        if iteration >= self.decay_end:
            return self.minimum
        p = (iteration - self.decay_start) / (self.decay_end - self.decay_start)
        if self.style == "cosine":
            shape = (1 + math.cos(math.pi * p)) / 2
        else:
            shape = 1 - p
        return self.minimum + shape * (self.peak - self.minimum)


def _warmup_iterations(
    optimizer: OptimizerConfig, iterations: int, tokens_per_iteration: int
) -> int:
    """Warm-up in iterations, from whichever of its three flags is set."""
    if optimizer.lr_warmup_iters:
        return optimizer.lr_warmup_iters
    if optimizer.lr_warmup_fraction:
        # round, not ceil: 0.07 * 100 is 7.000000000000001.
        return round(optimizer.lr_warmup_fraction * iterations)
    return _ceil_divide(optimizer.lr_warmup_tokens, tokens_per_iteration)


def _ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
