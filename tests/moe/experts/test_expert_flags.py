"""--expert-type and the options of expert types as flags, in run.json, and where refused."""

import json

import pytest

from helpers.outside_gates import restored_registry, write_gate
from megatron.config import cli
from megatron.config.run_json import read_run_json, write_run_json
from megatron.moe.experts.expert_registry import EXPERT_TYPES
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES, available_expert_types
from megatron.moe.gate import available_gates, gate_config_class
from megatron.moe.gate_registry import import_gate_files

GATES = (gate_config_class, available_gates, import_gate_files)
EXPERTS = ("--num-experts", "4")
PEER = ("--gate", "peer", "--peer-num-experts", "16")
CLAMPED = (*EXPERTS, "--expert-type", "swiglu_clamped")

OUTSIDE = '''\
"""Experts of a package of one's own, and nothing else."""

from dataclasses import dataclass

from megatron.moe import ExpertType


class Outside(ExpertType, name="outside"):
    @dataclass(frozen=True)
    class Config:
        slope: float = 2.0
        """slope of the line"""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.add_matrix("w", context.hidden_size, context.hidden_size)

    def apply_experts(self, x_TD, weight_S, rows):
        y_SD = self.config.slope * self.linear(self.gather(x_TD, rows), self.w, rows)
        return self.combine(y_SD, weight_S, rows)
'''


@pytest.fixture(autouse=True)
def registry():
    with restored_registry():
        yield


def parse(*words):
    return cli.parse(list(map(str, words)), *GATES, expert_types=KNOWN_EXPERT_TYPES)


def test_options_are_flags_with_a_prefix():
    config = parse(*CLAMPED, "--expert-limit", "10", "--no-expert-linear-bias")
    assert config.moe.expert_type == "swiglu_clamped"
    assert config.expert_options == {
        "limit": 10.0,
        "alpha": 1.702,
        "linear_offset": 1.0,
        "linear_bias": False,
    }
    assert parse(*EXPERTS).expert_options == {"linear_bias": False}
    assert parse("--num-layers", "2").expert_options == {"linear_bias": False}


def test_run_json_keeps_type_and_options(tmp_path, caplog):
    config = parse(*CLAMPED, "--expert-limit", "10")
    path = tmp_path / "run.json"
    write_run_json(config, path)
    assert json.loads(path.read_text())["expert_options"]["limit"] == 10
    assert read_run_json(path) == config == parse("--config", path)
    assert parse("--config", path, "--expert-alpha", "1").expert_options["limit"] == 10
    flags = cli.to_flags(config, gate_config_class, KNOWN_EXPERT_TYPES)
    assert "--expert-limit=10.0" in flags and parse(*flags) == config
    assert caplog.messages == []
    assert parse("--config", path, "--expert-type", "mlp").expert_options == {
        "linear_bias": False
    }
    assert caplog.messages == [
        f"--expert-type mlp replaces swiglu_clamped of {path}: the expert options stored there "
        "are dropped"
    ]


