"""Gate options that do not fit the number of experts are refused when flags are parsed."""

from __future__ import annotations

import json

import pytest

from megatron.config import cli
from megatron.config.format_version import FORMAT_VERSION
from megatron.moe.gate import available_gates, gate_config_class

TOPK = "--topk is 9; allowed: 1 to the number of experts, which is 4"
GROUPS = "--topk is 3; allowed: 1 to the number of experts in --topk-group groups, which is 2"
CAP = "--threshold-max-experts is 9; allowed: 0 (no cap) to the number of experts, which is 4"
SAME_WEIGHTS = "--norm-topk-prob is on with --topk 1"


def parse(gate: str, *flags: str):
    words = ["--num-experts", "4", "--gate", gate, *flags]
    return cli.parse(words, gate_config_class, available_gates)


@pytest.mark.parametrize(
    "gate, flags, message",
    [
        ("topk", "--topk 9", TOPK),
        ("topk", "--topk 1 --norm-topk-prob", SAME_WEIGHTS),
        ("threshold", "--threshold-max-experts 9", CAP),
        (
            "threshold",
            "--threshold-max-experts 1 --norm-topk-prob",
            "--norm-topk-prob is on with --threshold-max-experts 1",
        ),
        ("threshold", "--topk -1", "--topk is -1; allowed: 0 or more, without effect"),
        ("threshold", "--topk abc", "--topk is 'abc'; allowed: an integer"),
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
        assert config.moe.num_experts == 0 and config.gate_options["topk"]["topk"] == 2


@pytest.mark.parametrize("source", ["flag", "alias", "run.json", "flag and run.json"])
@pytest.mark.parametrize("topk", ["8", "1", "99"])
def test_topk_of_threshold_is_ignored(topk, source, tmp_path, caplog):
    """As in XMoE, whatever its value: one line says so, and the run is that without it."""
    words = ["--threshold", "0.7"]
    gate = ["--gate", "threshold"]
    if source == "alias":
        gate = ["--use-threshold"]
    if "flag" in source or source == "alias":
        words += ["--topk", topk]
    if "run.json" in source:
        path = tmp_path / "run.json"
        content = {
            "version": FORMAT_VERSION,
            "moe": {"gate": "threshold", "num_experts": 4},
            "gate_options": {"threshold": {"topk": int(topk)}},
        }
        path.write_text(json.dumps(content))
        words += ["--config", str(path)]
        gate = []
    got = cli.parse(["--num-experts", "4", *gate, *words], gate_config_class, available_gates)
    assert caplog.messages == [
        "these settings have no effect in this run and return to their defaults: "
        f"--topk is {topk} (only with another --gate: see --threshold-max-experts)"
    ]
    assert got == parse("threshold", "--threshold", "0.7")
