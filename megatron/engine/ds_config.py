"""DeepSpeed's configuration, from ours; imports DeepSpeed only to validate a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig
from megatron.io.untrusted import parse_json

DECIDED = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size or --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
    "fp16.enabled": "--fp16",
    "communication_data_type": "--grad-reduce-in-bf16",
    "data_types.grad_accum_dtype": "--bf16 or --fp16",
}
"""DeepSpeed's keys that our flags set, each with its flag. The user's file may repeat
our value or say "auto"; it may not contradict it."""
REFUSED = {
    "optimizer": (
        "the optimizer is built from --lr, --weight-decay and --adam-*, with parameter "
        "groups that skip weight decay"
    ),
    "scheduler": (
        "the learning rate is a pure function of the progress, from --lr-decay-style and "
        "--lr-warmup-*"
    ),
    "activation_checkpointing": "activations are recomputed by --recompute-activations",
}
"""Sections that the user's file may not have, each with the reason."""
_FOUND_OTHERWISE = {"aio", "autotuning", "flops_profiler"}
"""Keys that DeepSpeed looks for in a way that `_RecordedLookups` does not see"""
_LARGEST_BUCKET = 250_000_000


def bucket_size(elements: int) -> int:
    """Return the elements of ZeRO's buffer of gradients: those of a rank, up to a limit.

    In fp32 the largest buffer has as many bytes as DeepSpeed's default in bf16.

    Args:
        elements: of all parameters of a rank.
    """
    return min(elements, _LARGEST_BUCKET)


def deepspeed_config(
    optimizer: OptimizerConfig, options: DeepSpeedConfig, train: TrainConfig, world_size: int
) -> dict[str, Any]:
    """Build the dict for `deepspeed.initialize(config=...)`.

    The JSON file `options.deepspeed_config`, if set, is merged into it.

    Raises:
        ValueError: the batch does not divide over the ranks, or the file is missing, is
            not JSON, or contradicts a flag.
    """
    batch = train.global_batch(world_size)
    config: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": batch // (train.micro_batch_size * world_size),
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": {"stage": options.zero_stage},
        # With `offload_optimizer`, DeepSpeed refuses optimizers other than its own, which would
        # lack our parameter groups.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": optimizer.bf16},
        "fp16": {"enabled": optimizer.fp16},
        # By default DeepSpeed reduces bf16 gradients in bf16, although it accumulates them in fp32:
        # an error of 2e-3 on two ranks, which grows with the number of ranks.
        "communication_data_type": "bf16" if optimizer.grad_reduce_in_bf16 else "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # the trainer logs, not DeepSpeed
    }
    if optimizer.precision != "fp32" and options.zero_stage > 0:
        # DeepSpeed sums micro-batches in bf16 by default, which puts the gradients of
        # 64 micro-batches off by about 1 % (measured with 0.19.8). fp32 is possible at
        # stages 1 (where it selects BF16_Optimizer), 2 and 3; at stage 0 it raises
        # NotImplementedError, and `accumulate_in_fp32` does it.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    path = options.deepspeed_config
    if path:
        config = _merge(config, _read(path), path)
    if options.zero_stage == 0 and optimizer.precision == "fp32":
        # DeepSpeed clips without recording the norm; `ClippedAdamW` clips and records it.
        config["gradient_clipping"] = 0.0
    return config


def check_deepspeed_config(config: dict[str, Any], path: str) -> None:
    """Raise ValueError, in one line, if DeepSpeed refuses `config` or ignores a key of it.

    Args:
        path: the user's file, which the message names.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    recorded = _RecordedLookups(config)
    try:
        deepspeed.DeepSpeedConfig(recorded)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--deepspeed_config: DeepSpeed refuses {path}: {reason}") from None

    known = recorded.keys_looked_up | _FOUND_OTHERWISE
    for key in config:
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {similar[0]!r}?" if similar else "remove it from the file"
            raise ValueError(f"{path}: DeepSpeed has no key {key!r}; {advice}")
    zero = config["zero_optimization"]
    if "offload_param" in zero and zero["stage"] < 3:
        raise ValueError(
            f"{path}: zero_optimization.offload_param has an effect only with --zero-stage 3, not "
            f"{zero['stage']}; change that or remove it from the file"
        )


class _RecordedLookups(dict):
    """A configuration that records which keys a program looks for."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.keys_looked_up: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_looked_up.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_looked_up.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Look for a key."""
        self.keys_looked_up.add(key)
        return super().get(key, default)


def _read(path: str) -> dict[str, Any]:
    """Read the user's file and refuse the sections that only flags may set."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
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
    if "bfloat16" in content:
        # The old name of bf16, which DeepSpeed ignores if both are there.
        content.setdefault("bf16", content.pop("bfloat16"))
    return content


def _merge(
    ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Merge `theirs` into `ours`, section by section.

    "auto" keeps our value.

    Raises:
        ValueError: a value contradicts a flag, or is not a section where ours is one.
    """
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
