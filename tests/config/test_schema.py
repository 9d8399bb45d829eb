"""Config sections: the checks of their fields, and the sizes they derive."""

import dataclasses

import pytest

from megatron.config.fields import require
from megatron.config.schema import (
    RUN_JSON_LAYOUT,
    SECTIONS,
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    FaultToleranceConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RotaryConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatron.config.training import RunLength

REFUSED = [
    (ModelConfig, {"num_layers": 0}, "--num-layers is 0; allowed: a positive integer"),
    (ModelConfig, {"hidden_size": -1}, "--hidden-size is -1; allowed: a positive integer"),
    (
        ModelConfig,
        {"num_attention_heads": 0},
        "--num-attention-heads is 0; allowed: a positive integer",
    ),
    (ModelConfig, {"seq_length": 0}, "--seq-length is 0; allowed: a positive integer"),
    (
        ModelConfig,
        {"make_vocab_size_divisible_by": 0},
        "--make-vocab-size-divisible-by is 0; allowed: a positive",
    ),
    (
        ModelConfig,
        {"activation": "tanh"},
        "--activation is 'tanh'; allowed: gelu relu silu swiglu geglu",
    ),
    (
        ModelConfig,
        {"activation": "relu", "swiglu": True},
        "--activation is 'relu'; allowed: only swiglu with --swiglu",
    ),
    (
        ModelConfig,
        {"position_embedding_type": "alibi"},
        "--position-embedding-type is 'alibi'; allowed: rope learned",
    ),
    (
        ModelConfig,
        {"normalization": "rms"},
        "--normalization is 'rms'; allowed: RMSNorm LayerNorm",
    ),
    (
        ModelConfig,
        {"num_query_groups": 3},
        "--num-query-groups is 3; allowed: a divisor of the 4 heads",
    ),
    (ModelConfig, {"num_query_groups": -4}, "--num-query-groups is -4; allowed: 0 or more"),
    (
        ModelConfig,
        {"max_position_embeddings": 8},
        "--max-position-embeddings is 8; allowed: at least the sequence",
    ),
    (
        ModelConfig,
        {"attention_dropout": 1.0},
        "--attention-dropout is 1.0; allowed: 0 <= p < 1",
    ),
    (ModelConfig, {"hidden_dropout": -0.1}, "--hidden-dropout is -0.1; allowed: 0 <= p < 1"),
    (AttentionConfig, {"attention": "mha"}, "--attention is 'mha'; allowed: gqa mla"),
    (AttentionConfig, {"q_lora_rank": -1}, "--q-lora-rank is -1; allowed: 0 or more"),
    *[
        (AttentionConfig, {name: 0}, f"--{name.replace('_', '-')} is 0; allowed: a positive")
        for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    ],
    (AttentionConfig, {"qk_norm": "rms"}, "--qk-norm is 'rms'; allowed: none head all-heads"),
    (AttentionConfig, {"clip_qkv": -1.0}, "--clip-qkv is -1.0; allowed: 0 or more"),
    (AttentionConfig, {"window_size": -1}, "--window-size is -1; allowed: 0 or more"),
    (RotaryConfig, {"rotary_percent": 1.5}, "--rotary-percent is 1.5; allowed: 0 < share <= 1"),
    (
        RotaryConfig,
        {"rope_scaling": "ntk"},
        "--rope-scaling is 'ntk'; allowed: none linear llama3 yarn",
    ),
    *[
        (RotaryConfig, {name: 0.0}, f"--{name.replace('_', '-')} is 0.0; allowed: a positive")
        for name in ("rope_scaling_factor", "rope_low_freq_factor", "yarn_beta_slow")
    ],
    *[
        (RotaryConfig, {name: -1}, f"--{name.replace('_', '-')} is -1; allowed: 0 or more")
        for name in (
            "rope_original_max_positions",
            "yarn_mscale",
            "yarn_mscale_all_dim",
            "yarn_attention_factor",
        )
    ],
    (
        RotaryConfig,
        {"rope_high_freq_factor": 1.0},
        "--rope-high-freq-factor is 1.0; allowed: above --rope-low-freq-factor, which is 1.0",
    ),
    (
        RotaryConfig,
        {"yarn_beta_fast": 0.5},
        "--yarn-beta-fast is 0.5; allowed: above --yarn-beta-slow, which is 1.0",
    ),
    *[
        (MoEConfig, {name: -1}, f"--{name.replace('_', '-')} is -1; allowed: 0 or more")
        for name in (
            "num_experts",
            "moe_shared_experts",
            "moe_shared_expert_intermediate_size",
            "moe_first_k_dense",
            "moe_train_capacity_factor",
            "moe_eval_capacity_factor",
            "moe_min_capacity",
            "moe_ffn_hidden_size",
        )
    ],
    (
        MoEConfig,
        {"moe_aux_loss_reduction": "max"},
        "--moe-aux-loss-reduction is 'max'; allowed: sum mean",
    ),
    (MoEConfig, {"expert_interval": 0}, "--expert-interval is 0; allowed: a positive integer"),
    (MoEConfig, {"moe_latent_size": 0}, "--moe-latent-size is 0; allowed: a positive integer"),
    (
        MoEConfig,
        {"moe_layers": (1,), "expert_interval": 2, "num_experts": 4},
        r"--moe-layers is \[1\]; allowed: only without --expert-interval and --moe-first-k-dense",
    ),
    (
        MoEConfig,
        {"moe_expert_parallel_size": 0},
        "--moe-expert-parallel-size is 0; allowed: a positive integer",
    ),
    (
        MoEConfig,
        {"num_experts": 6, "moe_expert_parallel_size": 4},
        "--num-experts is 6; allowed: a multiple of --moe-expert-parallel-size, which is 4",
    ),
    (
        TokenizerConfig,
        {"tokenizer_type": "BPE"},
        "--tokenizer-type is 'BPE'; allowed: GPT2BPETokenizer HuggingFace",
    ),
    (
        DataConfig,
        {"data_path": ("a",), "train_data_path": ("b",)},
        r"--train-data-path is \['b'\]; allowed: only without --data-path",
    ),
    (
        DataConfig,
        {"data_args_path": "f", "data_path": ("a",)},
        "--data-args-path is 'f'; allowed: only without --data-path. Use one of them.",
    ),
    (
        DataConfig,
        {"per_split_data_args_path": "f", "data_args_path": "g", "test_data_path": ("a",)},
        "--per-split-data-args-path is 'f'; allowed: only without --data-args-path and "
        "--test-data-path",
    ),
    (
        DataConfig,
        {"mock_data": True, "streaming_data_path": ("a",), "valid_sets": ("x=a",)},
        "--mock-data is True; allowed: only without --valid-sets and --streaming-data-path",
    ),
    (
        DataConfig,
        {"valid_sets": ("a", "x=b")},
        "the first word of --valid-sets is 'a'; allowed: name=prefix, with a name of letters",
    ),
    (
        DataConfig,
        {"valid_sets": ("x/y=b",)},
        "the first word of --valid-sets is 'x/y=b'; allowed: name=prefix",
    ),
    (
        DataConfig,
        {"valid_sets": ("x=b", "x=c")},
        "a name of --valid-sets is 'x'; allowed: each name once",
    ),
    (
        DataConfig,
        {"valid_sets": ("x=", "y=c")},
        "the set x of --valid-sets is ''; allowed: one prefix or more",
    ),
    (
        TrainConfig,
        {"skip_train": True, "eval_iters": 0},
        "--eval-iters is 0; allowed: a positive integer with --skip-train",
    ),
    (DataConfig, {"num_workers": -1}, "--num-workers is -1; allowed: 0 or more"),
    (
        OptimizerConfig,
        {"lr_decay_style": "step"},
        "--lr-decay-style is 'step'; allowed: cosine linear inverse-square-root constant wsd",
    ),
    (DeepSpeedConfig, {"zero_stage": 4}, "--zero-stage is 4; allowed: 0 1 2 3"),
    *[
        (ModelConfig, {name: -1}, f"--{name.replace('_', '-')} is -1; allowed: 0 or more")
        for name in (
            "ffn_hidden_size",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
        )
    ],
    *[
        (
            ModelConfig,
            {name: 0.0},
            f"--{name.replace('_', '-')} is 0.0; allowed: a positive number",
        )
        for name in ("rotary_base", "norm_epsilon", "init_method_std")
    ],
    (OptimizerConfig, {"adam_eps": 0.0}, "--adam-eps is 0.0; allowed: a positive number"),
    (OptimizerConfig, {"lr": 0.0}, "--lr is 0.0; allowed: a positive number"),
    (
        OptimizerConfig,
        {"lr": 1e-3, "min_lr": 1e-2},
        "--min-lr is 0.01; allowed: 0 to --lr, which is 0.001",
    ),
    (OptimizerConfig, {"min_lr": -1.0}, "--min-lr is -1.0; allowed: 0 to --lr"),
    *[
        (OptimizerConfig, {name: -1}, f"--{name.replace('_', '-')} is -1; allowed: 0 or more")
        for name in (
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_warmup_tokens",
            "lr_decay_iters",
            "lr_decay_samples",
            "lr_decay_tokens",
            "weight_decay",
            "clip_grad",
        )
    ],
    (
        OptimizerConfig,
        {"lr_warmup_fraction": 1.5},
        "--lr-warmup-fraction is 1.5; allowed: 0 to 1",
    ),
    (
        OptimizerConfig,
        {"lr_wsd_decay_fraction": -0.5},
        "--lr-wsd-decay-fraction is -0.5; allowed: 0 to 1",
    ),
    (OptimizerConfig, {"adam_beta1": 1.0}, "--adam-beta1 is 1.0; allowed: 0 <= beta < 1"),
    (OptimizerConfig, {"adam_beta2": -0.1}, "--adam-beta2 is -0.1; allowed: 0 <= beta < 1"),
    (
        OptimizerConfig,
        {"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1},
        r"--lr-warmup-\* is \['lr_warmup_iters', 'lr_warmup_fraction'\]; "
        "allowed: one of iters, samples, tokens, fraction",
    ),
    (
        OptimizerConfig,
        {"lr_decay_iters": 1, "lr_decay_tokens": 2},
        "--lr-decay-tokens is 2; allowed: only without --lr-decay-iters. Use one of them.",
    ),
    (
        OptimizerConfig,
        {"lr_decay_iters": 1, "lr_decay_samples": 3, "lr_decay_tokens": 2},
        "--lr-decay-tokens is 2; allowed: only without --lr-decay-iters and --lr-decay-samples",
    ),
    (
        OptimizerConfig,
        {"lr_wsd_decay_style": "sqrt"},
        "--lr-wsd-decay-style is 'sqrt'; allowed: linear cosine exponential minus_sqrt",
    ),
    (
        OptimizerConfig,
        {"bf16": True, "fp16": True},
        "--fp16 is True; allowed: only without --bf16",
    ),
    (
        TrainConfig,
        {"micro_batch_size": 0},
        "--micro-batch-size is 0; allowed: a positive integer",
    ),
    (TrainConfig, {"log_interval": 0}, "--log-interval is 0; allowed: a positive integer"),
    *[
        (TrainConfig, {name: -1}, f"--{name.replace('_', '-')} is -1; allowed: 0 or more")
        for name in (
            "global_batch_size",
            "train_iters",
            "train_samples",
            "train_tokens",
            "eval_interval",
            "eval_iters",
        )
    ],
    (
        CheckpointConfig,
        {"save_interval": -1},
        "--save-interval is -1; allowed: 0 or more",
    ),
    *[
        (
            FaultToleranceConfig,
            {name: -1},
            f"--{name.replace('_', '-')} is -1; allowed: 0 or more",
        )
        for name in (
            "exit_interval",
            "exit_duration_in_mins",
            "max_bad_steps",
            "loss_spike_threshold",
        )
    ],
    (
        FaultToleranceConfig,
        {"loss_spike_window": 7},
        "--loss-spike-window is 7; allowed: 8 or more",
    ),
    (
        FaultToleranceConfig,
        {"loss_spike_action": "pray"},
        "--loss-spike-action is 'pray'; allowed: log stop",
    ),
    *[
        (
            CheckpointConfig,
            {"load": "x", name: -1},
            f"--{name.replace('_', '-')} is -1; allowed: 0 or more",
        )
        for name in ("keep_last", "keep_every", "load_step")
    ],
    (
        CheckpointConfig,
        {"on_save_error": "weep"},
        "--on-save-error is 'weep'; allowed: stop continue",
    ),
    (
        TrainConfig,
        {"train_iters": 1, "train_tokens": 2},
        "--train-tokens is 2; allowed: only without --train-iters",
    ),
    (
        TrainConfig,
        {"train_iters": 1, "train_samples": 2},
        "--train-samples is 2; allowed: only without --train-iters",
    ),
    *[
        (TrainConfig, {"rampup_batch_size": ramp}, "allowed: three positive integers: the")
        for ramp in ((8, 8), (8, 8, 0), (0, 8, 100), (8, 8, 100, 1))
    ],
    *[
        (
            TrainConfig,
            {"global_batch_size": 32, "rampup_batch_size": ramp},
            rf"--rampup-batch-size is \{list(ramp)}; allowed: a first batch below the global "
            "batch of 32 samples, and an increment that divides the difference",
        )
        for ramp in ((32, 8, 100), (40, 8, 100), (8, 7, 100))
    ],
    (
        FaultToleranceConfig,
        {"timeout_minutes": 0.0},
        "--timeout-minutes is 0.0; allowed: a positive number",
    ),
    (
        FaultToleranceConfig,
        {"timeout_minutes": 1e300},
        r"--timeout-minutes is 1e\+300; allowed: up to a year",
    ),
]


@pytest.mark.parametrize(
    "cls, values, message", REFUSED, ids=[f"{c.__name__}-{v}" for c, v, _ in REFUSED]
)
def test_sections_refuse_invalid_values(cls, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        cls(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", SECTIONS.values())
def test_section_defaults_are_valid_and_frozen(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, None)


def test_require_states_advice_if_given():
    require(True, "--x", 1, "2")
    with pytest.raises(ValueError, match=r"^--x is 1; allowed: 2$"):
        require(False, "--x", 1, "2")
    with pytest.raises(ValueError, match=r"^--x is '1'; allowed: 2\. Set 2\.$"):
        require(False, "--x", "1", "2", "Set 2.")


def test_model_config_derives_sizes():
    model = ModelConfig(hidden_size=768, num_attention_heads=12, seq_length=1024)
    assert (model.query_groups, model.head_size, model.max_positions, model.act) == (
        12,
        64,
        1024,
        "gelu",
    )
    assert model.ffn_size == 3072
    assert dataclasses.replace(model, activation="geglu").ffn_size == 2048
    assert (
        dataclasses.replace(model, hidden_size=100, num_attention_heads=2, swiglu=True).ffn_size
        == 320
    )
    assert dataclasses.replace(model, ffn_hidden_size=5).ffn_size == 5
    assert dataclasses.replace(model, swiglu=True).act == "swiglu"
    assert dataclasses.replace(model, num_query_groups=4, kv_channels=32).head_size == 32
    assert dataclasses.replace(model, max_position_embeddings=2048).max_positions == 2048
    assert [model.padded_vocab(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_is_moe_layer_follows_the_flags():
    def moe_layers(**values):
        return [i for i in range(6) if MoEConfig(**values).is_moe_layer(i)]

    assert moe_layers() == []
    assert moe_layers(num_experts=4) == [0, 1, 2, 3, 4, 5]
    assert moe_layers(num_experts=4, expert_interval=2) == [1, 3, 5]
    assert moe_layers(num_experts=4, expert_interval=2, moe_first_k_dense=2) == [3, 5]
    assert moe_layers(num_experts=4, moe_layers=(0, 4)) == [0, 4]


def test_precision_follows_bf16_and_fp16():
    assert [OptimizerConfig(**v).precision for v in ({}, {"bf16": True}, {"fp16": True})] == [
        "fp32",
        "bf16",
        "fp16",
    ]


def test_train_config_derives_the_batch():
    train = TrainConfig(micro_batch_size=2, train_tokens=1001)
    assert train.global_batch(4) == 8
    assert dataclasses.replace(train, global_batch_size=16).global_batch(4) == 16
    with pytest.raises(
        ValueError,
        match="--global-batch-size is 12; allowed: a multiple of --micro-batch-size 2 x 4",
    ):
        dataclasses.replace(train, global_batch_size=12).global_batch(4)


def test_run_length_has_its_own_unit():
    assert TrainConfig().length is None
    assert TrainConfig(train_iters=7).length == RunLength("iterations", 7)
    assert TrainConfig(train_samples=8).length == RunLength("samples", 8)
    assert TrainConfig(train_tokens=9).length == RunLength("tokens", 9)
    assert TrainConfig(train_tokens=9).length.field == "train_tokens"


def test_experts_require_zero():
    for ep in (1, 2):
        moe = MoEConfig(num_experts=4, moe_expert_parallel_size=ep)
        with pytest.raises(
            ValueError,
            match="--zero-stage is 0; allowed: 1, 2 or 3 with experts. DeepSpeed's ZeRO 0",
        ):
            RunConfig(moe=moe, deepspeed=DeepSpeedConfig(zero_stage=0))
    assert RunConfig(deepspeed=DeepSpeedConfig(zero_stage=0)).deepspeed.zero_stage == 0


def test_named_sets_are_parsed():
    sets = ("wiki=a", "code.v-2=0.7", "b", "0.3", "data/lang=en", "c=d", "./e=f")
    assert DataConfig(valid_sets=sets).named_valid_sets == {
        "wiki": ("a",),
        "code.v-2": ("0.7", "b", "0.3", "data/lang=en"),
        "c": ("d", "./e=f"),
    }
    assert DataConfig().named_valid_sets == {}


def test_mock_data_requires_a_vocabulary():
    data = DataConfig(mock_data=True)
    for tokenizer, size in (
        (TokenizerConfig(vocab_file="v", merge_file="m"), 0),
        (TokenizerConfig(tokenizer_type="ByteTokenizer"), 0),
        (TokenizerConfig(), 100),
    ):
        assert RunConfig(model=ModelConfig(vocab_size=size), data=data, tokenizer=tokenizer)
    for size in (0, 1):
        with pytest.raises(
            ValueError,
            match="--mock-data is True; allowed: with --vocab-size above 1, or with the files of "
            "GPT2BPETokenizer. For example: --vocab-size 50257.",
        ):
            RunConfig(model=ModelConfig(vocab_size=size), data=data)


def test_to_dict_is_plain_and_complete():
    options = {"topk": {"topk": 2}}
    content = RunConfig(gate_options=options).to_dict()
    assert list(content) == list(RUN_JSON_LAYOUT) and content["gate_options"] == options
    assert content["model"]["num_layers"] == 4


def test_experts_without_moe_layer_are_refused():
    message = (
        "--expert-interval is 5; allowed: a value that leaves at least one MoE layer among "
        "2 layers, the first 0 of which are dense"
    )
    with pytest.raises(ValueError, match=message):
        RunConfig(
            model=ModelConfig(num_layers=2), moe=MoEConfig(num_experts=4, expert_interval=5)
        )
    with pytest.raises(
        ValueError, match=r"--moe-layers is \[0, 2\]; allowed: blocks from 0 to 1"
    ):
        RunConfig(
            model=ModelConfig(num_layers=2), moe=MoEConfig(num_experts=4, moe_layers=(0, 2))
        )


@pytest.mark.parametrize("kv_channels", [2, 8])
def test_odd_number_of_rotated_dimensions_refused(kv_channels):
    message = (
        f"--rotary-percent is 0.4; allowed: a share of the head's {kv_channels} dimensions that "
        "is an even number of them"
    )
    model = ModelConfig(kv_channels=kv_channels)
    with pytest.raises(ValueError, match=message):
        RunConfig(model=model, rotary=RotaryConfig(rotary_percent=0.4))
    learned = dataclasses.replace(model, position_embedding_type="learned")
    assert RunConfig(model=learned, rotary=RotaryConfig(rotary_percent=0.4))


def test_yarn_needs_a_base_above_one():
    model = ModelConfig(rotary_base=1.0)
    assert RunConfig(model=model)
    message = "--rotary-base is 1.0; allowed: above 1 with --rope-scaling yarn"
    with pytest.raises(ValueError, match=message):
        RunConfig(model=model, rotary=RotaryConfig(rope_scaling="yarn"))


@pytest.mark.parametrize(
    "model, attention, message",
    [
        (
            {"hidden_size": 30},
            {},
            "--num-attention-heads is 4; allowed: a divisor of the hidden size 30. Or set "
            "--kv-channels.",
        ),
        (
            {"kv_channels": 5},
            {},
            "--kv-channels is 5; allowed: an even number with rotary positions",
        ),
        (
            {},
            {"attention": "mla", "qk_rope_head_dim": 5},
            "--qk-rope-head-dim is 5; allowed: an even number with rotary positions",
        ),
    ],
)
def test_sizes_of_heads_fit_together(model, attention, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RunConfig(model=ModelConfig(**model), attention=AttentionConfig(**attention))


def test_latent_heads_are_free_of_hidden_size():
    model = ModelConfig(hidden_size=30, position_embedding_type="learned")
    attention = AttentionConfig(attention="mla", qk_rope_head_dim=5)
    assert RunConfig(model=model, attention=attention).attention.rotary_head_size(model) == 5


def test_windows_belong_to_blocks():
    attention = AttentionConfig(window_size=8, window_layers=(0, 2))
    assert [attention.window_of(i) for i in range(4)] == [8, 0, 8, 0]
    assert AttentionConfig(window_size=8).window_of(3) == 8
    assert RunConfig(model=ModelConfig(num_layers=3), attention=attention)
    message = r"--window-layers is \[0, 2\]; allowed: blocks from 0 to 1"
    with pytest.raises(ValueError, match=message):
        RunConfig(model=ModelConfig(num_layers=2), attention=attention)
