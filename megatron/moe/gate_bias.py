"""Expert biases: they change which experts are selected, and not how much they weigh.

    b_e: an fp32 buffer without gradient, one per routed expert, 0 at the start
    experts are selected by s + b (bias_on score) or by z + b (bias_on logit)
    weights use the scores s without b

A rule updates b once per optimizer step, from counts of all ranks and micro-batches:

    none   there is no bias, and no buffer
    sign   b_e += bias_update_speed * sign(mean(c) - c_e), c_e: assignments to e before
           capacity (auxiliary-loss-free load balancing, Wang et al. 2024; DeepSeek-V3).
           With speed 0 a bias keeps its values, which are 0 in a new run.
    quantile  quantile balancing (Kimi K3): b_e = the k/E-quantile of r_:e over the
           step's tokens, then b -= mean(b), with
           r_te = a_t - s_te, a_t: the (k+1)-th largest s_t + b
           r_te is the bias from which on e is among the k best of t, so a share k/E of
           the tokens would choose e against the others as they were. Meant for balance
           without an auxiliary loss.

The quantile comes from a histogram over [min b - 1, max b + 1] (`quantile_histogram`),
which contains all r of sigmoid and softmax scores; with other scores, or logits, the
biases move by 1 per step towards a quantile outside. A bin is 0.002 wide or more. The
softmax scores of many experts differ by less: with them, use bias_on logit.

A new rule is a subclass of `BiasRule` in `BIAS_RULES`. One that needs more than the
loads returns what it counts in a forward pass from `step_sums`.

Shape suffixes: T tokens, E experts, k experts per token, K = k + 1, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.config.needs import setting
from megatron.moe.gate import Gate, GateContext
from megatron.moe.gate_options import GateOptions, require_choice, require_field
from megatron.moe.quantile_histogram import histogram, quantile
from megatron.moe.routing import StepTotals


class BiasRule:
    """An update of expert biases, once per optimizer step."""

    def step_sums(self, config: Any, bias_E: Tensor, score_TE: Tensor) -> dict[str, Tensor]:
        """Return what `update` needs of a forward pass besides the loads.

        Args:
            config: options of the gate.
            score_TE: detached fp32 scores, or logits with bias_on logit, without bias.
        Returns:
            Sums over this rank's tokens, which `update` finds in `step.step_sums`.
        """
        return {}

    def update(self, config: Any, bias_E: Tensor, step: StepTotals) -> None:
        """Change `bias_E` in place.

        Args:
            config: options of the gate.
        """
        raise NotImplementedError(f"bias rule {type(self).__name__} has no update")


class SignRule(BiasRule):
    """Raises the bias of underloaded experts and lowers that of overloaded ones."""

    def update(self, config: Any, bias_E: Tensor, step: StepTotals) -> None:
        # fp64: the mean of equal loads must be exactly their value, so that no bias
        # changes.
        load_E = step.load_E.double()
        direction_E = (load_E.mean() - load_E).sign().float()
        bias_E.add_(direction_E, alpha=config.bias_update_speed)


class QuantileRule(BiasRule):
    """Solves for the biases at which every expert is chosen by its share of the tokens."""

    def step_sums(self, config: Any, bias_E: Tensor, score_TE: Tensor) -> dict[str, Tensor]:
        if config.topk == len(bias_E):
            return {}  # No expert is left out: the bias has no effect.
        best_TK = (score_TE + bias_E).topk(config.topk + 1, dim=-1).values
        required_TE = best_TK[:, -1:] - score_TE
        return {"required_bias_counts": histogram(required_TE, *_quantile_range(bias_E))}

    def update(self, config: Any, bias_E: Tensor, step: StepTotals) -> None:
        if config.topk == len(bias_E):
            return
        counts_EB = step.step_sums["required_bias_counts"]
        share = config.topk / len(bias_E)
        solved_E = quantile(counts_EB, *_quantile_range(bias_E), share)
        solved_E = solved_E - solved_E.mean()
        bias_E.copy_(torch.where(step.num_tokens > 0, solved_E, bias_E.double()))


def _quantile_range(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of the histograms, which all ranks know from the biases."""
    return (bias_E.min() - 1).expand_as(bias_E), (bias_E.max() + 1).expand_as(bias_E)


