"""Metadata of a run, and compatibility of a checkpoint with the run that loads it."""

import hashlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron import log
from megatron.checkpoint.compatibility import (
    DATA_ORDER_FIELDS,
    SCHEDULE_FIELDS,
    TOKENIZER_FIELDS,
    check_same_run,
    check_same_schedule,
    warn_of_changes,
)
from megatron.checkpoint.metadata import RunMetadata, describe_data
from megatron.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RotaryConfig,
    RunConfig,
    TrainConfig,
)
from megatron.parallel.groups import Groups

IDENTITY = {"tokenizer_name": "a", "tokenizer_vocab_size": 10, "tokenizer_fingerprint": "f"}


def test_compared_names_are_config_fields():
    for table in (DATA_ORDER_FIELDS, {"optimizer": SCHEDULE_FIELDS}):
        for section, names in table.items():
            assert all(hasattr(getattr(RunConfig(), section), name) for name in names)


def test_contradiction_is_named():
    saved = RunMetadata(RunConfig(), IDENTITY)
    assert check_same_run(saved, RunMetadata(RunConfig(), dict(IDENTITY)), "x") is None
    with pytest.raises(
        ValueError,
        match=r"--num-layers is 8 but checkpoint x was made with 4; use the checkpoint's",
    ):
        check_same_run(
            saved, RunMetadata(RunConfig(model=ModelConfig(num_layers=8)), IDENTITY), "x"
        )
    for key, what in TOKENIZER_FIELDS.items():
        with pytest.raises(ValueError, match=f"{what} is 'other'"):
            check_same_run(saved, RunMetadata(RunConfig(), {**IDENTITY, key: "other"}), "x")


MODEL_CHANGES = {
    "num_layers": 8,
    "hidden_size": 128,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 32,
    "position_embedding_type": "learned",
    "rotary_base": 5000.0,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-6,
    "activation": "silu",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 64,
    "vocab_size": 999,
    "num_experts": 8,
    "expert_interval": 2,
    "moe_layers": (0,),
    "gate": "hash",
    "expert_type": "swiglu_clamped",
    "moe_weight_on_input": True,
    "moe_latent_size": 8,
    "moe_ffn_hidden_size": 64,
    "moe_shared_experts": 1,
    "moe_first_k_dense": 2,
    "attention": "mla",
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "add_qkv_bias": True,
    "attention_output_bias": True,
    "qk_norm": "head",
    "clip_qkv": 6.0,
    "attention_sinks": True,
    "window_size": 32,
    "window_layers": (1,),
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "rotary_percent": 0.5,
    "rope_scaling": "linear",
    "rope_scaling_factor": 2.0,
    "rope_original_max_positions": 128,
    "rope_low_freq_factor": 2.0,
    "rope_high_freq_factor": 8.0,
    "yarn_beta_fast": 16.0,
    "yarn_beta_slow": 2.0,
    "yarn_truncate": False,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 1.0,
    "yarn_attention_factor": 1.5,
}
"""Another value of each field that changes the model"""

NEEDED = {
    "window_layers": {"window_size": 16},
    "q_lora_rank": {"attention": "mla"},
    "kv_lora_rank": {"attention": "mla"},
    "qk_rope_head_dim": {"attention": "mla"},
    "qk_nope_head_dim": {"attention": "mla"},
    "v_head_dim": {"attention": "mla"},
    "moe_shared_expert_intermediate_size": {"moe_shared_experts": 1},
    "moe_shared_expert_gate": {"moe_shared_experts": 1},
    "rope_scaling_factor": {"rope_scaling": "linear"},
    "rope_original_max_positions": {"rope_scaling": "llama3"},
    "rope_low_freq_factor": {"rope_scaling": "llama3"},
    "rope_high_freq_factor": {"rope_scaling": "llama3"},
    "yarn_beta_fast": {"rope_scaling": "yarn"},
    "yarn_beta_slow": {"rope_scaling": "yarn"},
    "yarn_truncate": {"rope_scaling": "yarn"},
    "yarn_mscale": {"rope_scaling": "yarn", "yarn_mscale_all_dim": 2.0},
    "yarn_mscale_all_dim": {"rope_scaling": "yarn"},
    "yarn_attention_factor": {"rope_scaling": "yarn"},
}
"""Settings without which a field has no effect"""

