"""Flags and run.json: every kind of value, every error, and the round trip."""

import dataclasses
import json
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from megatron import __version__
from megatron.config import cli
from megatron.config.flags import flags_of
from megatron.config.run_json import config_from_dict, read_run_json, write_run_json
from megatron.config.schema import (
    RUN_JSON_LAYOUT,
    SECTIONS,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    require,
)
from megatron.io import atomic_write


@dataclass(frozen=True)
class TopK:
    topk: int = 2
    """experts per token, 100% of
    them"""
    score: str = field(
        default="softmax",
        metadata={"flags": ("--score_fn",), "choices": ("softmax", "sigmoid")},
    )
    """score of an expert"""
    loss_coeff: float = 0.01
    """coefficient of the balance loss"""
    renormalise: bool = True
    """divide by the sum"""
    levels: tuple[int, ...] = (1, 2)
    limit: int | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        require(self.topk > 0, "--topk", self.topk, "a positive integer")


@dataclass(frozen=True)
class Threshold:
    threshold: float = 0.9
    topk: int = 0


@dataclass(frozen=True)
class Mass(Threshold):
    mass: float = 1.0


GATES = {
    "topk": TopK,
    "threshold": Threshold,
    "mass": Mass,
    "hash": dataclasses.make_dataclass("Hash", []),
}


def gate_config(name):
    require(name in GATES, "--gate", name, " ".join(GATES))
    return GATES[name]


def parse(*argv):
    return cli.parse(argv, gate_config, lambda: list(GATES))


