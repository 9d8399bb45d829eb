"""A gate per layer: the grammar of --gate, options of one gate, and what is refused."""

from __future__ import annotations

import pytest

from helpers.fake_gates import run_json
from megatron.config import cli
from megatron.config.gate_layers import per_layer_text, with_known_names
from megatron.config.run_json import read_run_json, write_run_json
from megatron.moe.gate import available_gates, gate_config_class

BASE = ("--num-experts", "8", "--num-layers", "4", "--mock-data", "--vocab-size", "99")


def parse(*words: str):
    return cli.parse([*BASE, *words], gate_config_class, available_gates)


@pytest.mark.parametrize(
    "text, gates",
    [
        ("topk", ["topk"] * 4),
        ("topk@0-", ["topk"] * 4),
        ("hash@0-1,deepseek_v3@2-", ["hash", "hash", "deepseek_v3", "deepseek_v3"]),
        ("deepseek-v3@2-3,hash@0-1", ["hash", "hash", "deepseek_v3", "deepseek_v3"]),
        ("dense@0, topk@1+3, hash@2", [None, "topk", "hash", "topk"]),
        ("topk@0,hash@1-2,topk@3-", ["topk", "hash", "hash", "topk"]),
    ],
)
def test_every_layer_has_its_gate(text, gates):
    config = parse("--gate", text)
    assert config.moe.gates(4) == gates
    assert set(config.gate_options) == set(gates) - {None}
    assert parse("--gate", per_layer_text(gates)).moe.gates(4) == gates


def test_names_are_those_of_the_gates():
    """Hyphens and underscores are the same, and an exact name takes precedence."""
    known = ("a_b", "c-d", "c_d")
    assert with_known_names("a-b@0,c-d@1,c_d@2,x-y@3", known) == "a_b@0,c-d@1,c_d@2,x-y@3"
    assert with_known_names("a-b", known) == "a_b"
    assert parse("--gate", "deepseek-v3").moe.gate == "deepseek_v3"


def test_flag_of_one_gate_precedes_the_shared_one():
    words = ("--gate", "topk@0,deepseek_v3@1-2,hash@3", "--topk", "4", "--deepseek_v3.topk=3")
    options = parse(*words, "--deepseek-v3.no-norm-topk-prob").gate_options
    assert (options["topk"]["topk"], options["deepseek_v3"]["topk"]) == (4, 3)
    assert options["deepseek_v3"]["norm_topk_prob"] is False
    assert options["hash"]["topk"] == 4
    assert parse("--topk.topk", "3", "--topk", "2").gate_options["topk"]["topk"] == 3


def test_flags_and_run_json_round_trip(tmp_path):
    words = (
        "--gate",
        "dense@0,topk@1,deepseek_v3@2-",
        "--topk",
        "4",
        "--deepseek_v3.topk",
        "3",
    )
    config = parse(*words)
    assert cli.parse(cli.to_flags(config, gate_config_class), gate_config_class) == config
    path = tmp_path / "run.json"
    write_run_json(config, path)
    assert read_run_json(path) == config
    assert cli.parse(["--config", str(path)], gate_config_class, available_gates) == config


def test_options_of_a_gate_that_stays_are_kept(tmp_path, caplog):
    stored = {
        "version": 3,
        "moe": {"num_experts": 8, "gate": "topk", "expert_interval": 2},
        "gate_options": {"topk": {"topk": 5}},
    }
    path = run_json(tmp_path, stored)
    config = parse("--config", path, "--gate", "topk@0,hash@1-")
    assert config.gate_options["topk"]["topk"] == 5
    assert caplog.messages == [f"--gate topk@0,hash@1- replaces --expert-interval of {path}"]
    caplog.clear()
    config = parse("--config", path, "--gate", "hash@0,cosine@1-")
    assert any("the gate options stored there are dropped" in text for text in caplog.messages)
    with pytest.raises(ValueError, match="has options of 'hash'; allowed: those of the gates"):
        parse("--config", run_json(tmp_path, {**stored, "gate_options": {"hash": {"x": 1}}}))


