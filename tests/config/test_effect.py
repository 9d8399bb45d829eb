"""Options without effect: refused on the command line, reset when a run.json sets them."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial

import pytest

from helpers.fake_gates import run_json
from megatron.config import cli
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.effect import reset_without_effect
from megatron.config.fields import option
from megatron.config.flags import flags_of
from megatron.config.format_version import FORMAT_VERSION
from megatron.config.needs import setting
from megatron.config.run_json import config_from_dict
from megatron.config.schema import SECTIONS, ModelConfig, MoEConfig, OptimizerConfig, RunConfig
from megatron.config.values import format_flag
from megatron.moe.gate import available_gates, gate_config_class

# Fields that have an effect in every run. A new field is listed here, or declares its needs.
ALWAYS_EFFECTIVE = {
    "model": "num_layers hidden_size num_attention_heads "
    "seq_length max_position_embeddings position_embedding_type normalization norm_epsilon "
    "activation swiglu untie_embeddings_and_output_weights init_method_std attention_dropout "
    "hidden_dropout make_vocab_size_divisible_by vocab_size",
    "attention": "attention add_qkv_bias attention_output_bias",
    "rotary": "",
    "moe": "num_experts",
    "tokenizer": "tokenizer_type",
    "data": "data_path data_args_path per_split_data_args_path train_data_path mock_data "
    "streaming_data_path data_cache_path dataloader_type num_workers reset_position_ids "
    "reset_attention_mask eod_mask_loss",
    "optimizer": "lr lr_decay_style lr_warmup_iters lr_warmup_samples lr_warmup_fraction "
    "lr_warmup_tokens weight_decay adam_beta1 adam_beta2 adam_eps clip_grad bf16 fp16",
    "deepspeed": "zero_stage deepspeed_config",
    "train": "micro_batch_size global_batch_size rampup_batch_size seed eval_iters "
    "recompute_activations",
    "evaluation": "",
    "checkpoint": "init_from_hf save load",
    "fault_tolerance": "max_bad_steps loss_spike_threshold timeout_minutes",
    "logging": "tensorboard_dir metrics_file wandb_project",
    "profiling": "",
}
# Values that every check accepts, for fields where the value below from the type does not.
VALUES = {"num_experts": 4, "min_lr": 1e-5, "gate": "threshold", "split": "8,1,1", "topk": 1}
VALUES |= {
    "moe_layers": (1,),
    "window_layers": (1,),
    "n_group": 2,
    "moe_expert_parallel_size": 2,
    "topk_group": 1,
}
VALUES |= {"rope_low_freq_factor": 0.5, "rope_high_freq_factor": 2.0}
VALUES |= {"yarn_beta_fast": 16.0, "yarn_beta_slow": 0.5}
VALUES |= {"valid_sets": ("wiki=a",), "gate_path": (__file__,)}
VALUES |= {"kv_channels": 2, "qk_rope_head_dim": 2}
VALUES |= {"threshold_target": 2.0, "threshold_gain": 0.3}
VALUES |= {"wandb_mode": "offline"}
VALUES |= {"peer_query_size": 64, "lambda_factor": 1.5, "peer_product_key_dim": (2, 2)}

parse = partial(
    cli.parse,
    gate_config=gate_config_class,
    gate_names=available_gates,
    import_gate_files=lambda paths: None,
    read_hf_config=lambda folder: {},
)


def section_flags():
    return [flag for section, cls in SECTIONS.items() for flag in flags_of(cls, section)]


def gate_flags(gate: str):
    return list(flags_of(gate_config_class(gate), "gate_options"))


def value_of(flag):
    """Return a value other than the default."""
    if flag.name in VALUES:
        return VALUES[flag.name]
    if flag.choices:
        return next(value for value in flag.choices if value != flag.default)
    if flag.type.is_list:
        return (1,) if flag.type.base is int else ("x",)
    if flag.type.base is int:
        return (flag.default or 0) + 1
    return {bool: not flag.default, str: "x", float: 0.5}[flag.type.base]


def stored_value(config: RunConfig, flag):
    if flag.section == "gate_options":
        return config.gate_options[config.moe.gate][flag.name]
    return getattr(getattr(config, flag.section), flag.name)


def fulfil(needed, known, without=None) -> list[str]:
    """Return words that give a setting one of the values that are needed, and what it needs.

    Args:
        without: a setting that the words do not set.
    """
    if needed.values == (False,) or (without and needed.name == without.name):
        return []
    flag = known[needed.name]
    words = [w for need in flag.needs for w in fulfil(need.settings[0], known, without)]
    value = value_of(flag)
    if needed.values:
        value = needed.values[0]
    elif flag.type.base is bool:
        value = True
    elif needed.above:
        value = needed.above + 1
    return [*words, *format_flag(flag.spellings[0], value)]


def violate(needed, known) -> list[str]:
    """Return words that give a setting a value at which the option has no effect."""
    flag = known[needed.name]
    words = [w for need in flag.needs for w in fulfil(need.settings[0], known)]
    if needed.values == (False,):
        value = True
    elif needed.values:
        value = next(value for value in flag.choices if value not in needed.values)
    elif not needed.holds({flag.name: flag.default}):
        return []
    else:
        value = flag.type.base(0)
    return [*words, *format_flag(flag.spellings[0], value)]


def cases_of(flags, words=()):
    """List (flag, index of a need, index of one of its settings, known flags, words) of all."""
    known = {flag.name: flag for flag in (*section_flags(), *flags)}
    cases = []
    for flag in flags:
        for i, need in enumerate(flag.needs):
            for j, needed in enumerate(need.settings):
                if flag.section == "gate_options" and needed.name == "num_experts":
                    continue  # that of all options; see test_gate_needs_experts
                case_id = f"{flag.name}-{needed.name}{''.join(words)}"
                cases.append(pytest.param(flag, i, j, known, list(words), id=case_id))
    return cases


CASES = cases_of(section_flags())
for gate in available_gates():
    CASES += cases_of(gate_flags(gate), (f"--gate={gate}", "--num-experts=4"))


@pytest.mark.parametrize("flag, i, j, known, words", CASES)
def test_flags_need_what_they_declare(flag, i, j, known, words, caplog):
    need = flag.needs[i]
    spelling = flag.spellings[0]
    words += format_flag(spelling, value_of(flag))
    for other in flag.needs:
        if other is not need:
            words += fulfil(other.settings[0], known, without=need.settings[j])
    missing = [word for needed in need.settings for word in violate(needed, known)]
    if need.resets or (missing and not need.settings[j].values):  # it is on by default
        config = parse([*words, *missing])
        assert stored_value(config, flag) == flag.default
        (message,) = caplog.messages
    else:
        with pytest.raises(ValueError) as caught:
            parse([*words, *missing])
        message = str(caught.value)
        assert " an effect only with" in message and message.endswith(" out.")
    assert spelling.removeprefix("--") in message and "\n" not in message
    for needed in need.settings:
        assert known[needed.name].spellings[0] in message

    config = parse([*words, *fulfil(need.settings[j], known)])
    assert stored_value(config, flag) == value_of(flag)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_declares_its_needs(section):
    """A new field decides: it has an effect in every run, or it needs a setting."""
    always = {flag.name for flag in flags_of(SECTIONS[section], section) if not flag.needs}
    assert always == set(ALWAYS_EFFECTIVE[section].split())


@pytest.mark.parametrize("gate", sorted({*available_gates()} - {"peer"}))
def test_gate_needs_experts(gate):
    message = f"--gate is '{gate}'; it has an effect only with --num-experts. Set --num-experts"
    with pytest.raises(ValueError, match=message):
        parse(["--gate", gate])
    for flag in gate_flags(gate):
        word = flag.spellings[0]
        with pytest.raises(ValueError, match="only with --num-experts") as caught:
            parse(["--gate", gate, *format_flag(word, value_of(flag))])
        assert word.removeprefix("--") in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--save-interval 10 --keep-last 2 --async-save",
            "--save-interval is 10, --async-save is set and --keep-last is 2; they have an effect "
            "only with --save. Set --save or leave them out.",
        ),
        (
            "--use-threshold",
            "--gate is 'threshold'; it has an effect only with --num-experts. "
            "Set --num-experts or leave --gate out.",
        ),
        (
            "--gate topk",  # the default
            "--gate is 'topk'; it has an effect only with --num-experts. "
            "Set --num-experts or leave --gate out.",
        ),
        (
            "--topk 2 --norm-topk-prob",
            "--topk is 2 and --norm-topk-prob is set; they have an effect only with "
            "--num-experts. Set --num-experts or leave them out.",
        ),
        (
            "--lr-decay-style constant --min-lr 1e-5",
            "--min-lr is 1e-05; it has an effect only with --lr-decay-style cosine or linear or "
            "inverse-square-root or wsd, not constant. Change that or leave --min-lr out.",
        ),
        (
            "--num-experts 4 --moe-min-capacity 4",
            "--moe-min-capacity is 4; it has an effect only with --moe-train-capacity-factor or "
            "--moe-eval-capacity-factor. Set one of them or leave --moe-min-capacity out.",
        ),
        (
            "--load x --finetune --override-lr-schedule",
            "--override-lr-schedule is set; it has an effect only without --finetune. "
            "Change that or leave --override-lr-schedule out.",
        ),
        (
            "--profile-ranks 0 1",
            "--profile-ranks is [0, 1]; it has an effect only with --profile. "
            "Set --profile or leave --profile-ranks out.",
        ),
        (
            "--gate deepseek_v2 --num-experts 4 --topk-group 1",
            "--topk-group is 1; it has an effect only with --n-group above 1, not 1. "
            "Change that or leave --topk-group out.",
        ),
        (
            "--num-experts 4 --ffn-hidden-size 8 --moe-ffn-hidden-size 8",
            "--ffn-hidden-size is 8; it has an effect only with a dense layer, or without "
            "--moe-ffn-hidden-size. Change that or leave --ffn-hidden-size out.",
        ),
        (
            "--train-data-path a --no-untie-embeddings-and-output-weights --split 8,1,1",
            "--split is '8,1,1'; it has an effect only with --data-path or --data-args-path. "
            "Set one of them or leave --split out.",
        ),
        (
            "--no-load-optim",
            "--no-load-optim is set; it has an effect only with --load. Set --load or leave "
            "--no-load-optim out.",
        ),
    ],
)
def test_flags_without_effect_are_refused(words, message):
    with pytest.raises(ValueError) as caught:
        parse(words.split())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "words",
    [
        "--save-interval 0 --keep-last 0 --no-async-save --load-step 0 --no-finetune",
        "--moe-train-capacity-factor 0 --moe-shared-experts 0 --moe-layers= --wandb-exp-name=",
        "--num-experts 4 --expert-interval 2 --ffn-hidden-size 8 --moe-ffn-hidden-size 8",
        "--num-experts 4 --ffn-hidden-size 8",
        "--ffn-hidden-size 8",
    ],
)
def test_flags_that_leave_options_off_are_accepted(words):
    assert parse(words.split()).checkpoint.save == ""


def test_tools_check_their_own_flags():
    @dataclass(frozen=True)
    class Tool:
        answers: int = 1
        verbose: bool = option(False, needs=setting("answers", above=1))

    _, tool = cli.parse_with(Tool, ["--verbose", "--answers=2"], gate_config_class)
    assert tool == Tool(2, True)
    message = "--verbose is set; it has an effect only with --answers above 1, not 1."
    with pytest.raises(ValueError, match=message):
        cli.parse_with(Tool, ["--verbose"], gate_config_class)


@pytest.mark.parametrize(
    "words, off, message",
    [
        (
            "--eval-interval 5",
            "--eval-iters 0",
            "--eval-interval is 5 (only with --eval-iters)",
        ),
        (
            "--save x --save-interval 5 --keep-last 2 --keep-every 4 --async-save",
            "--save=",
            "--save-interval is 5, --async-save is set, --keep-last is 2 and --keep-every is 4 "
            "(only with --save)",
        ),
        (
            "--num-experts 4 --gate threshold --threshold 0.5 --moe-loss-coeff 0",
            "--num-experts 0",
            "--gate is 'threshold', --moe-loss-coeff is 0.0 and --threshold is 0.5 (only with "
            "--num-experts)",
        ),
        (
            "--gate peer --peer-num-experts 16",
            "--num-experts 0",
            "--gate is 'peer' and --peer-num-experts is 16 (only with --num-experts)",
        ),
    ],
)
def test_features_can_be_switched_off(words, off, message, caplog):
    """As a flag after those of a script."""
    assert parse([*words.split(), *off.split()]) == parse(off.split())
    assert caplog.messages == [
        "these settings have no effect in this run and return to their defaults: " + message
    ]


# run.json

MOE_RUN = {
    "version": FORMAT_VERSION,
    "moe": {"num_experts": 4, "gate": "threshold", "moe_shared_experts": 1, "moe_layers": [1]},
    "gate_options": {"threshold": {"threshold": 0.5}},
    "train": {"save": "out", "save_interval": 5},
}


def test_dense_run_drops_stored_expert_settings(tmp_path, caplog):
    path = run_json(tmp_path, MOE_RUN)
    config = parse(["--config", path, "--num-experts", "0"])
    assert config == parse(["--save", "out", "--save-interval", "5"])
    assert caplog.messages == [
        "these settings have no effect in this run and return to their defaults: "
        "--moe-layers is [1], --gate is 'threshold', --moe-shared-experts is 1 and --threshold "
        "is 0.5 (only with --num-experts)"
    ]


def test_stored_settings_with_effect_are_silent(tmp_path, caplog):
    config = parse(["--config", run_json(tmp_path, MOE_RUN)])
    assert (
        config.moe.gate == "threshold" and config.gate_options["threshold"]["threshold"] == 0.5
    )
    assert config.checkpoint.save_interval == 5 and caplog.messages == []


def test_dropped_settings_can_cost_others_their_effect(tmp_path, caplog):
    stored = {"train": {"save_interval": 5, "keep_last": 2, "keep_every": 3}}
    path = run_json(tmp_path, stored)
    assert parse(["--config", path]) == parse([])
    assert len(caplog.messages) == 1
    config = parse(["--config", path, "--save", "x", "--keep-last", "0"])
    assert (config.checkpoint.save_interval, config.checkpoint.keep_every) == (5, 0)


OWN_LOAD = {"load": "a", "load_step": 2, "load_optim": False, "load_rng": False}
OWN_LOAD |= {"load_or_init": True, "override_lr_schedule": True}


def test_options_of_stored_load_stay_there(tmp_path, caplog):
    """They are about the checkpoint that the stored run loaded, not the one of the flag."""
    path = run_json(tmp_path, {"train": OWN_LOAD})
    stored = parse(["--config", path]).checkpoint
    assert dataclasses.asdict(stored) == {**dataclasses.asdict(CheckpointConfig()), **OWN_LOAD}
    assert caplog.messages == []
    words = ["--config", path, "--load", "b"]
    assert parse(words).checkpoint == CheckpointConfig(load="b")
    assert caplog.messages == [
        "--load-step=2 --load-or-init --no-load-optim --no-load-rng --override-lr-schedule of "
        f"{path} are about the checkpoint that its run loaded: not used with the --load given "
        "here"
    ]
    given = CheckpointConfig(load="b", load_step=3, load_rng=False)
    assert parse([*words, "--load-step", "3", "--no-load-rng"]).checkpoint == given


@pytest.mark.parametrize("words", [["--load", "b"], ["--load", "b", "--skip-train"]])
def test_stored_finetuning_is_not_repeated(words, tmp_path):
    path = run_json(tmp_path, {"train": {"load": "a", "load_step": 2, "finetune": True}})
    assert parse(["--config", path, *words]).checkpoint == CheckpointConfig(load="b")
    assert parse(["--config", path, *words, "--load-step", "6"]).checkpoint.load_step == 6


def test_flags_over_a_dense_run_json_need_experts(tmp_path):
    path = run_json(tmp_path, {"moe": {"num_experts": 0}})
    with pytest.raises(ValueError, match="--gate is 'hash'; it has an effect only with"):
        parse(["--config", path, "--gate", "hash"])
    assert parse(["--config", path, "--gate", "hash", "--num-experts", "4"]).moe.gate == "hash"


def test_experts_of_peer_can_be_removed(tmp_path):
    peer = parse(["--gate", "peer", "--peer-num-experts", "16"])
    path = run_json(tmp_path, peer.to_dict())
    assert parse(["--config", path]) == peer
    assert parse(["--config", path, "--num-experts", "0"]) == parse([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"peer_tokp": 3},
            r"unknown key 'gate_options\.peer\.peer_tokp'; did you mean .*topk'.",
        ),
        ({"peer_topk": "x"}, r"gate_options\.peer\.peer_topk is 'x'; allowed: an integer"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--gate", "hash")])
def test_stored_options_of_peer_are_checked(tmp_path, options, message, words):
    """They are used before other options, because the number of experts follows from them."""
    moe = {"gate": "peer", "num_experts": 16}
    path = run_json(tmp_path, {"moe": moe, "gate_options": options})
    with pytest.raises(ValueError, match=f"^{path}: {message}$"):
        parse(["--config", path, *words])


def test_settings_of_old_checkpoints_stay_readable():
    """Checkpoints may hold options without effect, which earlier versions accepted."""
    stored = RunConfig(
        model=ModelConfig(position_embedding_type="learned", rotary_base=500.0),
        moe=MoEConfig(moe_shared_experts=2, moe_expert_parallel_size=2),
        optimizer=OptimizerConfig(lr_decay_style="constant", min_lr=1e-5),
    )
    assert config_from_dict(json.loads(json.dumps(stored.to_dict()))) == stored
    expected = RunConfig(
        model=ModelConfig(position_embedding_type="learned"),
        optimizer=OptimizerConfig(lr_decay_style="constant"),
    )
    assert reset_without_effect(stored) == expected
    assert reset_without_effect(expected) is expected
    keep_every = dataclasses.replace(stored.checkpoint, keep_last=1, keep_every=1)
    chained = dataclasses.replace(stored, checkpoint=keep_every)
    assert reset_without_effect(chained) == expected


@pytest.mark.parametrize("version", [2, 3])
def test_dense_run_may_have_stored_a_gate(version):
    options = {"threshold": 0.5}
    if version == 3:
        options = {"threshold": options}
    content = {"version": version, "moe": {"gate": "threshold"}, "gate_options": options}
    stored = config_from_dict(content)
    assert stored.gate_options == {"threshold": {"threshold": 0.5}}
    assert reset_without_effect(stored) == RunConfig()


def test_rows_of_metrics_may_be_lost_without_checkpoints():
    config = parse(["--metrics-file", "m.jsonl", "--on-save-error", "continue"])
    assert config.checkpoint.on_save_error == "continue"


def test_evaluation_resets_options_of_training(caplog):
    """--skip-train is added to the command line of a training."""
    words = (
        "--load out --save out --save-interval 5 --train-iters 20 --log-interval 1 --finetune"
    )
    config = parse([*words.split(), "--skip-train"])
    assert config.checkpoint.save_interval == 0
    assert config.train.train_iters == 0
    assert not config.checkpoint.finetune
    (message,) = caplog.messages
    assert message.count("--save-interval is 5") == 1