NAMES_IN_MESSAGES = {
    "swiglu": "--activation",
    "ffn_hidden_size": "the hidden size of an expert",
    "moe_ffn_hidden_size": "the hidden size of an expert",
    "make_vocab_size_divisible_by": "the padded vocabulary size",
    "vocab_size": "the padded vocabulary size",
    "expert_interval": "the list of MoE layers",
    "moe_layers": "the list of MoE layers",
    "moe_first_k_dense": "the list of MoE layers",
}
"""What messages call the fields whose effect is compared; others are called by their flag"""

FREE_CHANGES = {
    "seq_length": 128,
    "max_position_embeddings": 512,
    "init_method_std": 0.01,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "moe_aux_loss_reduction": "mean",
    "moe_train_capacity_factor": 1.0,
    "moe_eval_capacity_factor": 1.0,
    "moe_min_capacity": 8,
    "moe_expert_parallel_size": 2,
    "gate_path": ("/folder/gate.py",),
    "moe_backend": "reference",
    "check_routing": True,
}
"""Another value of each field that a run may change; the first two not with learned positions"""


def with_change(name: str = "", value: object = None, **others: object) -> RunMetadata:
    """Return the metadata of a run with other values of one field of its model, or several."""
    sections = {
        "model": ModelConfig(ffn_hidden_size=256),
        "moe": MoEConfig(num_experts=4),
        "attention": AttentionConfig(),
        "rotary": RotaryConfig(),
    }
    changes = {**others, name: value}
    for key, section in sections.items():
        own = {field: new for field, new in changes.items() if hasattr(section, field)}
        sections[key] = replace(section, **own)
    return RunMetadata(RunConfig(**sections), IDENTITY)


def test_every_model_field_is_compared_or_free():
    sections = (ModelConfig, MoEConfig, AttentionConfig, RotaryConfig)
    names = [field.name for section in sections for field in fields(section)]
    assert sorted(names) == sorted([*MODEL_CHANGES, *FREE_CHANGES])


@pytest.mark.parametrize(("name", "value"), MODEL_CHANGES.items())
def test_changed_model_is_refused(name, value):
    flag = "--" + name.replace("_", "-")
    what = NAMES_IN_MESSAGES.get(name, flag)
    with pytest.raises(ValueError, match=f"^{what} is .* but checkpoint x was made with"):
        needed = NEEDED.get(name, {})
        check_same_run(with_change(**needed), with_change(name, value, **needed), "x")


@pytest.mark.parametrize(("name", "value"), FREE_CHANGES.items())
def test_changes_that_fit_the_weights_are_allowed(name, value):
    assert with_change(name, value).config != with_change().config
    check_same_run(with_change(), with_change(name, value), "x")


def test_finetuning_may_scale_rotary_frequencies(caplog):
    scaled = with_change(rope_scaling="yarn", rope_scaling_factor=4.0)
    finetune = CheckpointConfig(load="x", finetune=True)
    new_run = replace(scaled, config=replace(scaled.config, checkpoint=finetune))
    check_same_run(with_change(), new_run, "x")
    assert caplog.messages == [
        "rotary frequencies are scaled in another way than in the checkpoint: --rope-scaling yarn "
        "instead of none, --rope-scaling-factor 4.0 instead of 8.0, "
        "--rope-original-max-positions 256 instead of 0"
    ]


def test_original_positions_default_to_the_models():
    unset = with_change(rope_scaling="llama3")
    check_same_run(
        unset, with_change("rope_original_max_positions", 256, rope_scaling="llama3"), "x"
    )
    longer = with_change("max_position_embeddings", 512, rope_scaling="llama3")
    with pytest.raises(
        ValueError, match="--rope-original-max-positions is 512 but checkpoint x"
    ):
        check_same_run(unset, longer, "x")


def test_length_and_rate_may_change():
    other = RunConfig(
        optimizer=OptimizerConfig(lr=1.0), train=TrainConfig(train_iters=7, micro_batch_size=9)
    )
    assert (
        check_same_run(RunMetadata(RunConfig(), IDENTITY), RunMetadata(other, IDENTITY), "x")
        is None
    )


