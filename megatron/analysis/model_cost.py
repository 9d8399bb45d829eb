"""What a model costs: parameters, operations, and the needs of a rank, in sections of a report.

A section computes one kind of cost. It is a dataclass with the methods of `CostSection`, so that
text, JSON and charts need to know nothing of its subject; `model_sections` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

from megatron.analysis.ceilings import Ceilings
from megatron.analysis.rank_cost import rank_cost_sections
from megatron.analysis.rank_parameters import Topology
from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.model.builder import build_run_config_model
from megatron.model.flops import ExpertUse, ModelFlops
from megatron.model.gpt import GPT
from megatron.model.meta_device import meta_device
from megatron.model.parameter_count import ParameterCount, count_parameters, parameter_table
from megatron.moe.gate_flops import Flops

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class CostSection(Protocol):
    """One kind of cost of a model."""

    @property
    def name(self) -> str:
        """Key in the JSON file."""

    @property
    def chart_title(self) -> str:
        """Title of the section's chart, with the unit."""

    def text(self) -> str:
        """Return lines for the terminal."""

    def to_dict(self) -> dict[str, Any]:
        """Return values that JSON can express, with units in their names."""

    def chart_rows(self) -> list[tuple[str, str, float]]:
        """Return the numbers of the section's chart: (part, series, value).

        A part is one row of the chart. Its series, which say what is counted, are stacked.
        """


@dataclass(frozen=True)
class ExpertAssumption:
    """How many routed experts a token is taken to have."""

    uses: tuple[ExpertUse, ...]
    """one, or those with the fewest and the most experts that the gates allow"""
    origin: str
    """where the numbers are from, for the reader"""

    @property
    def is_range(self) -> bool:
        """Whether nothing is known but the limits of the gates."""
        return len(self.uses) > 1

    @property
    def most(self) -> ExpertUse:
        """The use, or the largest one of a range."""
        return self.uses[-1]


@dataclass(frozen=True)
class AnalysedModel:
    """A model whose costs the sections compute."""

    config: RunConfig
    vocab_size: int
    """tokens of the tokenizer, before padding"""
    topology: Topology = Topology()
    """ranks that train it"""
    assumed_experts: float = 0.0
    """routed experts per token in layers whose gates leave a choice; 0: not assumed"""
    measured: ExpertUse | None = None
    """use of the experts in a run of this model; None: not measured"""
    measured_in: str = ""
    """where it was measured"""

    def check(self) -> None:
        """Check what can be wrong, before anything is measured.

        Raises:
            ValueError: see `experts`, or the flags do not fit the number of ranks.
        """
        _ = self.experts
        self.topology.groups(self.config)
        self.config.train.global_batch(self.topology.world_size)

    @cached_property
    def model(self) -> GPT:
        """The model without values."""
        with meta_device():
            return build_run_config_model(self.config, self.vocab_size)

    @cached_property
    def flops(self) -> ModelFlops:
        """Operations of the model."""
        return ModelFlops.of(self.model)

    @cached_property
    def experts(self) -> ExpertAssumption:
        """Routed experts per token: assumed, measured, or as the gates say.

        Raises:
            ValueError: more experts are assumed than a gate allows, or no gate leaves a choice.
        """
        layers = self.flops.moe_layers
        if self.assumed_experts:
            return ExpertAssumption((self._assumed_use(),), "--experts-per-token")
        # First, because a capacity drops assignments also where the gates leave no choice.
        if self.measured is not None:
            return ExpertAssumption((self.measured,), self.measured_in)
        fixed = self.flops.fixed_use()
        if fixed is not None:
            return ExpertAssumption((fixed,), "the gates leave no choice")
        uses = [[layer.fewest for layer in layers], [layer.most for layer in layers]]
        return ExpertAssumption(
            tuple(map(self.flops.use, uses)), "the fewest and the most that the gates allow"
        )

    def _assumed_use(self) -> ExpertUse:
        """Return the assumed number in layers whose gates leave a choice, else theirs."""
        layers = self.flops.moe_layers
        limits = [layer.most for layer in layers if layer.fewest < layer.most]
        allowed = "left out, because the gates of this model leave no choice"
        if limits:
            allowed = f"up to {min(limits)}, the most experts that a gate may choose"
        is_possible = bool(limits) and self.assumed_experts <= min(limits)
        require(is_possible, "--experts-per-token", self.assumed_experts, allowed)
        routed = []
        for layer in layers:
            experts = float(layer.most)
            if layer.fewest < layer.most:
                experts = self.assumed_experts
            routed.append(experts)
        return self.flops.use(routed)

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step over all ranks, after a ramp-up."""
        return self.config.train.global_batch(self.topology.world_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks, after a ramp-up."""
        return self.samples_per_step * self.config.model.seq_length

    @property
    def tokens_of_run(self) -> int:
        """Tokens of the full training, with the batch after a ramp-up; 0: no length is set."""
        length = self.config.train.length
        if length is None:
            return 0
        tokens = {
            "iterations": self.tokens_per_step,
            "samples": self.config.model.seq_length,
            "tokens": 1,
        }
        return length.total * tokens[length.unit]


