"""Gate options that do not fit the number of experts are refused when flags are parsed."""

from __future__ import annotations

import pytest

from megatron.config import cli
from megatron.moe.gate import available_gates, gate_config_class

TOPK = "--topk is 9; allowed: 1 to the number of experts, which is 4"
GROUPS = "--topk is 3; allowed: 1 to the number of experts in --topk-group groups, which is 2"
SAME_WEIGHTS = "--norm-topk-prob is on with --topk 1"


def parse(gate: str, *flags: str):
    words = ["--num-experts", "4", "--gate", gate, *flags]
    return cli.parse(words, gate_config_class, available_gates)


@pytest.mark.parametrize(
    "gate, flags, message",
    [
        ("topk", "--topk 9", TOPK),
        ("topk", "--topk 1 --norm-topk-prob", SAME_WEIGHTS),
        ("threshold", "--topk 9", TOPK.replace("1 to", "0 to")),
        ("threshold", "--topk 1 --norm-topk-prob", SAME_WEIGHTS),
        ("cosine", "--topk 9", TOPK),
        ("cosine", "--topk 1 --norm-topk-prob", SAME_WEIGHTS),
        ("deepseek_v2", "--topk 9", TOPK),
        ("deepseek_v2", "--n-group 3", "--n-group is 3; allowed: a divisor of the number of"),
        ("deepseek_v3", "--topk 9", TOPK),
        ("topk", "--topk 3 --n-group 2", GROUPS),
        ("deepseek_v3", "--topk 3 --n-group 2", GROUPS),
        ("deepseek_v3", "--topk 1 --norm-topk-prob", SAME_WEIGHTS),
        ("expert_choice", "--topk 9", TOPK),
        ("remoe", "--topk 9", TOPK),
        ("tcmoe", "--topk 9", TOPK),
        ("moepp", "--topk 9", "--topk is 9; allowed: 1 to the number of choices, which is 7"),
        ("peer", "--peer-num-experts 5", "--peer-num-experts is 5; allowed: 0 or 4"),
    ],
)
def test_options_must_fit_the_experts(gate, flags, message):
    with pytest.raises(ValueError) as error:
        parse(gate, *flags.split())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("gate", available_gates())
def test_fitting_options_are_parsed(gate):
    """Also those of gates that have nothing to check."""
    assert parse(gate).moe.num_experts == 4


def test_dense_model_needs_no_fitting_options():
    for words in ([], ["--gate", "topk", "--topk", "9", "--num-experts", "0"]):
        config = cli.parse(words, gate_config_class, available_gates)
        assert config.moe.num_experts == 0 and config.gate_options["topk"] == 2