@pytest.mark.parametrize(
    "saved, same",
    [
        (ModelConfig(swiglu=True), ModelConfig(activation="swiglu")),
        (
            ModelConfig(),
            ModelConfig(
                ffn_hidden_size=1024, num_query_groups=4, kv_channels=64, vocab_size=10
            ),
        ),
    ],
)
def test_same_model_by_other_flags(saved, same):
    assert (
        check_same_run(
            RunMetadata(RunConfig(saved), IDENTITY), RunMetadata(RunConfig(same), IDENTITY), "x"
        )
        is None
    )


def test_moe_layers_are_compared_resolved():
    def metadata(**moe):
        return RunMetadata(RunConfig(moe=MoEConfig(num_experts=4, **moe)), IDENTITY)

    assert (
        check_same_run(
            metadata(expert_interval=2),
            metadata(moe_layers=(1, 3), moe_ffn_hidden_size=1024),
            "x",
        )
        is None
    )
    with pytest.raises(
        ValueError, match=r"list of MoE layers is \[0, 1, 2, 3\] but .* made with \[1, 3\]"
    ):
        check_same_run(metadata(expert_interval=2), metadata(), "x")


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_other_batch_keeps_the_schedule(unit):
    """In samples or tokens, only the number of iterations follows the batch."""
    options = {f"lr_decay_{unit}": 5000, f"lr_warmup_{unit}": 100}
    for optimizer in (OptimizerConfig(**options), OptimizerConfig()):
        config = RunConfig(optimizer=optimizer, train=TrainConfig(**{f"train_{unit}": 9000}))
        saved = RunMetadata(config, IDENTITY, global_batch_size=8, iterations=50)
        other = replace(saved, global_batch_size=16, iterations=25)
        assert check_same_schedule(saved, other, "x") is None


@pytest.mark.parametrize(
    "length, message",
    [
        (
            {"train_tokens": 9001},
            "the run's number of tokens, which its learning rates follow, is 9001 but checkpoint x "
            "was made with 9000; use .*--override-lr-schedule",
        ),
        (
            {"train_iters": 50},
            "the run's length, which its learning rates follow, is '50 iterations' but checkpoint "
            "x was made with '9000 tokens'",
        ),
    ],
)
def test_schedule_follows_length_in_its_unit(length, message):
    config = RunConfig(train=TrainConfig(train_tokens=9000))
    saved = RunMetadata(config, IDENTITY, global_batch_size=8, iterations=50)
    other = replace(saved, config=RunConfig(train=TrainConfig(**length)))
    with pytest.raises(ValueError, match=message):
        check_same_schedule(saved, other, "x")


def test_old_warmup_fraction_is_refused():
    """Versions that did not record the number of samples counted it of the run."""
    optimizer = OptimizerConfig(lr_warmup_fraction=0.1, lr_decay_iters=50)
    old = RunMetadata(RunConfig(optimizer=optimizer), IDENTITY, iterations=100)
    with pytest.raises(
        ValueError,
        match="--lr-warmup-fraction 0.1 is a fraction of the decay now, but .* checkpoint x; add "
        "--override-lr-schedule, .* set --lr-warmup-fraction 0 --lr-warmup-iters 10",
    ):
        check_same_schedule(old, replace(old, samples=800), "x")
    new = replace(old, samples=800)
    assert check_same_schedule(new, new, "x") is None


def test_changed_gate_options_are_logged(capsys):
    log.setup()
    saved = RunMetadata(
        RunConfig(gate_options={"topk": {"topk": 2, "loss_coeff": 0.1}}), IDENTITY
    )
    options = {"topk": {"topk": 1, "loss_coeff": 0.1}}
    warn_of_changes(saved, replace(saved, config=RunConfig(gate_options=options)))
    assert (
        "the gate continues with other options than the checkpoint's: --topk 1 instead of 2"
        in capsys.readouterr().out
    )


def run_of_topk_gate(**options: object) -> RunMetadata:
    """Return the metadata of a run that stored these options of its gate, and no others."""
    moe = MoEConfig(num_experts=4)
    return RunMetadata(RunConfig(moe=moe, gate_options={"topk": options}), IDENTITY)