@dataclass(frozen=True)
class ParameterSection:
    """Parameters by part, in total and active per token."""

    name: ClassVar[str] = "parameters"
    chart_title: ClassVar[str] = "Parameters"
    count: ParameterCount

    @staticmethod
    def of(analysed: AnalysedModel) -> ParameterSection:
        """Count the parameters; active ones for the experts that a token is taken to have."""
        experts = analysed.experts
        is_limited = experts.is_range or analysed.flops.fixed_use() is not None
        if is_limited:  # by the gates
            return ParameterSection(count_parameters(analysed.model))
        return ParameterSection(count_parameters(analysed.model, experts.most.routed))

    def text(self) -> str:
        return parameter_table(self.count)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.count)

    def chart_rows(self) -> list[tuple[str, str, float]]:
        rows = []
        for part, number in self.count.parts.items():
            active = number
            if part == "routed experts":
                active -= self.count.total - self.count.active_max
            rows.append((part, "active per token", active))
            rows.append((part, "other", number - active))
        return rows


@dataclass(frozen=True)
class FlopsSection:
    """Operations by part, forward and in training, per token and per step."""

    name: ClassVar[str] = "flops"
    chart_title: ClassVar[str] = "FLOPs per token in training"
    flops: ModelFlops
    experts: ExpertAssumption
    seq_length: int
    samples_per_step: int
    tokens_of_run: int
    """tokens of the full training; 0: not known"""

    @staticmethod
    def of(analysed: AnalysedModel) -> FlopsSection:
        """Count the operations for the experts that a token is taken to have."""
        return FlopsSection(
            analysed.flops,
            analysed.experts,
            analysed.config.model.seq_length,
            analysed.samples_per_step,
            analysed.tokens_of_run,
        )

    def text(self) -> str:
        parts = [self.flops.parts(use) for use in self.experts.uses]
        totals = [self.flops.per_token(use) for use in self.experts.uses]
        lines = [_flops_line("FLOPs per token", "forward", "training", "share")]
        for part in parts[-1]:
            rows = [of_use[part] for of_use in parts]
            if rows[-1].total:
                share = rows[-1].total / totals[-1].total
                lines.append(_flops_row(part, rows, f"{share:.1%}"))
        lines.append(_flops_row("total", totals, ""))
        lines += self._notes(totals)
        return "\n".join(lines)

    def _notes(self, totals: list[Flops]) -> list[str]:
        """Return lines on attention, experts, recomputation, and larger units of work."""
        visible = self.flops.visible_scores
        lines = [
            f"attention scores: of {self.seq_length} tokens, in full squares; their visible part "
            f"is {_flops_text([visible.forward])} forward, {_flops_text([visible.total])} in "
            "training"
        ]
        if self.flops.moe_layers:
            routed = [sum(use.routed) / len(use.routed) for use in self.experts.uses]
            numbers = " to ".join(f"{number:.4g}" for number in dict.fromkeys(routed))
            lines.append(f"routed experts per token: {numbers} ({self.experts.origin})")
        if self.flops.recomputes:
            recomputed = [self.flops.recomputed(use) for use in self.experts.uses]
            lines.append(f"recomputation: {_flops_text(recomputed)} more per token in training")
        training = [total.total for total in totals]
        step = self.samples_per_step * self.seq_length
        lines.append(
            f"step of {self.samples_per_step} samples x {self.seq_length} tokens: "
            f"{_flops_text(total * step for total in training)}"
        )
        if self.tokens_of_run:
            lines.append(
                f"run of {self.tokens_of_run} tokens: "
                f"{_flops_text(total * self.tokens_of_run for total in training)}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        uses = [self._use_dict(use) for use in self.experts.uses]
        return {
            "experts_per_token_origin": self.experts.origin,
            "seq_length": self.seq_length,
            "visible_attention_scores": asdict(self.flops.visible_scores),
            "tokens_per_step": self.samples_per_step * self.seq_length,
            "tokens_of_run": self.tokens_of_run,
            "fewest_experts": uses[0],
            "most_experts": uses[-1],
        }

    def _use_dict(self, use: ExpertUse) -> dict[str, Any]:
        parts = self.flops.parts(use)
        total = self.flops.per_token(use)
        return {
            "routed_experts_per_token_by_layer": list(use.routed),
            "forward_flops_per_token": total.forward,
            "flops_per_token": total.total,
            "recomputed_flops_per_token": self.flops.recomputed(use),
            "flops_per_step": total.total * self.samples_per_step * self.seq_length,
            "parts": {part: asdict(flops) for part, flops in parts.items()},
        }

    def chart_rows(self) -> list[tuple[str, str, float]]:
        rows = []
        for part, flops in self.flops.parts(self.experts.most).items():
            rows.append((part, "forward", flops.forward))
            rows.append((part, "backward", flops.backward))
        return rows


def model_sections(
    analysed: AnalysedModel, ceilings: Ceilings | None = None, model_only: bool = False
) -> list[CostSection]:
    """Compute the costs of a model.

    Args:
        ceilings: what the hardware of a rank reaches; None: no step time is expected.
        model_only: leave out what a rank needs, for which torch's compiler is imported.

    Raises:
        ValueError: see `AnalysedModel.check`.
    """
    sections: list[CostSection] = [ParameterSection.of(analysed), FlopsSection.of(analysed)]
    if model_only:
        return sections
    return sections + rank_cost_sections(
        analysed.config,
        analysed.vocab_size,
        analysed.topology,
        analysed.flops,
        analysed.experts.uses,
        ceilings,
    )


def report_text(sections: Sequence[CostSection]) -> str:
    """Return the sections as text, with an empty line between them."""
    return "\n\n".join(section.text() for section in sections)


def report_dict(sections: Sequence[CostSection]) -> dict[str, Any]:
    """Return the sections by their names."""
    return {section.name: section.to_dict() for section in sections}


def _flops_row(part: str, rows: list[Flops], share: str) -> str:
    forward = _flops_text(row.forward for row in rows)
    training = _flops_text(row.total for row in rows)
    return _flops_line(part, forward, training, share)


def _flops_line(part: str, forward: str, training: str, share: str) -> str:
    return f"{part:<24}{forward:>22}{training:>22}{share:>9}".rstrip()


def _flops_text(numbers: Any) -> str:
    """Format one number, or the fewest and the most, with the unit of the largest."""
    numbers = list(dict.fromkeys(numbers))
    scale, unit = next((u for u in _UNITS if numbers[-1] >= u[0]), (1.0, ""))
    text = " to ".join(f"{number / scale:.2f}" for number in numbers)
    return f"{text} {unit}".rstrip()
