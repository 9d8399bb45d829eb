"""Config section `optimizer`: AdamW, the learning-rate schedule and the compute precision."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require,
    require_at_most_one,
    require_choices,
    require_each,
    require_not_negative,
    require_positive_numbers,
    require_setting,
)
from megatron.config.needs import setting

DECAY_STYLES = ("cosine", "linear", "inverse-square-root", "constant", "wsd")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
_DECAYING = tuple(style for style in DECAY_STYLES if style != "constant")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and the compute precision."""

    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = option(0.0, needs=setting("lr_decay_style", *_DECAYING))
    """learning rate at the end of the decay"""
    lr_decay_style: str = option("cosine", choices=DECAY_STYLES)
    """shape of the decay; wsd (warmup-stable-decay) holds the peak and decays during the
    last --lr-wsd-decay-fraction"""
    lr_warmup_iters: int = 0
    """length of the linear warm-up in iterations"""
    lr_warmup_samples: int = 0
    """length of the linear warm-up in samples; as in Megatron, it starts at a rate of 0"""
    lr_warmup_fraction: float = 0.0
    """length of the linear warm-up as a fraction of the decay, of which it is a part, and in
    its unit"""
    lr_warmup_tokens: int = 0
    """length of the linear warm-up in tokens"""
    lr_decay_iters: int = option(0, needs=setting("lr_decay_style", *_DECAYING))
    """iteration at which the decay ends, warm-up included; 0: the end of the run"""
    lr_decay_samples: int = option(0, needs=setting("lr_decay_style", *_DECAYING))
    """number of samples at which the decay ends, warm-up included; 0: the end of the run"""
    lr_decay_tokens: int = option(0, needs=setting("lr_decay_style", *_DECAYING))
    """number of tokens at which the decay ends, warm-up included; 0: the end of the run"""
    lr_wsd_decay_fraction: float = option(0.2, needs=setting("lr_decay_style", "wsd"))
    """fraction of the schedule, at its end, during which wsd decays"""
    lr_wsd_decay_style: str = option(
        "linear", choices=WSD_DECAY_STYLES, needs=setting("lr_decay_style", "wsd")
    )
    """shape of the decay of wsd"""
    weight_decay: float = 0.1
    """decoupled weight decay; not applied to norms, biases, embeddings and router weights"""
    adam_beta1: float = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: float = 0.95
    """decay rate of Adam's second moment"""
    adam_eps: float = 1e-8
    """Adam's epsilon"""
    clip_grad: float = 1.0
    """maximum global gradient norm; larger gradients are scaled down to it; 0: no clipping"""
    bf16: bool = False
    """compute in bfloat16 with fp32 master weights; the router stays in fp32"""
    fp16: bool = False
    """compute in float16 with dynamic loss scaling; the router stays in fp32"""
    grad_reduce_in_bf16: bool = option(False, needs=setting("bf16"))
    """reduce gradients over ranks in bfloat16, those of the router too, which
    halves the bytes and rounds each sum; default: in fp32"""

    def __post_init__(self):
        require_choices(self)
        require_positive_numbers(self, "lr", "adam_eps")
        require_setting(
            self, "min_lr", 0 <= self.min_lr <= self.lr, f"0 to --lr, which is {self.lr}"
        )
        require_not_negative(
            self,
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_warmup_tokens",
            "lr_decay_iters",
            "lr_decay_samples",
            "lr_decay_tokens",
            "weight_decay",
            "clip_grad",
        )
        fractions = ("lr_warmup_fraction", "lr_wsd_decay_fraction")
        require_each(self, fractions, lambda value: 0 <= value <= 1, "0 to 1")
        betas = ("adam_beta1", "adam_beta2")
        require_each(self, betas, lambda value: 0 <= value < 1, "0 <= beta < 1")
        self._check_exclusive_flags()

    def _check_exclusive_flags(self) -> None:
        """Raise ValueError if more than one of several alternatives is set."""
        warmups = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens")
        used = [name for name in (*warmups, "lr_warmup_fraction") if getattr(self, name)]
        require(
            len(used) <= 1, "--lr-warmup-*", used, "one of iters, samples, tokens, fraction"
        )
        require_at_most_one(self, "lr_decay_iters", "lr_decay_samples", "lr_decay_tokens")
        require_setting(
            self,
            "fp16",
            not (self.bf16 and self.fp16),
            "only without --bf16",
            "Use one of the two.",
        )

    @property
    def precision(self) -> str:
        """Compute precision: "fp32", "bf16" or "fp16"."""
        if self.bf16:
            return "bf16"
        if self.fp16:
            return "fp16"
        return "fp32"
