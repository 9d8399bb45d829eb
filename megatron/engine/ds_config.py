"""From our configuration to DeepSpeed's. Does not import DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed

from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig

# What flags decide: DeepSpeed's key -> our flag. A file may repeat these values or say "auto", not contradict them.
DECIDED = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size or --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
    "fp16.enabled": "--fp16",
}
REFUSED = {
    "optimizer": "AdamW is built from --lr, --weight-decay and --adam-*, with parameter groups that skip decay",
    "scheduler": "the learning rate is a pure function of the iteration, from --lr-decay-style and --lr-warmup-*",
}


def deepspeed_config(
    optimizer: OptimizerConfig, options: DeepSpeedConfig, train: TrainConfig, world_size: int
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize(config=...)`; `options.deepspeed_config`, a JSON file, is merged into it.

    Raises:
        ValueError: the batch does not divide over the ranks; the file is missing, not JSON, or contradicts a flag.
    """
    batch = train.global_batch(world_size)
    config: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": batch // (train.micro_batch_size * world_size),
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": {"stage": options.zero_stage},
        "bf16": {"enabled": optimizer.bf16},
        "fp16": {"enabled": optimizer.fp16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # the training loop logs, not DeepSpeed
    }
    if optimizer.bf16 and options.zero_stage > 0:
        # Summing 64 micro-batches in bf16, DeepSpeed's default, puts gradients off by about 1 % (seen with 0.19.8).
        # Legal at stages 1 (where it selects BF16_Optimizer), 2 and 3; stage 0 raises NotImplementedError.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if not options.deepspeed_config:
        return config
    path = options.deepspeed_config
    return _merge(config, _read(path), path)


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--deepspeed_config is {path!r}, which cannot be read: {error.strerror}; "
            "give the path of a JSON file or leave the flag out"
        ) from None
    except ValueError as error:
        raise ValueError(f"--deepspeed_config: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"--deepspeed_config: {path} holds a {type(content).__name__}; allowed: a JSON object"
        )
    for key, reason in REFUSED.items():
        if key in content:
            raise ValueError(
                f"{path}: the section {key!r} is not allowed: {reason}; remove it from the file"
            )
    if "bfloat16" in content:  # DeepSpeed's old name, which it ignores beside the new one
        content.setdefault("bf16", content.pop("bfloat16"))
    return content


def _merge(
    ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """`theirs` over `ours`, deeply. "auto" leaves our value; a contradiction of a flag is an error."""
    merged = dict(ours)
    for name, value in theirs.items():
        key = prefix + name
        if name not in ours:
            merged[name] = value
        elif isinstance(ours[name], dict):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key} is {value!r}; allowed: a JSON object")
            merged[name] = _merge(ours[name], value, path, f"{key}.")
        elif value == "auto" or value == ours[name]:
            continue
        elif key in DECIDED:
            raise ValueError(
                f"{path}: {key} is {value!r}, but the flags make it {ours[name]!r}; "
                f"change {DECIDED[key]} or remove the key from the file"
            )
        else:
            merged[name] = value
    return merged


def check_deepspeed_config(config: dict[str, Any], path: str) -> None:
    """Raise ValueError, in one line, for what DeepSpeed's own schema refuses."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except (ValueError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--deepspeed_config: DeepSpeed refuses {path}: {reason}") from None