def run_json(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# Values


def test_no_flags_are_the_defaults():
    assert parse() == RunConfig(gate_options=dataclasses.asdict(TopK()))


def test_argv_none_is_the_programs(monkeypatch):
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
def test_values_of_flags(words, where, expected):
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
def test_values_of_gate_options(words, name, expected):
    options = parse(*words.split()).gate_options
    assert options == {**dataclasses.asdict(TopK()), name: expected}


def test_the_gate_decides_which_flags_there_are():
    config = parse("--threshold", "0.5", "--gate", "threshold", "--topk", "3")
    assert config.moe.gate == "threshold" and config.gate_options == {
        "threshold": 0.5,
        "topk": 3,
    }
    assert parse("--gate", "topk", "--gate=mass").gate_options == dataclasses.asdict(Mass()), (
        "the last one counts"
    )


@pytest.mark.parametrize(
    "alias, gate",
    [("--use-threshold", "threshold"), ("--use_topk", "topk"), ("--use-hash-layer", "hash")],
)
def test_aliases_of_the_gate(alias, gate):
    assert parse(alias).moe.gate == parse(alias, "--gate", gate).moe.gate == gate
    assert set(cli.GATE_ALIASES.values()) == {"threshold", "topk", "hash", "base"}


def test_a_tool_adds_flags_of_its_own():
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
        ("--num-layers", "--num-layers: expected one argument; --help lists all flags"),
        ("--save --load x", "--save: expected one argument; --help lists all flags"),
        ("--data-path", "--data-path: expected at least one argument; --help lists all flags"),
        ("--gate", "--gate: expected one argument; --help lists all flags"),
        (
            "--swiglu=1",
            "--swiglu/--no-swiglu: ignored explicit argument '1'; --help lists all flags",
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
            "--num-layer is no flag; did you mean --num-layers? --help lists all flags",
        ),
        (
            "--num_layer=3",
            "--num-layer is no flag; did you mean --num-layers? --help lists all flags",
        ),
        (
            "--num-expert 3",
            "--num-expert is no flag; did you mean --num-experts? --help lists all flags",
        ),
        (
            "--moe-loss-coef 3",
            "--moe-loss-coef is no flag; did you mean --moe-loss-coeff? --help lists all flags",
        ),
        ("--zzz", "--zzz is no flag; --help lists all flags"),
        ("--num-layers 3 4", "unexpected argument '4'; every value follows its flag"),
        ("-x", "unexpected argument '-x'; every value follows its flag"),
        (
            "--threshold 0.5",
            "--threshold belongs to --gate mass or threshold, but the gate is topk; leave the flag out or "
            "choose another gate",
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
def test_errors_are_one_line(words, message):
    with pytest.raises(ValueError) as caught:
        parse(*words.split())
    assert str(caught.value) == message


def test_a_foreign_flag_without_knowing_the_other_gates():
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
def test_a_gates_config_that_cannot_become_flags(fields, message):
    bad = dataclasses.make_dataclass("Bad", fields)
    with pytest.raises(ValueError, match=message):
        cli.parse([], lambda name: bad)


# Help


def test_help_lists_flags_by_section_with_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        parse("--help", "--gate", "topk")
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
        "--norm-epsilon X, --layernorm-epsilon X epsilon of the normalisation layers (default: 1e-05)",
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
    ):
        assert text in squeezed, text
    assert "local-rank" not in out and "--threshold X" not in out


def test_help_shows_what_run_json_says_and_short_help_works(capsys, tmp_path):
    path = run_json(tmp_path, {"model": {"num_layers": 77}})
    with pytest.raises(SystemExit):
        parse("-h", "--config", path)
    assert "(default: 77)" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0 and capsys.readouterr().out == f"moe-megatron {__version__}\n"


def test_every_flag_of_the_schema_has_help():
    for section, cls in SECTIONS.items():
        for flag in flags_of(cls, section):
            assert flag.help, flag.dest


def test_help_texts_are_inherited_and_may_be_out_of_reach():
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


# run.json


def test_precedence_is_flag_then_file_then_default(tmp_path):
    path = run_json(
        tmp_path,
        {
            "model": {"num_layers": 8, "hidden_size": 512},
            "gate_options": {"topk": 3},
            "data": {"data_path": ["a"]},
        },
    )
    config = parse("--config", path, "--num-layers", "16")
    assert (config.model.num_layers, config.model.hidden_size, config.model.seq_length) == (
        16,
        512,
        256,
    )
    assert config.gate_options == {
        **dataclasses.asdict(TopK()),
        "topk": 3,
    } and config.data.data_path == ("a",)
    assert parse("--config", path, "--topk", "5", "--data-path=").gate_options["topk"] == 5


def test_the_file_names_the_gate(tmp_path):
    path = run_json(
        tmp_path, {"moe": {"gate": "threshold"}, "gate_options": {"threshold": 0.25}}
    )
    assert parse("--config", path).gate_options == {"threshold": 0.25, "topk": 0}
    assert parse("--config", path, "--use-threshold").gate_options["threshold"] == 0.25


def test_another_gate_drops_the_stored_options_and_says_so(tmp_path, caplog):
    path = run_json(tmp_path, {"moe": {"gate": "topk"}, "gate_options": {"topk": 5}})
    config = parse("--config", path, "--gate", "threshold", "--threshold", "0.5")
    assert config.moe.gate == "threshold" and config.gate_options == {
        "threshold": 0.5,
        "topk": 0,
    }
    assert caplog.messages == [
        f"--gate threshold replaces topk of {path}: the gate options stored there are dropped, "
        "and threshold starts from its own defaults"
    ]
    caplog.clear()
    assert (
        parse("--config", run_json(tmp_path, {}), "--gate", "threshold").gate_options["topk"]
        == 0
    )
    assert caplog.messages == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON: Expecting property name"),
        ([], r"is \[\]; allowed: a JSON object"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'?"),
        (
            {"zzz": {}},
            "unknown key 'zzz'; allowed: model moe tokenizer data optimizer train gate_options",
        ),
        ({"model": 3}, "model is 3; allowed: a JSON object"),
        (
            {"model": {"num_layer": 3}},
            r"unknown key 'model\.num_layer'; did you mean 'model\.num_layers'?",
        ),
        (
            {"gate_options": {"tpok": 3}},
            r"unknown key 'gate_options\.tpok'; did you mean 'gate_options\.topk'?",
        ),
        ({"model": {"num_layers": True}}, r"model\.num_layers is True; allowed: an integer"),
        ({"model": {"num_layers": [1]}}, r"model\.num_layers is \[1\]; allowed: an integer"),
        ({"model": {"num_layers": None}}, r"model\.num_layers is None; allowed: an integer"),
        ({"model": {"swiglu": 1}}, r"model\.swiglu is 1; allowed: true or false"),
        ({"model": {"activation": 3}}, r"model\.activation is 3; allowed: gelu relu"),
        ({"train": {"save": 3}}, r"train\.save is 3; allowed: text"),
        ({"optimizer": {"lr": 10**400}}, r"optimizer\.lr is 10+; allowed: a finite number"),
        (
            {"data": {"data_path": "a"}},
            r"data\.data_path is 'a'; allowed: a list, each element text",
        ),
        (
            {"gate_options": {"levels": [1, "x"]}},
            r"gate_options\.levels is 'x'; allowed: an integer",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path, content, message):
    path = run_json(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"none\.json cannot be read \(No such file.*\); give the path of a run\.json",
    ):
        parse("--config", str(tmp_path / "none.json"))


def test_numbers_of_a_file_take_the_fields_type(tmp_path):
    config = parse(
        "--config", run_json(tmp_path, {"train": {"train_iters": 1e3}, "optimizer": {"lr": 1}})
    )
    assert type(config.train.train_iters) is int and type(config.optimizer.lr) is float


def test_write_then_read(tmp_path):
    config = parse("--data-path", "a", "b", "--levels", "4", "--swiglu", "--lr", "1e-5")
    path = tmp_path / "run.json"
    path.write_text("old")
    write_run_json(config, path)
    assert read_run_json(path) == config == parse("--config", str(path))
    assert os.listdir(tmp_path) == ["run.json"], "no temporary file stays"
    assert list(json.loads(path.read_text())) == list(RUN_JSON_LAYOUT)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_run_json(RunConfig(), tmp_path / "run.json")
    monkeypatch.setattr(
        atomic_write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_run_json(parse("--num-layers", "9"), tmp_path / "run.json")
    assert read_run_json(tmp_path / "run.json") == RunConfig() and os.listdir(tmp_path) == [
        "run.json"
    ]


def test_a_failed_write_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}/folder'$"):
        atomic_write.write_text(tmp_path / "folder", "x")
    monkeypatch.setattr(
        atomic_write.os,
        "fsync",
        lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'$"):
        atomic_write.write_bytes(tmp_path / "x", b"x")
    monkeypatch.setattr(
        atomic_write.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        atomic_write.write_text(tmp_path / "x", "x")
    assert os.listdir(tmp_path) == ["folder"]
    monkeypatch.undo()
    atomic_write.write_bytes(tmp_path / "x", b"\xff\n")
    assert (tmp_path / "x").read_bytes() == b"\xff\n"


def test_a_checkpoints_run_json(tmp_path):
    config = parse("--num-layers", "3")
    path = run_json(
        tmp_path, {"config": config.to_dict(), "tokenizer": {"name": "x"}, "world_size": 2}
    )
    assert read_run_json(path) == config == parse("--config", path)


def test_from_dict():
    config = parse("--levels", "1", "--num-layers", "3")
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config_from_dict({}) == RunConfig()
    with pytest.raises(
        ValueError, match=r"^here: --num-layers is 0; allowed: a positive integer$"
    ):
        config_from_dict({"model": {"num_layers": 0}}, "here")
    with pytest.raises(ValueError, match=r"^run\.json: unknown key 'a'"):
        config_from_dict({"a": 1})


# run.json of a run with a few flags set, as every version of this project has written it.
RUN_JSON = """\
{
  "model": {
    "num_layers": 6,
    "hidden_size": 256,
    "ffn_hidden_size": 0,
    "num_attention_heads": 4,
    "num_query_groups": 0,
    "kv_channels": 0,
    "seq_length": 256,
    "max_position_embeddings": 0,
    "position_embedding_type": "rope",
    "rotary_base": 10000.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-05,
    "activation": "gelu",
    "swiglu": false,
    "untie_embeddings_and_output_weights": false,
    "init_method_std": 0.02,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": 0
  },
  "moe": {
    "num_experts": 8,
    "expert_interval": 1,
    "moe_layers": [],
    "gate": "topk",
    "moe_ffn_hidden_size": 0,
    "moe_train_capacity_factor": 0.0,
    "moe_eval_capacity_factor": 0.0,
    "moe_min_capacity": 4,
    "moe_shared_experts": 0,
    "moe_first_k_dense": 0,
    "moe_expert_parallel_size": 1,
    "moe_backend": "auto"
  },
  "tokenizer": {
    "tokenizer_type": "NullTokenizer",
    "vocab_file": "",
    "merge_file": "",
    "tokenizer_model": "100"
  },
  "data": {
    "data_path": [
      "0.7",
      "a",
      "0.3",
      "b"
    ],
    "train_data_path": [],
    "valid_data_path": [],
    "test_data_path": [],
    "streaming_data_path": [],
    "streaming_json_key": "text",
    "streaming_shuffle_samples": 1024,
    "split": "969,30,1",
    "data_cache_path": "",
    "dataloader_type": "single",
    "num_workers": 0,
    "reset_position_ids": false,
    "reset_attention_mask": false,
    "eod_mask_loss": false
  },
  "optimizer": {
    "lr": 0.001,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": 0.0,
    "lr_warmup_tokens": 0,
    "lr_decay_iters": 0,
    "lr_decay_tokens": 0,
    "lr_wsd_decay_fraction": 0.2,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-08,
    "clip_grad": 1.0,
    "bf16": true,
    "fp16": false,
    "zero_stage": 2,
    "deepspeed_config": "ds.json"
  },
  "train": {
    "exit_interval": 25,
    "exit_duration_in_mins": 0.0,
    "max_bad_steps": 3,
    "loss_spike_threshold": 6.0,
    "loss_spike_window": 100,
    "loss_spike_action": "log",
    "timeout_minutes": 10.0,
    "save": "out",
    "save_interval": 50,
    "async_save": false,
    "keep_last": 2,
    "keep_every": 0,
    "on_save_error": "stop",
    "load": "out",
    "load_step": 0,
    "load_or_init": true,
    "finetune": false,
    "override_lr_schedule": false,
    "micro_batch_size": 2,
    "global_batch_size": 0,
    "train_iters": 100,
    "train_tokens": 0,
    "seed": 5,
    "eval_interval": 1000,
    "eval_iters": 10,
    "log_interval": 3,
    "recompute_activations": true,
    "tensorboard_dir": "tb",
    "metrics_file": "",
    "wandb_project": "w",
    "wandb_exp_name": "",
    "profile": true,
    "profile_step_start": 10,
    "profile_step_end": 12,
    "profile_ranks": [
      0,
      1
    ],
    "profile_dir": ""
  },
  "gate_options": {
    "topk": 3,
    "score": "sigmoid",
    "loss_coeff": 0.02,
    "renormalise": true,
    "levels": [
      1,
      2
    ],
    "limit": null,
    "names": null
  }
}
"""


def test_run_json_layout_does_not_change(tmp_path):
    """Checkpoints contain run.json: its sections, keys and their order stay as they are."""
    path = tmp_path / "run.json"
    path.write_text(RUN_JSON)
    config = read_run_json(path)
    write_run_json(config, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == RUN_JSON
    assert parse("--config", str(path)) == config
    assert config.checkpoint.keep_last == 2 and config.deepspeed.zero_stage == 2
    assert config.fault_tolerance.max_bad_steps == 3 and config.train.seed == 5
    assert config.logging.wandb_project == "w" and config.profiling.profile_ranks == (0, 1)


def test_run_json_layout_names_each_section_once():
    stored = [section for sections in RUN_JSON_LAYOUT.values() for section in sections]
    assert sorted(stored) == sorted([*SECTIONS, "gate_options"])


# Round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
WORD = TEXT.filter(lambda s: s and not s.startswith("--"))


def values(flag):
    """A strategy for any value a field can hold."""
    if flag.choices:
        return st.sampled_from(flag.choices)
    one = {
        int: st.integers(-2, 2**63 - 1) | st.integers(0, 8),
        bool: st.booleans(),
        str: WORD if flag.type.is_list else TEXT,
        float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False),
    }[flag.type.base]
    value = st.lists(one, max_size=4).map(tuple) if flag.type.is_list else one
    return (
        value.filter(lambda v: v not in ("none", ("none",))) | st.none()
        if flag.type.is_optional
        else value
    )


FIELDS = [
    (s, flag)
    for s, cls in {**SECTIONS, "gate_options": TopK}.items()
    for flag in flags_of(cls, s)
    if flag.dest != "moe.gate"
]


@settings(suppress_health_check=[HealthCheck.filter_too_much], deadline=None)
@given(st.lists(st.sampled_from(range(len(FIELDS))), max_size=4, unique=True), st.data())
def test_to_flags_and_json_round_trip(chosen, data):
    parts = {section: {} for section in (*SECTIONS, "gate_options")}
    for i in chosen:
        section, flag = FIELDS[i]
        parts[section][flag.name] = data.draw(values(flag), label=flag.dest)
    try:
        options = dataclasses.asdict(TopK(**parts.pop("gate_options")))
        config = RunConfig(
            **{s: SECTIONS[s](**v) for s, v in parts.items()}, gate_options=options
        )
    except ValueError:
        assume(False)
    flags = cli.to_flags(config)
    assert parse(*flags) == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(st.integers(-(2**63) + 1, 2**63 - 1))
@example(2**53 + 1)
def test_integers_are_exact(seed):
    assert parse(f"--seed={seed}").train.seed == parse("--seed", f"{seed}.0").train.seed == seed


def test_to_flags_names_only_what_differs():
    config = RunConfig(
        model=ModelConfig(num_layers=2, swiglu=True),
        moe=MoEConfig(gate="threshold"),
        optimizer=OptimizerConfig(lr=1e-3),
        gate_options={"threshold": 0.5, "loss_coeff": 1.0},
    )
    assert cli.to_flags(config) == [
        "--num-layers=2",
        "--swiglu",
        "--gate=threshold",
        "--lr=0.001",
        "--threshold=0.5",
        "--moe-loss-coeff=1.0",
    ]


def test_what_no_flag_can_hold():
    config = RunConfig(data=dataclasses.replace(RunConfig().data, data_path=("a", "--b")))
    with pytest.raises(
        ValueError, match="--data-path is '--b'; allowed: text that does not start with \"--\""
    ):
        cli.to_flags(config)
