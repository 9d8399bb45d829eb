"""The registry of gates: options as flags, and errors of create_gate."""

import dataclasses

import pytest
import torch

from helpers.moe_layers import D, E
from megatron.config.needs import Need
from megatron.moe.gate import (
    Gate,
    GateContext,
    available_gates,
    create_gate,
    gate_config_class,
)
from megatron.moe.routing import GateInput

ALL = available_gates()


def other_values(field):
    """Values of an option's type that are not the default, likely ones first."""
    default = field.default
    if isinstance(default, bool):
        return [not default]
    if "choices" in field.metadata:
        return [choice for choice in field.metadata["choices"] if choice != default]
    if isinstance(default, tuple):
        return [(2, 2)]
    if isinstance(default, int):
        return [default + 1, 2 * default or E]
    return [0.5 * default, default + 1] if default else [1.0, 0.25]


def flag_words(name, value):
    """One option as words of a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]


def needed_words(field, fields):
    """Flags of the gate's other options without which this option has no effect."""
    needs = field.metadata.get("needs", ())
    words = []
    for need in (needs,) if isinstance(needs, Need) else needs:
        defaults = {name: f.default for name, f in fields.items()}
        if not need.holds(defaults):
            setting = need.settings[0]
            candidates = setting.values or other_values(fields[setting.name])
            words += flag_words(setting.name, next(iter(candidates)))
    return words


IGNORED = {("threshold", "topk")}
"""Options that are accepted without effect, which test_gate_flags.py tests"""
OPTIONS = [(n, f.name) for n in ALL for f in dataclasses.fields(gate_config_class(n))]


@pytest.mark.parametrize("name, option", [o for o in OPTIONS if o not in IGNORED])
def test_every_option_is_a_flag(name, option):
    """A flag sets its option to a value other than the default and changes nothing else."""
    from megatron.config.cli import parse

    def gate_options(*flags):
        argv = ["--gate", name, "--num-experts", str(E), *flags]
        return parse(argv, gate_config_class, available_gates).gate_options[name]

    fields = {f.name: f for f in dataclasses.fields(gate_config_class(name))}
    field = fields[option]
    flags = needed_words(field, fields)
    before = gate_options(*flags)
    refusals = []
    for value in other_values(field):
        try:
            after = gate_options(*flags, *flag_words(option, value))
        except ValueError as error:
            refusals.append(error)
            continue
        assert value != before[option] and after == {**before, option: value}
        assert type(after[option]) is type(before[option])
        return
    pytest.fail(f"no value of --{option} is allowed: {refusals}")


def test_create_gate_refuses_unknown_names():
    with pytest.raises(ValueError, match="--gate is 'nope'; allowed: .*threshold.*topk"):
        create_gate("nope", hidden_size=D, num_experts=E)
    with pytest.raises(
        ValueError, match="gate 'topk' has no option 'threshold'; allowed: jitter num_null"
    ):
        create_gate("topk", hidden_size=D, num_experts=E, threshold=0.5)
    with pytest.raises(ValueError, match="num_experts is 0"):
        create_gate("topk", hidden_size=D, num_experts=0)


def test_duplicate_gate_name_is_refused():
    with pytest.raises(
        ValueError,
        match="two gates have the name 'topk': the built-in .*/topk.py, and .*/"
        "test_gate_registry.py; rename one",
    ):

        class Other(Gate, name="topk"):
            pass


def test_missing_forward_is_an_error():
    class Empty(Gate):
        Config = dict

    with pytest.raises(NotImplementedError, match="gate Empty has no forward"):
        Empty({}, GateContext(D, E))(GateInput(torch.zeros(1, D)))


@pytest.mark.parametrize("name", ["dense", "a@0", "a,b", "a.b", "", "_a"])
def test_names_that_no_flag_can_have(name):
    """A gate's name is part of --gate NAME@LAYERS and of --NAME.OPTION."""
    with pytest.raises(
        ValueError, match="gate name .*; allowed: letters, digits, _ and -, but"
    ):

        class Unnamed(Gate, name=name):
            pass