BIAS_RULES: dict[str, BiasRule | None] = {
    "none": None,
    "sign": SignRule(),
    "quantile": QuantileRule(),
}
_HAS_BIAS = setting("bias_rule", *(name for name, rule in BIAS_RULES.items() if rule))


@dataclass(frozen=True)
class BiasConfig(GateOptions):
    """Options of gates with a bias per expert."""

    bias_rule: str = field(default="none", metadata={"choices": tuple(BIAS_RULES)})
    """update of the expert biases, by which experts are selected, after each optimizer
    step: none, there are no biases; sign, by --bias-update-speed towards equal loads;
    quantile, to the solution for equal loads of the step's tokens (quantile balancing)"""
    bias_update_speed: float = field(
        default=1e-3, metadata={"needs": setting("bias_rule", "sign")}
    )
    """amount by which an expert's bias changes after each optimizer step; 0: biases keep
    their values"""
    bias_on: str = field(
        default="score", metadata={"choices": ("score", "logit"), "needs": _HAS_BIAS}
    )
    """what the bias is added to for the selection: scores or logits"""

    def __post_init__(self):
        super().__post_init__()
        require_choice(self, "bias_rule", BIAS_RULES)
        require_choice(self, "bias_on", ("score", "logit"))
        require_field(self, "bias_update_speed", self.bias_update_speed >= 0, "0 or more")


class BiasedGate(Gate):
    """Base class of gates whose Config is a `BiasConfig`."""

    expert_bias: Tensor | None
    """Bias [E] in fp32 that is added for selection only; None with bias_rule none."""

    def __init__(self, config: Any, context: GateContext):
        super().__init__(config, context)
        self.bias_rule = BIAS_RULES[config.bias_rule]
        bias_E = None
        if self.bias_rule is not None:
            bias_E = torch.zeros(self.num_experts)
        self.register_buffer("expert_bias", bias_E)

    @property
    def has_state(self) -> bool:
        """Whether `post_optimizer_step` has something to do."""
        return self.bias_rule is not None

    def biased_scores(self, logits_TE: Tensor, score_TE: Tensor) -> Tensor:
        """Return the detached values by which experts are selected."""
        return self._unbiased_scores(logits_TE, score_TE) + self.expert_bias

    def bias_step_sums(self, logits_TE: Tensor, score_TE: Tensor) -> dict[str, Tensor]:
        """Return what the rule counts in a forward pass in training."""
        if not self.training:
            return {}
        unbiased_TE = self._unbiased_scores(logits_TE, score_TE)
        # One decision: recomputation would otherwise keep the bin of each score.
        return self.decide(self.bias_rule.step_sums, self.config, self.expert_bias, unbiased_TE)

    def _unbiased_scores(self, logits_TE: Tensor, score_TE: Tensor) -> Tensor:
        if self.config.bias_on == "logit":
            return logits_TE.detach()
        return score_TE.detach()

    def bias_metric_means(self, expert_Tk: Tensor, highest_Tk: Tensor) -> dict[str, Tensor]:
        """Return the effect of the bias on the selection, for `Routing.metric_means`.

        Args:
            expert_Tk: selected experts.
            highest_Tk: experts with the highest scores without bias.
        """
        changed_Tk = (expert_Tk[:, :, None] != highest_Tk[:, None]).all(-1)
        return {
            # Fraction of the assignments that are not among the token's k highest
            # scores.
            "bias_changed_fraction": changed_Tk.sum() / max(1, changed_Tk.numel()),
            "expert_bias_max_minus_min": self.expert_bias.amax() - self.expert_bias.amin(),
        }

    def state_metrics(self) -> dict[str, Tensor]:
        if self.expert_bias is None:
            return {}
        return {"expert_bias": self.expert_bias}

    def post_optimizer_step(self, step: StepTotals) -> None:
        """Update the expert biases by the rule."""
        if self.bias_rule is not None:
            self.bias_rule.update(self.config, self.expert_bias, step)