def test_single_gate_says_that_dense_layers_are_replaced(tmp_path, caplog):
    path = tmp_path / "run.json"
    write_run_json(parse("--gate", "dense@0,topk@1-", "--topk", "3"), path)
    config = parse("--config", str(path), "--gate", "topk")
    assert config.gate_options["topk"]["topk"] == 3
    assert config.moe.gates(4) == ["topk"] * 4
    assert caplog.messages == [
        f"--gate topk replaces dense@0,topk@1- of {path}, which made layers dense"
    ]


def test_shared_flag_without_effect_in_one_gate(caplog):
    """It is reset there with a warning, and is no error."""
    words = ("--gate", "topk@0,cosine@1-", "--moe-balance-scope", "sequence")
    options = parse(*words, "--topk.moe-loss-coeff", "0").gate_options
    assert options["topk"]["balance_scope"] == "micro-batch"
    assert options["cosine"]["balance_scope"] == "sequence"
    assert "--topk.moe-balance-scope is 'sequence'" in caplog.messages[0]


@pytest.mark.parametrize(
    "gate, words, message",
    [
        ("nope@0-", "", "--gate is 'nope'; allowed: "),
        ("hash@0-2,topk@2-", "", "Block 2 is in hash@0-2 and in topk@2-"),
        ("hash@0-1", "", "Block 2 is missing; add it to a gate or to dense@2"),
        ("hash@0-4", "", "Block 4 of hash@0-4 is beyond --num-layers 4"),
        ("hash@0-3,topk@4-", "", "Block 4 of topk@4- is beyond --num-layers 4"),
        ("dense@0-", "", "allowed: at least one layer with a gate"),
        ("hash@2-1", "", "The range 2-1 of hash ends before it begins"),
        ("hash@", "", "The entry 'hash@' has no layers"),
        ("hash,topk", "", "The entry 'hash' has no layers"),
        ("@0", "", "The entry '@0' has no valid name"),
        ("hash@0+", "", "'' of hash is no number or range of layers"),
        ("hash@x", "", "'x' of hash is no number or range of layers"),
        ("hash@0,topk@1-", "--hash.nope 3", "the gate hash has no option nope"),
        ("hash@0,topk@1-", "--cosine.topk 3", "belongs to the gate cosine, which no layer"),
        ("hash@0,topk@1-", "--x.topk 3", "x is no gate; allowed before the dot: hash topk"),
        ("hash@0,topk@1-", "--threshold 0.5", "but the gates are hash topk; leave"),
        ("hash@0,topk@1-", "--topk.topk 9", "gate topk: --topk is 9; allowed: 1 to"),
        ("cosine@0,topk@1-", "--jitter x", "--jitter for gate topk is 'x'; allowed: a finite"),
        ("hash@0,topk@1-", "--topk.jitter 9", "gate topk: --jitter is 9.0; allowed"),
        ("hash@0,topk@1-", "--expert-interval 2", "--expert-interval is 2; allowed: left out"),
        ("hash@0,topk@1-", "--moe-layers 2", "--moe-layers is [2]; allowed: left out with"),
        ("hash@0,topk@1-", "--moe-first-k-dense 1", "--moe-first-k-dense is 1; allowed: left"),
        ("hash@0,topk@1-", "--use-topk", "name different gates; give one of them"),
        ("peer@1,topk@0+2-", "", "allowed: peer as the only gate of a model"),
        ("peer@1,dense@0+2-", "--peer-layers 2", "allowed: layers as the flags of peer say"),
    ],
)
def test_wrong_lists_are_refused(gate, words, message):
    with pytest.raises(ValueError) as error:
        parse("--gate", gate, *words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_peer_may_be_listed_with_dense_layers():
    config = parse("--gate", "peer@1,dense@0+2-")
    assert config.moe.gates(4) == [None, "peer", None, None]


def test_help_lists_options_of_all_gates(capsys):
    with pytest.raises(SystemExit):
        parse("--gate", "hash@0,deepseek_v3@1-", "--help")
    shown = capsys.readouterr().out
    assert "gate deepseek_v3:" in shown and "--deepseek-v3.topk N" in shown