def test_dense_run_drops_type_with_options(tmp_path, caplog):
    path = tmp_path / "run.json"
    write_run_json(parse(*CLAMPED, "--expert-limit", "10"), path)
    config = parse("--config", path, "--num-experts", "0")
    assert (config.moe.expert_type, config.expert_options) == ("mlp", {"linear_bias": False})
    assert "--expert-type is 'swiglu_clamped'" in caplog.messages[0]
    assert "--expert-limit is 10.0" in caplog.messages[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            (*EXPERTS, "--expert-type", "mpl"),
            r"^--expert-type is 'mpl'; allowed: mlp swiglu_clamped",
        ),
        (
            (*EXPERTS, "--expert-limit", "3"),
            "^--expert-limit belongs to --expert-type swiglu_clamped, but the expert type is mlp; "
            "leave the flag out or choose another type",
        ),
        ((*CLAMPED, "--expert-limit", "-1"), "^--expert-limit is -1.0; allowed: a positive"),
        (("--expert-linear-bias",), "^--expert-linear-bias is set; .* with --num-experts"),
        (
            ("--moe-latent-size", "0", *EXPERTS),
            "^--moe-latent-size is 0; allowed: a positive integer",
        ),
        (("--moe-weight-on-input",), "^--moe-weight-on-input is set; .* with --num-experts"),
        (
            (*PEER, "--expert-type", "swiglu_clamped"),
            "^--expert-type is 'swiglu_clamped'; allowed: left out with --gate peer, whose",
        ),
        (
            (*PEER, "--expert-linear-bias"),
            "^--expert-linear-bias is True; allowed: left out with --gate peer",
        ),
        (
            (*PEER, "--moe-latent-size", "8"),
            "^--moe-latent-size is 8; allowed: left out with --gate peer",
        ),
        (
            (*PEER, "--moe-weight-on-input"),
            "^--moe-weight-on-input is True; allowed: left out with --gate peer",
        ),
    ],
)
def test_wrong_expert_flags_are_refused(words, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"limt": 3},
            r"unknown key 'expert_options\.limt'; did you mean 'expert_options\.limit'",
        ),
        ({"limit": "x"}, r"expert_options\.limit is 'x'; allowed: a "),
        (3, "expert_options is 3; allowed: a JSON object"),
    ],
)
def test_wrong_stored_options_are_refused(tmp_path, options, message):
    path = tmp_path / "run.json"
    moe = {"num_experts": 4, "expert_type": "swiglu_clamped"}
    path.write_text(json.dumps({"moe": moe, "expert_options": options}))
    with pytest.raises(ValueError, match=message):
        parse("--config", path)


def test_help_lists_options_of_the_type(capsys):
    with pytest.raises(SystemExit):
        parse("--expert-type", "swiglu_clamped", "--help")
    out = capsys.readouterr().out
    assert "expert type swiglu_clamped" in out and "--expert-limit" in out
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--expert-limit" not in capsys.readouterr().out


# Types of --gate-path


def test_file_with_an_expert_type_only(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE)
    config = parse(
        *EXPERTS, "--gate-path", path, "--expert-type", "outside", "--expert-slope", "3"
    )
    assert config.expert_options == {"slope": 3.0}
    assert "outside" in available_expert_types()


def test_file_with_gate_and_expert_type(tmp_path):
    """Both may have an option of the same name."""
    path = write_gate(tmp_path, "outside_gate", before=OUTSIDE.replace("slope", "shift"))
    words = ("--gate-path", path, "--gate", "outside_gate", "--expert-type", "outside")
    config = parse(*EXPERTS, *words, "--shift", "5", "--expert-shift", "0.5")
    assert config.expert_options == {"shift": 0.5}
    assert config.gate_options["outside_gate"]["shift"] == 5


def test_type_of_a_stored_path_is_not_imported(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE)
    words = (*EXPERTS, "--gate-path", path, "--expert-type", "outside")
    write_run_json(parse(*words), tmp_path / "run.json")
    EXPERT_TYPES.classes.pop("outside")
    with pytest.raises(ValueError, match="--expert-type is 'outside'.*give --gate-path again"):
        parse("--config", tmp_path / "run.json")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            OUTSIDE.replace('name="outside"', 'name="mlp"'),
            "two expert types have the name 'mlp': .*MLPExperts, and .*Outside; rename one",
        ),
        (
            OUTSIDE + "\n1 / 0\n",
            "cannot be imported: ZeroDivisionError",
        ),
    ],
)
def test_failing_file_registers_nothing(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    before = available_expert_types()
    with pytest.raises(ValueError, match=message):
        parse(*EXPERTS, "--gate-path", path)
    assert available_expert_types() == before


@pytest.mark.parametrize(
    "text, message",
    [
        (
            OUTSIDE.replace("    @dataclass(frozen=True)\n", ""),
            "the Config of expert type 'outside' is no dataclass; write @dataclass",
        ),
        (
            OUTSIDE.replace(": float = 2.0", " = 2.0"),
            "has 'slope' without a type, so that it is no option; write slope: float = 2.0",
        ),
        (
            OUTSIDE.replace("float = 2.0", "dict = None"),
            "Config.slope has the type .*a flag can",
        ),
    ],
)
def test_config_that_cannot_be_flags_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(*EXPERTS, "--gate-path", path, "--expert-type", "outside")