def test_options_that_older_versions_do_not_store_have_their_defaults(capsys):
    """Only what differs from the default is a change."""
    log.setup()
    saved = run_of_topk_gate(topk=2)
    options = {"topk": 2, "router_norm": False, "loss_coeff": 0.01}
    same = run_of_topk_gate(**options)
    assert check_same_run(saved, same, "x") is None
    warn_of_changes(saved, same)
    assert capsys.readouterr().out == ""
    warn_of_changes(saved, run_of_topk_gate(**options, logit_scale=2.0))
    assert "checkpoint's: --logit-scale 2.0 instead of 1.0\n" in capsys.readouterr().out


def test_gate_options_that_change_its_parameters_are_refused():
    """All changed options are named, since any of them may be the one that does not fit."""
    saved = run_of_topk_gate(topk=2, loss_coeff=0.01)
    changed = run_of_topk_gate(router_bias=False, loss_coeff=0.1, topk=2, num_null_experts=2)
    with pytest.raises(
        ValueError,
        match="^gate topk has other parameters than in checkpoint x: --loss-coeff 0.1 instead of "
        "0.01, --num-null-experts 2 instead of 0; use the checkpoint's options, or start a new "
        "run without --load$",
    ):
        check_same_run(saved, changed, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_aux_loss_reduction", "mean"),
        ("moe_train_capacity_factor", 1.25),
        ("moe_eval_capacity_factor", 2.0),
    ],
)
def test_changed_moe_settings_are_logged(name, value, capsys):
    """Such as the mean over layers of a run that older versions have written."""
    log.setup()
    new = getattr(MoEConfig(), name)
    flag = "--" + name.replace("_", "-")
    warn_of_changes(with_change(name, value), with_change())
    assert (
        "the MoE layers continue with other settings than the checkpoint's: "
        f"{flag} {new} instead of {value}\n"
    ) in capsys.readouterr().out
    dense = RunMetadata(RunConfig(moe=MoEConfig(**{name: value})), IDENTITY)
    warn_of_changes(dense, replace(dense, config=RunConfig()))
    assert capsys.readouterr().out == ""


def test_changed_topology_is_logged(capsys):
    log.setup()
    saved = RunMetadata(RunConfig(), IDENTITY, {"ranks": 2, "zero_stage": 1})
    warn_of_changes(saved, replace(saved, topology={"ranks": 4, "zero_stage": 3}))
    assert (
        "made with ranks 2, zero stage 1; the run continues with ranks 4, zero stage 3"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 1.0}, "--lr is 1.0 but checkpoint x was made with 0.0003"),
        ({"lr_decay_style": "linear"}, "--lr-decay-style is 'linear'"),
        ({"min_lr": 1e-5}, "--min-lr is 1e-05"),
        ({"lr_warmup_iters": 3}, "--lr-warmup-iters is 3"),
    ],
)
def test_changed_schedule_is_refused(changes, message):
    saved = RunMetadata(RunConfig(), IDENTITY, iterations=100)
    assert (
        check_same_schedule(
            saved, replace(saved, config=RunConfig(train=TrainConfig(train_iters=7))), "x"
        )
        is None
    )
    with pytest.raises(ValueError, match=f"{message}.*add --override-lr-schedule"):
        check_same_schedule(
            saved, replace(saved, config=RunConfig(optimizer=OptimizerConfig(**changes))), "x"
        )


@pytest.mark.parametrize(
    "options, follows",
    [
        ({}, True),
        ({"lr_decay_style": "constant"}, False),
        ({"lr_decay_iters": 50}, False),
        ({"lr_decay_tokens": 50}, False),
        ({"lr_decay_style": "constant", "lr_warmup_fraction": 0.1}, True),
    ],
)
def test_longer_run_may_change_schedule(options, follows):
    """It does when the learning rates follow the length of the run."""
    saved = RunMetadata(
        RunConfig(optimizer=OptimizerConfig(**options)), IDENTITY, iterations=100
    )
    if not follows:
        assert check_same_schedule(saved, replace(saved, iterations=200), "x") is None
        return
    with pytest.raises(
        ValueError,
        match="the run's number of iterations, .*, is 200 but checkpoint x .* with 100",
    ):
        check_same_schedule(saved, replace(saved, iterations=200), "x")


