"""The sections of a run's configuration, built from flags and a run.json.

Options of gates may determine the experts, and settings without effect are refused or return to
their defaults, which may leave others without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.config.effect import (
    describe_dropped,
    require_effect,
    unmet_need,
    values_by_name,
    without_effect,
)
from megatron.config.expert_choice import ExpertChoice
from megatron.config.flags import EXPERT_OPTIONS, Flag, flags_of
from megatron.config.gate_choice import GateChoice, Values, choose_gates, sections_of_each_gate
from megatron.config.gate_layers import parse_gate_layers
from megatron.config.gate_overrides import apply_gate_overrides, refuse_expert_options
from megatron.config.moe import MoEConfig
from megatron.log import warn_on_rank0


@dataclass
class RunSections:
    """What a command line and a run.json set, by section."""

    classes: dict[str, type]
    """Config class of each section"""
    values: Values
    """values by section and field"""
    given: list[Flag]
    """flags on the command line"""
    shared: list[list[Flag]]
    """for each flag of several gates on the command line, their options"""
    gate: GateChoice
    experts: ExpertChoice

    def build_effective(self, gate_config: Callable[[str], type]) -> dict[str, Any]:
        """Build the sections. Values without effect are dropped, until none is left.

        Args:
            gate_config: as for `megatron.config.cli.parse`.
        Raises:
            ValueError: a section refuses its values, or a flag has no effect.
        """
        built = self._build()
        while dropped := self._drop_without_effect(built):
            if "gate" in dropped:
                self._choose_default_gate(gate_config)
            if "expert_type" in dropped:
                self.experts.reset(self.classes, self.values)
            built = self._build()
        return built

    def _choose_default_gate(self, gate_config: Callable[[str], type]) -> None:
        for section in self.gate.sections:
            del self.classes[section]
            del self.values[section]
        self.gate = choose_gates(MoEConfig.gate, {}, "", gate_config, tuple)
        self.classes |= self.gate.sections
        self.values |= {section: {} for section in self.gate.sections}

    def _build(self) -> dict[str, Any]:
        """Build the sections from their values, with those that the gates' options determine."""
        built = {}
        for section, cls in self.classes.items():
            if section != "moe":
                with self.gate.naming(section):
                    built[section] = cls(**self.values[section])
        moe = dict(self.values["moe"])
        # The flag --num-experts 0 makes the model dense, whatever the gate's options say.
        names = {flag.name for flag in self.given}
        if moe.get("num_experts") != 0 or "num_experts" not in names:
            num_layers = built["model"].num_layers
            parse_gate_layers(moe.get("gate", MoEConfig.gate)).check(num_layers)
            for name in self.gate.classes:
                options = built[self.gate.section(name)]
                apply_gate_overrides(options, moe, num_layers, name)
                refuse_expert_options(options, moe, built[EXPERT_OPTIONS], name)
        built["moe"] = MoEConfig(**moe)
        num_experts = built["moe"].num_experts
        for section in self.gate.sections:
            # The same check as in `create_gate`, before the run starts.
            if num_experts and hasattr(built[section], "check"):
                with self.gate.naming(section):
                    built[section].check(num_experts)
        return built

    def _drop_without_effect(self, built: dict[str, Any]) -> list[str]:
        """Check that flags have an effect, and drop other values that have none.

        Those are values of a run.json, flags of what other flags switch off, and options of one
        gate that a flag of several gates sets. They are removed from `values`, and named in a
        warning.

        Returns:
            The keys of the dropped fields.
        """
        seen = sections_of_each_gate(built)
        given = self._without_partial(seen)
        dropped_keys = []
        done: set[str] = set()
        for sections in seen:
            own = {section: self.classes[section] for section in sections}
            flags = [flag for section, cls in own.items() for flag in flags_of(cls, section)]
            current = values_by_name(sections)
            # A gate that was dropped takes its options along.
            require_effect([flag for flag in given if flag in flags], current, flags)
            is_set = []
            for flag in flags:
                if flag.section not in done and flag.name in self.values[flag.section]:
                    is_set.append(flag)
            dropped = without_effect(is_set, current)
            if dropped:
                warn_on_rank0(
                    "these settings have no effect in this run and return to their defaults: %s",
                    describe_dropped(dropped, current, flags),
                )
            for flag, _ in dropped:
                del self.values[flag.section][flag.name]
            dropped_keys += [flag.key for flag, _ in dropped]
            done |= own.keys()
        return dropped_keys

    def _without_partial(self, seen: list[dict[str, Any]]) -> list[Flag]:
        """Return the given flags without options whose flag has an effect only in another gate.

        Args:
            seen: sections of the run as each gate sees them.
        """
        partial = []
        for group in self.shared:
            idle = []
            for flag in group:
                for sections in seen:
                    if flag.section in sections and unmet_need(flag, values_by_name(sections)):
                        idle.append(flag)
            if len(idle) < len(group):
                partial += idle
        return [flag for flag in self.given if flag not in partial]
