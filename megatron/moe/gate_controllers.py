"""Controllers that move a setting of a gate after each step, towards a target.

`ThresholdController` holds the mean number of experts per token at a target by moving
the threshold of a top-p gate (DTop-p, Jin et al. 2025, arXiv 2512.13996). It is a
proportional-integral controller on u = logit(threshold):

    e = 1 - n / target,   u += gain * (e + (e - e') / 2)
        n: mean number of experts per token before capacity, over all MoE layers with
           the gate, ranks and micro-batches of the step
        e': the error of the step before

Departures: the paper controls the threshold itself and publishes gains for it; on the
logit one gain fits thresholds near 1, too, where a small change adds many experts. The
paper's learned normalisation of each layer's logits is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.config.needs import setting
from megatron.moe.gate_options import GateOptions, require_field
from megatron.moe.routing import StepTotals

_LARGEST_LOGIT = 15.0
"""Limit of the threshold's logit, from which it returns within some steps."""
_LARGEST_START = 5.0
"""Limit of the logit at the start: thresholds from 0.007 to 0.993."""
_PROPORTIONAL = 0.5
"""Proportional gain over integral gain."""


@dataclass(frozen=True)
class ThresholdTargetConfig(GateOptions):
    """Options of gates whose experts reach a threshold together."""

    threshold: float = 0.9
    """total probability that a token's experts must reach; with --threshold-target, at
    the start"""
    threshold_target: float = 0.0
    """mean number of experts per token towards which the threshold moves; 0: the
    threshold is constant"""
    threshold_gain: float = field(default=0.2, metadata={"needs": setting("threshold_target")})
    """speed at which the threshold follows the relative error of the mean number of
    experts per token"""

    def __post_init__(self):
        super().__post_init__()
        in_range = 0 <= self.threshold <= 1
        require_field(self, "threshold", in_range, "0 (one expert) to 1 (all of them)")
        is_reachable = self.threshold_target == 0 or self.threshold_target >= 1
        allowed = "0 (a constant threshold) or at least 1 expert per token"
        require_field(self, "threshold_target", is_reachable, allowed)
        require_field(self, "threshold_gain", self.threshold_gain > 0, "above 0")


class ThresholdController(nn.Module):
    """Keeps a threshold in fp32 buffers, which every layer holds a copy of."""

    threshold_logit: Tensor
    """Logit of the threshold: 0-d."""
    previous_error: Tensor
    """Error of the last step: 0-d."""

    def __init__(self, config: ThresholdTargetConfig):
        super().__init__()
        self.target = config.threshold_target
        self.gain = config.threshold_gain
        start = torch.tensor(config.threshold, dtype=torch.float32).logit()
        start = start.clamp(-_LARGEST_START, _LARGEST_START)
        self.register_buffer("threshold_logit", start)
        self.register_buffer("previous_error", torch.zeros(()))

    def threshold(self) -> Tensor:
        """Return the threshold: 0-d fp32 in (0, 1)."""
        return self.threshold_logit.sigmoid()

    @torch.no_grad()
    def update(self, step: StepTotals) -> None:
        """Move the threshold by the loads of all layers, so that all copies agree."""
        num_tokens = len(step.load_LE) * step.num_tokens.double()
        mean = step.load_LE.double().sum() / num_tokens.clamp_min(1)
        error = (1 - mean / self.target).float()
        change = self.gain * (error + _PROPORTIONAL * (error - self.previous_error))
        has_tokens = num_tokens > 0
        self.threshold_logit.add_(torch.where(has_tokens, change, 0))
        self.threshold_logit.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        self.previous_error.copy_(torch.where(has_tokens, error, self.previous_error))