def test_stored_options_without_effect_are_not_compared(capsys):
    """Checkpoints of earlier versions may hold options that flags can no longer set."""
    log.setup()
    model = ModelConfig(position_embedding_type="learned", ffn_hidden_size=48)
    moe = MoEConfig(num_experts=4, moe_ffn_hidden_size=32)
    constant = OptimizerConfig(lr_decay_style="constant")
    current = RunMetadata(
        RunConfig(
            model=replace(model, ffn_hidden_size=0),
            moe=moe,
            optimizer=constant,
            data=DataConfig(train_data_path=("a",)),
        ),
        IDENTITY,
    )
    config = RunConfig(
        model=replace(model, rotary_base=500.0),
        moe=moe,
        optimizer=replace(constant, min_lr=1e-5, lr_decay_iters=9),
        data=DataConfig(train_data_path=("a",), split="8,1,1"),
    )
    saved = replace(current, config=config)
    check_same_run(saved, current, "x")
    check_same_schedule(saved, current, "x")
    warn_of_changes(saved, current)
    assert capsys.readouterr().out == ""
    dense_first = replace(moe, moe_first_k_dense=1)  # its width is the dense layer's
    dense = RunConfig(model=config.model, moe=dense_first)
    other = RunConfig(model=replace(config.model, ffn_hidden_size=64), moe=dense_first)
    with pytest.raises(ValueError, match="--ffn-hidden-size is 64 but"):
        check_same_run(replace(saved, config=dense), replace(saved, config=other), "x")


class Words:
    name, vocab_size, fingerprint = "words", 10, "f"


def test_metadata_survives_json(data):
    config = RunConfig(
        data=DataConfig(data_path=("0.5", data, "0.5", "nowhere")),
        optimizer=OptimizerConfig(bf16=True),
        checkpoint=CheckpointConfig(save="checkpoints"),
    )
    groups = Groups(world_size=4, ep_size=2)
    described = describe_data(config, Groups())
    metadata = RunMetadata.of(config, groups, Words(), 8, 100, data=described)
    state = json.loads(json.dumps(metadata.to_state()))
    assert RunMetadata.from_state(config, state) == metadata
    assert metadata.topology == {
        "ranks": 4,
        "expert_parallel_size": 2,
        "zero_stage": 1,
        "precision": "bf16",
    }
    assert metadata.data["nowhere"] == {} and state["versions"].keys() >= {
        "torch",
        "deepspeed",
        "python",
    }
    described = metadata.data[data]
    assert described["bin_bytes"] == Path(data + ".bin").stat().st_size
    assert (
        described["sidecar_sha256"]
        == hashlib.sha256(Path(data + ".json").read_bytes()).hexdigest()
    )


def test_learned_positions_must_be_equal():
    def learned(n):
        return RunMetadata(
            RunConfig(
                model=ModelConfig(position_embedding_type="learned", max_position_embeddings=n)
            ),
            IDENTITY,
        )

    with pytest.raises(
        ValueError, match="--max-position-embeddings is 512 but checkpoint x was made with 256"
    ):
        check_same_run(learned(256), learned(512), "x")


@pytest.mark.parametrize(
    "gate, option, old, new",
    [
        ("peer", "peer_num_heads", 4, 2),
        ("peer", "peer_query_norm", "batch", "layer"),
        ("peer", "peer_product_key_dim", (8, 2), (4, 4)),
        ("moepp", "num_zero_experts", 1, 2),
        ("cosine", "proj_dim", 4, 5),
        ("tcmoe", "topk", 2, 3),
    ],
)
def test_shape_of_gate_cannot_change(gate, option, old, new):
    def metadata(value):
        moe = MoEConfig(num_experts=16, gate=gate)
        return RunMetadata(RunConfig(moe=moe, gate_options={gate: {option: value}}), IDENTITY)

    flag = "--" + option.replace("_", "-")
    with pytest.raises(
        ValueError,
        match=f"{gate} has other parameters than in checkpoint x: {flag} {re.escape(str(new))} "
        f"instead of {re.escape(str(old))};",
    ):
        check_same_run(metadata(old), metadata(new), "x")


def test_other_gate_options_may_change():
    def metadata(**options):
        return RunMetadata(
            RunConfig(moe=MoEConfig(num_experts=4), gate_options={"topk": options}), IDENTITY
        )

    assert (
        check_same_run(metadata(topk=2, loss_coeff=0.01), metadata(topk=3, loss_coeff=0.1), "x")
        is None
    )
