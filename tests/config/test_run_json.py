"""run.json: precedence, errors, atomic writes, the layout on disk, and round trips."""

import dataclasses
import json
import os

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers.fake_gates import TopK, gate_config, parse, parse_moe, run_json
from megatron.config import cli
from megatron.config.effect import reset_without_effect
from megatron.config.flags import flags_of
from megatron.config.format_version import with_version
from megatron.config.run_json import config_from_dict, read_run_json, write_run_json
from megatron.config.schema import RUN_JSON_LAYOUT, SECTIONS, MoEConfig, RunConfig
from megatron.io import atomic_write


def test_flags_precede_file_and_defaults(tmp_path):
    path = run_json(
        tmp_path,
        {
            "model": {"num_layers": 8, "hidden_size": 512},
            "moe": {"num_experts": 4},
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
    options = {**dataclasses.asdict(TopK()), "topk": 3}
    assert config.gate_options == {"topk": options} and config.data.data_path == ("a",)
    assert (
        parse("--config", path, "--topk", "5", "--data-path=").gate_options["topk"]["topk"] == 5
    )


def test_run_json_selects_the_gate(tmp_path):
    path = run_json(
        tmp_path,
        {
            "moe": {"gate": "threshold", "num_experts": 4},
            "gate_options": {"threshold": 0.25},
        },
    )
    assert parse("--config", path).gate_options["threshold"] == {"threshold": 0.25, "topk": 0}
    assert parse("--config", path, "--use-threshold") == parse("--config", path)


def test_other_gate_drops_stored_options(tmp_path, caplog):
    moe = {"gate": "topk", "num_experts": 4}
    content = {"version": 3, "moe": moe, "gate_options": {"topk": {"topk": 5}}}
    path = run_json(tmp_path, content)
    config = parse("--config", path, "--gate", "threshold", "--threshold", "0.5")
    assert config.moe.gate == "threshold" and config.gate_options == {
        "threshold": {"threshold": 0.5, "topk": 0}
    }
    assert caplog.messages == [
        f"--gate threshold replaces topk of {path}: the gate options stored there are dropped, "
        "and threshold starts from its own defaults"
    ]
    caplog.clear()
    config = parse_moe("--config", run_json(tmp_path, {}), "--gate", "threshold")
    assert config.gate_options["threshold"]["topk"] == 0
    assert caplog.messages == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON: Expecting property name"),
        ([], r"is \[\]; allowed: a JSON object"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'?"),
        (
            {"zzz": {}},
            "unknown key 'zzz'; allowed: model moe tokenizer data optimizer train gate_options "
            "expert_options",
        ),
        ({"model": 3}, "model is 3; allowed: a JSON object"),
        (
            {"model": {"num_layer": 3}},
            r"unknown key 'model\.num_layer'; did you mean 'model\.num_layers'?",
        ),
        (
            {"gate_options": {"tpok": 3}},
            r"unknown key 'gate_options\.topk\.tpok'; did you mean 'gate_options\.topk\.topk'?",
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
            r"gate_options\.topk\.levels is 'x'; allowed: an integer",
        ),
    ],
)
def test_invalid_run_json_is_refused(tmp_path, content, message):
    path = run_json(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_missing_run_json_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"none\.json cannot be read \(No such file.*\); give the path of a run\.json",
    ):
        parse("--config", str(tmp_path / "none.json"))


def test_run_json_numbers_take_field_types(tmp_path):
    config = parse(
        "--config", run_json(tmp_path, {"train": {"train_iters": 1e3}, "optimizer": {"lr": 1}})
    )
    assert type(config.train.train_iters) is int and type(config.optimizer.lr) is float


def test_run_json_write_then_read(tmp_path):
    config = parse_moe("--data-path", "a", "b", "--levels", "4", "--swiglu", "--lr", "1e-5")
    path = tmp_path / "run.json"
    path.write_text("old")
    write_run_json(config, path)
    assert read_run_json(path) == config == parse("--config", str(path))
    assert os.listdir(tmp_path) == ["run.json"], "a temporary file was left"
    assert list(json.loads(path.read_text())) == ["version", *RUN_JSON_LAYOUT]


def test_interrupted_write_keeps_old_file(tmp_path, monkeypatch):
    write_run_json(RunConfig(), tmp_path / "run.json")
    monkeypatch.setattr(
        atomic_write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_run_json(parse("--num-layers", "9"), tmp_path / "run.json")
    assert read_run_json(tmp_path / "run.json") == RunConfig() and os.listdir(tmp_path) == [
        "run.json"
    ]


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
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


def test_run_json_of_a_checkpoint(tmp_path):
    config = parse("--num-layers", "3")
    path = run_json(
        tmp_path, {"config": config.to_dict(), "tokenizer": {"name": "x"}, "world_size": 2}
    )
    assert read_run_json(path) == config == parse("--config", path)


def test_config_from_dict_inverts_to_dict():
    config = parse_moe("--levels", "1", "--num-layers", "3")
    content = with_version(config.to_dict())
    assert config_from_dict(json.loads(json.dumps(content))) == config
    assert config_from_dict({}) == RunConfig()
    with pytest.raises(
        ValueError, match=r"^here: --num-layers is 0; allowed: a positive integer$"
    ):
        config_from_dict({"model": {"num_layers": 0}}, "here")
    with pytest.raises(ValueError, match=r"^run\.json: unknown key 'a'"):
        config_from_dict({"a": 1})


# run.json of a run with a few flags set, as this version writes it.
RUN_JSON = """\
{
  "version": 3,
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
    "vocab_size": 0,
    "attention": "gqa",
    "add_qkv_bias": false,
    "attention_output_bias": false,
    "qk_norm": "none",
    "clip_qkv": 0.0,
    "attention_sinks": false,
    "window_size": 0,
    "window_layers": [],
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rotary_percent": 1.0,
    "rope_scaling": "none",
    "rope_scaling_factor": 8.0,
    "rope_original_max_positions": 0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_truncate": true,
    "yarn_mscale": 0.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_attention_factor": 0.0
  },
  "moe": {
    "num_experts": 8,
    "expert_interval": 1,
    "moe_layers": [],
    "gate": "topk",
    "gate_path": [],
    "expert_type": "mlp",
    "moe_weight_on_input": false,
    "moe_latent_size": null,
    "moe_ffn_hidden_size": 0,
    "moe_aux_loss_reduction": "sum",
    "moe_train_capacity_factor": 0.0,
    "moe_eval_capacity_factor": 0.0,
    "moe_min_capacity": 4,
    "moe_shared_experts": 0,
    "moe_shared_expert_intermediate_size": 0,
    "moe_shared_expert_gate": false,
    "moe_first_k_dense": 0,
    "moe_expert_parallel_size": 1,
    "moe_backend": "auto",
    "check_routing": false
  },
  "tokenizer": {
    "tokenizer_type": "NullTokenizer",
    "vocab_file": "",
    "merge_file": "",
    "tokenizer_model": "100",
    "eod_token": ""
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
    "valid_sets": [],
    "data_args_path": "",
    "per_split_data_args_path": "",
    "mock_data": false,
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
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": 0.0,
    "lr_warmup_tokens": 0,
    "lr_decay_iters": 0,
    "lr_decay_samples": 0,
    "lr_decay_tokens": 0,
    "lr_wsd_decay_fraction": 0.2,
    "lr_wsd_decay_style": "linear",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-08,
    "clip_grad": 1.0,
    "bf16": true,
    "fp16": false,
    "grad_reduce_in_bf16": false,
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
    "init_from_hf": "",
    "load": "out",
    "load_step": 0,
    "load_or_init": true,
    "finetune": false,
    "load_optim": true,
    "load_rng": true,
    "override_lr_schedule": false,
    "micro_batch_size": 2,
    "global_batch_size": 0,
    "rampup_batch_size": [],
    "train_iters": 100,
    "train_samples": 0,
    "train_tokens": 0,
    "seed": 5,
    "eval_interval": 1000,
    "eval_iters": 10,
    "skip_train": false,
    "log_interval": 3,
    "recompute_activations": true,
    "eval_tasks": [],
    "eval_tasks_interval": 1000,
    "eval_tasks_limit": 0.0,
    "eval_tasks_num_fewshot": null,
    "eval_tasks_path": [],
    "eval_tasks_batch_size": 0,
    "tensorboard_dir": "tb",
    "metrics_file": "",
    "wandb_project": "w",
    "wandb_exp_name": "",
    "wandb_entity": "",
    "wandb_id": "",
    "wandb_mode": "",
    "wandb_save_dir": "",
    "wandb_log_checkpoints": false,
    "routing_metrics": true,
    "routing_probe_samples": 16,
    "routing_probe_interval": 0,
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
    "topk": {
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
  },
  "expert_options": {}
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


def test_run_json_layout_covers_all_sections():
    stored = [section for sections in RUN_JSON_LAYOUT.values() for section in sections]
    assert sorted(stored) == sorted([*SECTIONS, "gate_options", "expert_options"])


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


def test_option_that_needs_an_ineffective_one_is_left_out():
    """Shared experts need experts; the width of shared experts needs shared experts."""
    moe = MoEConfig(moe_shared_experts=1, moe_shared_expert_intermediate_size=8)
    assert parse(*cli.to_flags(RunConfig(moe=moe), gate_config)) == RunConfig(
        gate_options={"topk": dataclasses.asdict(TopK())}
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
        options = {"topk": dataclasses.asdict(TopK(**parts.pop("gate_options")))}
        config = RunConfig(
            **{s: SECTIONS[s](**v) for s, v in parts.items()}, gate_options=options
        )
    except ValueError:
        assume(False)
    flags = cli.to_flags(config, gate_config)
    effective = reset_without_effect(config)
    if not effective.moe.num_experts:
        options = {"topk": dataclasses.asdict(TopK())}
        effective = dataclasses.replace(effective, gate_options=options)
    assert parse(*flags) == effective
    content = with_version(config.to_dict())
    assert config_from_dict(json.loads(json.dumps(content))) == config
