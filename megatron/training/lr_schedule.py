"""The learning rate as a pure function of the iteration: nothing to save, so a resumed run continues exactly."""

from __future__ import annotations

import math

from megatron.config.schema import OptimizerConfig, require


class LRSchedule:
    """Linear warm-up, then a decay to the minimum.

    With w warm-up iterations, a decay that ends at d (warm-up is part of it) and i the 0-based index of the step about
    to be taken:

        i < w    lr (i + 1) / w             from 1, not 0: no step is spent on a learning rate of zero
        i < d    min + shape(p) (lr - min)  p = (i - w) / (d - w), as in Megatron
        i >= d   min                        (constant: lr)

    shape(p): cosine (1 + cos(pi p)) / 2; linear 1 - p; constant 1; wsd holds 1 and falls linearly to 0 over the last
    `lr_wsd_decay_fraction` of d (warm-up, stable, decay: Hu et al. 2024, MiniCPM; linear: Haegele et al. 2024).

    Args:
        iterations: optimizer steps of the whole run.
        tokens_per_iteration: turns what is given in tokens into iterations.
    Raises:
        ValueError: the warm-up (or the warm-up and wsd's decay together) is longer than the whole.
    """

    def __init__(
        self, optimizer: OptimizerConfig, *, iterations: int, tokens_per_iteration: int
    ):
        o = optimizer
        self.peak, self.minimum, self.style = o.lr, o.min_lr, o.lr_decay_style
        self.decay = (
            o.lr_decay_iters or -(-o.lr_decay_tokens // tokens_per_iteration) or iterations
        )
        self.warmup = (
            o.lr_warmup_iters
            or round(o.lr_warmup_fraction * iterations)
            or -(-o.lr_warmup_tokens // tokens_per_iteration)
        )
        require(
            self.warmup <= self.decay,
            "--lr-warmup-*",
            self.warmup,
            f"at most the {self.decay} iterations of the decay, of which it is a part",
            "Shorten it or lengthen --lr-decay-iters or the run.",
        )
        self.hold = self.warmup  # the iteration from which the rate falls
        if self.style == "wsd":
            self.hold = self.decay - round(o.lr_wsd_decay_fraction * self.decay)
            require(
                self.warmup <= self.hold,
                "--lr-wsd-decay-fraction",
                o.lr_wsd_decay_fraction,
                f"what the {self.warmup} warm-up iterations leave of {self.decay}",
                "Shorten one of the two.",
            )

    def lr(self, iteration: int) -> float:
        """Learning rate of the step with this 0-based index."""
        if iteration < self.warmup:
            return self.peak * (iteration + 1) / self.warmup
        if self.style == "constant" or iteration < self.hold:
            return self.peak
        if iteration >= self.decay:
            return self.minimum
        p = (iteration - self.hold) / (self.decay - self.hold)
        shape = (1 + math.cos(math.pi * p)) / 2 if self.style == "cosine" else 1 - p
        return self.minimum + shape * (self.peak - self.minimum)
