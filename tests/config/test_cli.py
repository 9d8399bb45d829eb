"""Command-line parsing: values, errors, help, and configurations written as flags."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.fake_gates import Mass, TopK, gate_config, parse, parse_moe, run_json
from megatron import __version__
from megatron.config import cli
from megatron.config.fields import flag_name
from megatron.config.flags import flags_of
from megatron.config.schema import (
    SECTIONS,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
)
from megatron.config.short_help import EXAMPLE, FIRST_FLAGS
from megatron.moe.gate import available_gates, gate_config_class

# Values


def test_no_flags_give_the_defaults():
    assert parse() == RunConfig(gate_options={"topk": dataclasses.asdict(TopK())})


def test_argv_none_reads_sys_argv(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--num-layers", "9"])
    assert cli.parse(None, gate_config).model.num_layers == 9


@pytest.mark.parametrize(
    "words, where, expected",
    [
        ("--num-layers 12", "model.num_layers", 12),
        ("--num_layers=12", "model.num_layers", 12),
        ("--train-iters 6e4", "train.train_iters", 60_000),
        ("--train-tokens 1.5e3", "train.train_tokens", 1500),
        ("--train-tokens 10_000", "train.train_tokens", 10_000),
        ("--seed -3", "train.seed", -3),
        ("--lr 1", "optimizer.lr", 1.0),
        ("--lr 4.5e-4", "optimizer.lr", 4.5e-4),
        ("--layernorm-epsilon 1e-6", "model.norm_epsilon", 1e-6),
        ("--layernorm_epsilon 1e-6", "model.norm_epsilon", 1e-6),
        ("--zero-stage 3", "deepspeed.zero_stage", 3),
        ("--bf16", "optimizer.bf16", True),
        ("--bf16 --no-bf16", "optimizer.bf16", False),
        ("--deepspeed_config a_b.json", "deepspeed.deepspeed_config", "a_b.json"),
        ("--deepspeed-config=a_b.json", "deepspeed.deepspeed_config", "a_b.json"),
        ("--save -x", "checkpoint.save", "-x"),
        ("--save -h", "checkpoint.save", "-h"),
        ("--data-path 0.7 a 0.3 -b", "data.data_path", ("0.7", "a", "0.3", "-b")),
        ("--data-path a --data-path b", "data.data_path", ("b",)),
        ("--data-path a --data-path=", "data.data_path", ()),
        ("--local_rank=1 --deepspeed --num-layers 2", "model.num_layers", 2),
        ("--local_rank 1 --num-layers 2", "model.num_layers", 2),
    ],
)
def test_flags_set_typed_values(words, where, expected):
    section, name = where.split(".")
    value = getattr(getattr(parse(*words.split(" ")), section), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "words, name, expected",
    [
        ("--topk 4", "topk", 4),
        ("--score-fn sigmoid", "score", "sigmoid"),
        ("--score sigmoid", "score", "sigmoid"),
        ("--moe-loss-coeff 0.5", "loss_coeff", 0.5),
        ("--loss-coeff 0.5", "loss_coeff", 0.5),
        ("--no-renormalise", "renormalise", False),
        ("--levels 3 -4 5", "levels", (3, -4, 5)),
        ("--levels=", "levels", ()),
        ("--limit 7", "limit", 7),
        ("--limit 7 --limit none", "limit", None),
        ("--names a b", "names", ("a", "b")),
        ("--names none", "names", None),
    ],
)
def test_gate_options_set_typed_values(words, name, expected):
    options = parse_moe(*words.split()).gate_options["topk"]
    assert options == {**dataclasses.asdict(TopK()), name: expected}


def test_gate_determines_the_available_flags():
    config = parse_moe("--threshold", "0.5", "--gate", "threshold", "--topk", "3")
    assert config.moe.gate == "threshold" and config.gate_options == {
        "threshold": {"threshold": 0.5, "topk": 3}
    }
    options = {"mass": dataclasses.asdict(Mass())}
    last = parse_moe("--gate", "topk", "--gate=mass")
    assert last.gate_options == options, "the last --gate applies"


@pytest.mark.parametrize(
    "alias, gate",
    [("--use-threshold", "threshold"), ("--use_topk", "topk"), ("--use-hash-layer", "hash")],
)
def test_gate_aliases_select_the_gate(alias, gate):
    assert parse_moe(alias).moe.gate == parse_moe(alias, "--gate", gate).moe.gate == gate
    assert set(cli.GATE_ALIASES.values()) == {"threshold", "topk", "hash", "base"}


def test_parse_with_adds_tool_flags():
    @dataclass(frozen=True)
    class Tool:
        json: bool = False
        layers: tuple[int, ...] = ()

    config, tool = cli.parse_with(
        Tool, ["--json", "--layers", "1", "2", "--num-layers", "3"], gate_config
    )
    assert tool == Tool(True, (1, 2)) and config.model.num_layers == 3


# Errors


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-layers x", "--num-layers is 'x'; allowed: an integer"),
        ("--num-layers 1.5", "--num-layers is '1.5'; allowed: an integer"),
        ("--num-layers 1e30", "--num-layers is '1e30'; allowed: an integer"),
        ("--num-layers inf", "--num-layers is 'inf'; allowed: an integer"),
        ("--lr x", "--lr is 'x'; allowed: a finite number"),
        ("--lr nan", "--lr is 'nan'; allowed: a finite number"),
        ("--lr 1e999", "--lr is '1e999'; allowed: a finite number"),
        ("--lr -1e-3", "--lr is -0.001; allowed: a positive number"),
        ("--zero-stage 7", "--zero-stage is '7'; allowed: 0 1 2 3"),
        ("--activation tanh", "--activation is 'tanh'; allowed: gelu relu silu swiglu geglu"),
        ("--levels 1 x", "--levels is 'x'; allowed: an integer"),
        ("--topk 0", "--topk is 0; allowed: a positive integer"),
        ("--num-layers", "--num-layers: expected one argument; --help-all lists all flags"),
        ("--save --load x", "--save: expected one argument; --help-all lists all flags"),
        (
            "--data-path",
            "--data-path: expected at least one argument; --help-all lists all flags",
        ),
        ("--gate", "--gate: expected one argument; --help-all lists all flags"),
        (
            "--swiglu=1",
            "--swiglu/--no-swiglu: ignored explicit argument '1'; --help-all lists all flags",
        ),
        ("--gate nope", "--gate is 'nope'; allowed: topk threshold mass hash"),
        (
            "--use-topk --gate hash",
            "--use-topk and --gate hash name different gates; give one of them",
        ),
        (
            "--use-topk --use-threshold",
            "--use-topk and --use-threshold name different gates; give one of them",
        ),
        (
            "--num-layer 3",
            "--num-layer is no flag; did you mean --num-layers? --help-all lists all flags",
        ),
        (
            "--num_layer=3",
            "--num-layer is no flag; did you mean --num-layers? --help-all lists all flags",
        ),
        (
            "--num-expert 3",
            "--num-expert is no flag; did you mean --num-experts? --help-all lists all flags",
        ),
        (
            "--moe-loss-coef 3",
            "--moe-loss-coef is no flag; did you mean --moe-loss-coeff? --help-all lists all flags",
        ),
        ("--zzz", "--zzz is no flag; --help-all lists all flags"),
        ("--num-layers 3 4", "unexpected argument '4'; every value follows its flag"),
        ("-x", "unexpected argument '-x'; every value follows its flag"),
        (
            "--threshold 0.5",
            "--threshold belongs to --gate mass or threshold, but the gate is topk; "
            "leave the flag out or choose another gate",
        ),
        (
            "--gate mass --no-renormalise",
            "--no-renormalise belongs to --gate topk, but the gate is mass; leave the flag "
            "out or choose another gate",
        ),
        (
            "--gate hash --moe_loss_coeff=1",
            "--moe-loss-coeff belongs to --gate topk, but the gate is hash; leave the flag "
            "out or choose another gate",
        ),
    ],
)
def test_parse_errors_are_one_line(words, message):
    with pytest.raises(ValueError) as caught:
        parse(*words.split())
    assert str(caught.value) == message


def test_other_gates_flag_is_unknown_alone():
    with pytest.raises(ValueError, match="--threshold is no flag"):
        cli.parse(["--threshold", "1"], gate_config)


@pytest.mark.parametrize(
    "fields, message",
    [
        ([("x", int)], r"\.Bad\.x has no default; every field of a config class needs one"),
        (
            [("x", dict, field(default_factory=dict))],
            r"\.Bad\.x has the type <class 'dict'>; a flag can be int, float,",
        ),
        (
            [("x", tuple[int, int], (1, 2))],
            r"\.Bad\.x has the type tuple\[int, int\]; a flag can be",
        ),
        ([("x", int | str, 1)], r"\.Bad\.x has the type int \| str; a flag can be"),
        ([("x", bool | None, None)], r"\.Bad\.x has the type bool \| None; a flag can be"),
        (
            [("num_layers", int, 1)],
            r"the flag --num-layers of .*\.Bad is taken by model.num_layers; rename the field",
        ),
        (
            [("no_swiglu", bool, False)],
            r"the flag --no-swiglu of .*\.Bad is taken by model.swiglu; rename the field",
        ),
    ],
)
def test_invalid_gate_configs_are_refused(fields, message):
    bad = dataclasses.make_dataclass("Bad", fields)
    with pytest.raises(ValueError, match=message):
        cli.parse([], lambda name: bad)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-layers x", "--num-layers is 'x'; allowed: an integer"),
        ("--hidden-size 0 --topk 3", "--hidden-size is 0; allowed: a positive integer"),
        ("--gate nope --save-interval 3", "--save-interval is 3; it has an effect only with"),
        ("--squared-relu", "--squared-relu is not supported here: choose an --activation"),
    ],
)
def test_early_check_needs_no_gate(words, message):
    with pytest.raises(ValueError) as caught:
        cli.refuse_early(words.split())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "--unknown 3 --gate nope --use-flash-attn",
        "--gate peer --moe-ffn-hidden-size 2 --moe-train-capacity-factor 1",
        "--num-experts 4 --moe-ffn-hidden-size 2 --ffn-hidden-size 3",
        "--save-interval 3 --config missing.json",
        "--save-interval 3 --help",
        "--save-interval 3 --help-all",
        "--save-interval 3 --version",
    ],
)
def test_early_check_leaves_other_mistakes(words):
    """Those that the gate, its options, or a run.json may decide."""
    assert cli.refuse_early(words.split()) is None


def test_wrong_flag_is_refused_before_torch(repo, tmp_path):
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['pretrain_gpt.py', '--save-interval', '3', '--topk', '2']; "
        f"runpy.run_path({str(repo / 'pretrain_gpt.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: --save-interval is 3; it has an effect only with --save. "
        "Set --save or leave --save-interval out.\n"
    )


@pytest.mark.parametrize(
    "env, start",
    [
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "[rank 1] error: --save"),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "error: RANK is 'one'; allowed",
        ),
    ],
)
def test_early_refusal_knows_its_rank(env, start, repo):
    """Without a launcher, the rank comes from mpirun or srun, or is refused itself."""
    done = subprocess.run(
        [sys.executable, str(repo / "pretrain_gpt.py"), "--save-interval", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMPI_COMM_WORLD_LOCAL_RANK": "1", **env},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


# Help


def test_help_lists_sections_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        parse("--help-all", "--gate", "topk")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for line in (
        "model:",
        "Shape of the decoder-only transformer.",
        "gate topk:",
        "optimizer:",
        "train:",
        "data:",
        "The gate's own flags. Gates: hash mass threshold topk",
    ):
        assert line in out
    squeezed = " ".join(out.split())
    for text in (
        "--num-layers N number of transformer blocks (default: 4)",
        "--norm-epsilon X, --layernorm-epsilon X epsilon of the normalisation layers "
        "(default: 1e-05)",
        "--bf16, --no-bf16 compute in bfloat16",
        "--save TEXT directory for checkpoints",
        "no checkpoints are written (default: empty)",
        "--zero-stage {0,1,2,3}",
        "--topk N experts per token, 100% of them (default: 2)",
        "--levels N [N ...] (default: 1 2)",
        "--moe-loss-coeff X, --loss-coeff X coefficient of the balance loss (default: 0.01)",
        "--renormalise, --no-renormalise divide by the sum (default: on)",
        "--use-threshold the same as --gate threshold",
        "--limit N (default: None)",
        "only at the end of the run (default: 0; only with --save)",
        "allow a learning rate, schedule, warm-up or run length that differs from the "
        "checkpoint's (default: off; only with --load; only without --finetune)",
        "(default: 4; only with --num-experts; only with --moe-train-capacity-factor or "
        "--moe-eval-capacity-factor)",
        "(default: 0; only with a dense layer, or without --moe-ffn-hidden-size)",
    ):
        assert text in squeezed, text
    assert "local-rank" not in out and "--threshold X" not in out


def test_short_help_shows_first_flags(capsys, monkeypatch):
    """--help lists what a run needs, groups and an example, and only the flags of these."""
    monkeypatch.setenv("COLUMNS", "100")
    for words in (["--help"], ["-h"], ["--num-layers", "3", "--help", "--unknown"]):
        with pytest.raises(SystemExit) as caught:
            parse(*words)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        titles = ["every run needs:", "most runs set:", "groups of flags", "example:"]
        positions = [out.index(title) for title in titles]
        assert positions == sorted(positions)
        flags = set(re.findall(r"^  (--[a-z0-9-]+)", out, re.MULTILINE))
        names = [name for group in FIRST_FLAGS.values() for name in group]
        assert flags == {flag_name(name) for name in names}
        for section, cls in SECTIONS.items():
            assert re.search(
                rf"^  {section} +{len(flags_of(cls, section))}  ", out, re.MULTILINE
            )
        assert len(out.splitlines()) < 70


def test_short_help_of_a_gate_lists_its_flags(capsys):
    with pytest.raises(SystemExit):
        parse("--gate", "mass", "--help")
    out = capsys.readouterr().out
    assert "gate mass:" in out and "--mass X" in out and "--threshold X" in out


def test_short_help_of_a_tool_lists_its_flags(capsys):
    @dataclass(frozen=True)
    class Tool:
        answers: int = 1

    with pytest.raises(SystemExit):
        cli.parse_with(Tool, ["--help"], gate_config)
    assert "flags of this program:\n  --answers N" in capsys.readouterr().out


def test_example_of_help_parses(tmp_path):
    lines = EXAMPLE.replace("\\\n", "").splitlines()
    words = shlex.split(next(line for line in lines if "pretrain_gpt.py" in line))
    config = cli.parse(
        words[words.index("pretrain_gpt.py") + 1 :], gate_config_class, available_gates
    )
    assert config.moe.num_experts == 4 and config.gate_options["topk"]["topk"] == 2


def test_help_shows_run_json_values(capsys, tmp_path):
    path = run_json(tmp_path, {"model": {"num_layers": 77}})
    with pytest.raises(SystemExit):
        parse("--help-all", "--config", path)
    assert "(default: 77)" in capsys.readouterr().out


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0 and capsys.readouterr().out == f"moe-megatron {__version__}\n"


def test_every_flag_has_help():
    for section, cls in SECTIONS.items():
        for flag in flags_of(cls, section):
            assert flag.help, flag.dest


def test_help_texts_are_inherited_or_empty():
    @dataclass(frozen=True)
    class Child(ModelConfig):
        extra: int = 0
        """something more"""

    docs = {flag.name: flag.help for flag in flags_of(Child, "child")}
    assert (
        docs["extra"] == "something more"
        and docs["num_layers"] == "number of transformer blocks"
    )
    without_source = dataclasses.make_dataclass("Made", [("x", int, 1)])
    assert flags_of(without_source, "made")[0].help == ""


@given(st.integers(-(2**63) + 1, 2**63 - 1))
@example(2**53 + 1)
def test_integers_are_parsed_exactly(seed):
    assert parse(f"--seed={seed}").train.seed == parse("--seed", f"{seed}.0").train.seed == seed


# Writing flags


def test_to_flags_omits_defaults():
    config = RunConfig(
        model=ModelConfig(num_layers=2, swiglu=True),
        moe=MoEConfig(num_experts=4, gate="threshold"),
        optimizer=OptimizerConfig(lr=1e-3),
        gate_options={"threshold": {"threshold": 0.5, "topk": 3}},
    )
    assert cli.to_flags(config, gate_config) == [
        "--num-layers=2",
        "--swiglu",
        "--num-experts=4",
        "--gate=threshold",
        "--lr=0.001",
        "--threshold=0.5",
        "--topk=3",
    ]


def test_to_flags_refuses_values_like_flags():
    config = RunConfig(data=dataclasses.replace(RunConfig().data, data_path=("a", "--b")))
    with pytest.raises(
        ValueError, match="--data-path is '--b'; allowed: text that does not start with \"--\""
    ):
        cli.to_flags(config, gate_config)
