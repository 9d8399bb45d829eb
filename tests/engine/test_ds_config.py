"""DeepSpeed's configuration, value by value, and the merge with a user's file."""

import json

import pytest

from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig
from megatron.engine.ds_config import DECIDED, REFUSED, deepspeed_config

TRAIN = TrainConfig(micro_batch_size=2, global_batch_size=16)


def merged(tmp_path, content, **options):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(
        OptimizerConfig(**options), DeepSpeedConfig(deepspeed_config=str(path)), TRAIN, 4
    )


def test_config_has_the_expected_values():
    assert deepspeed_config(
        OptimizerConfig(bf16=True, clip_grad=0.5), DeepSpeedConfig(zero_stage=2), TRAIN, 4
    ) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_accumulate_in_fp32(stage, precision):
    options = {} if precision == "fp32" else {precision: True}
    config = deepspeed_config(
        OptimizerConfig(**options), DeepSpeedConfig(zero_stage=stage), TRAIN, 1
    )
    assert [config[p]["enabled"] for p in ("bf16", "fp16")] == [
        precision == "bf16",
        precision == "fp16",
    ]
    expected = {"grad_accum_dtype": "fp32"} if precision != "fp32" and stage > 0 else None
    assert (
        config.get("data_types") == expected and config["zero_optimization"]["stage"] == stage
    )


def test_gradients_are_reduced_in_fp32_unless_told():
    for options, expected in (
        ({}, "fp32"),
        ({"bf16": True}, "fp32"),
        ({"fp16": True}, "fp32"),
        ({"bf16": True, "grad_reduce_in_bf16": True}, "bf16"),
    ):
        config = deepspeed_config(OptimizerConfig(**options), DeepSpeedConfig(), TRAIN, 1)
        assert config["communication_data_type"] == expected


def test_clipping_without_zero_is_left_to_the_optimizer(tmp_path):
    """The file may repeat the flag's value all the same."""
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.5}')
    for precision, expected in (({}, 0.0), ({"bf16": True}, 0.5)):
        config = deepspeed_config(
            OptimizerConfig(clip_grad=0.5, **precision),
            DeepSpeedConfig(zero_stage=0, deepspeed_config=str(path)),
            TRAIN,
            1,
        )
        assert config["gradient_clipping"] == expected


def test_deepspeed_accepts_the_config():
    import deepspeed

    for stage in range(4):
        config = deepspeed.DeepSpeedConfig(
            deepspeed_config(
                OptimizerConfig(bf16=True), DeepSpeedConfig(zero_stage=stage), TRAIN, 1
            )
        )
        assert config.gradient_accumulation_steps == 8 and config.gradient_clipping == 1.0
        assert config.bfloat16_config.enabled and not config.float16_config.enabled
        assert config.zero_optimization_stage == stage and config.grad_accum_dtype == (
            "fp32" if stage else None
        )


def test_global_batch_divides_over_ranks():
    with pytest.raises(
        ValueError,
        match="--global-batch-size is 16; allowed: a multiple of --micro-batch-size 2 x 3",
    ):
        deepspeed_config(OptimizerConfig(), DeepSpeedConfig(), TRAIN, 3)


def test_file_is_merged_by_section(tmp_path):
    config = merged(
        tmp_path,
        {
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": 7},
            "steps_per_print": 5,
            "wall_clock_breakdown": 1,
            "bfloat16": {"enabled": True, "check_grad_overflow": False},
            "data_types": {"keep_in_fp32_modules": ["norm"]},
            "train_batch_size": 16,
            "gradient_clipping": 1,
            "fp16": {"enabled": "auto", "loss_scale_window": 3},
        },
        bf16=True,
    )
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert (
        config["bf16"] == {"enabled": True, "check_grad_overflow": False}
        and "bfloat16" not in config
    )
    assert config["fp16"] == {"enabled": False, "loss_scale_window": 3}
    assert config["data_types"] == {
        "grad_accum_dtype": "fp32",
        "keep_in_fp32_modules": ["norm"],
    }
    assert config["steps_per_print"] == 5 and config["wall_clock_breakdown"] == 1
    assert config["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("key", DECIDED)
def test_contradiction_names_file_and_flag(tmp_path, key):
    outer, _, inner = key.partition(".")
    ours = deepspeed_config(OptimizerConfig(bf16=True), DeepSpeedConfig(), TRAIN, 4)[outer]
    value = {inner: 3} if inner else 3
    with pytest.raises(ValueError) as caught:
        merged(tmp_path, {outer: value}, bf16=True)
    assert str(caught.value) == (
        f"{tmp_path / 'ds.json'}: {key} is 3, but the flags make it "
        f"{ours[inner] if inner else ours!r}; change {DECIDED[key]} or remove the key from "
        "the file"
    )


@pytest.mark.parametrize("section", REFUSED)
def test_sections_of_flags_are_refused(tmp_path, section):
    with pytest.raises(
        ValueError, match=f"ds.json: the section '{section}' is not allowed: .*; remove it"
    ):
        merged(tmp_path, {section: {}})


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"--deepspeed_config: .*ds\.json is not JSON: Expecting"),
        (
            "[" * 500 + "]" * 500,
            r"--deepspeed_config: .*ds\.json is not JSON: it is nested",
        ),
        ([], r"--deepspeed_config: .*ds\.json holds a list; allowed: a JSON object"),
        ({"bf16": True}, r"ds\.json: bf16 is True; allowed: a JSON object"),
    ],
)
def test_invalid_file_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        merged(tmp_path, content)


def test_missing_file_is_refused(tmp_path):
    path = str(tmp_path / "none.json")
    with pytest.raises(
        ValueError,
        match="--deepspeed_config is '.*none.json', which cannot be read: No such file",
    ):
        deepspeed_config(OptimizerConfig(), DeepSpeedConfig(deepspeed_config=path), TRAIN, 1)


def test_module_imports_neither_deepspeed_nor_torch(repo):
    """So that a wrong file is refused before the slow imports."""
    import subprocess
    import sys

    code = (
        "import megatron.engine.ds_config, sys\n"
        "print('deepspeed' in sys.modules or 'torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repo
    )
    assert out.stdout.strip() == "False"
