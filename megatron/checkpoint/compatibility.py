"""Compatibility checks: whether a run may resume from a checkpoint, and what will differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch

from megatron.checkpoint.metadata import RunMetadata
from megatron.config.effect import reset_without_effect
from megatron.config.fields import flag_name
from megatron.config.flags import EXPERT_OPTIONS, flags_of
from megatron.config.gate_layers import per_layer_text
from megatron.config.schema import RunConfig
from megatron.config.training import RunLength
from megatron.data.sampling.blend import parse_blend
from megatron.io.content_id import comparable
from megatron.log import get_logger, warn_on_rank0
from megatron.model.meta_device import meta_device
from megatron.moe.experts.expert_type import expert_config_class
from megatron.moe.gate import create_gate, gate_config_class

TOKENIZER_FIELDS = {
    "tokenizer_name": "the tokenizer",
    "tokenizer_vocab_size": "the vocabulary size",
    "tokenizer_fingerprint": "the hash of the vocabulary",
}
"""Entries of RunMetadata.identity, and how messages call them"""

_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "position_embedding_type",
    "rotary_base",
    "normalization",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
)

_ATTENTION_FIELDS = (
    "attention",
    "add_qkv_bias",
    "attention_output_bias",
    "qk_norm",
    "clip_qkv",
    "attention_sinks",
    "window_size",
    "window_layers",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)

SCHEDULE_FIELDS = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "lr_warmup_tokens",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_decay_tokens",
    "lr_wsd_decay_fraction",
    "lr_wsd_decay_style",
)
"""Fields of the optimizer config that, with the length of the run, set the learning rates"""

DATA_ORDER_FIELDS = {
    "model": ("seq_length",),
    "data": (
        "data_path",
        "train_data_path",
        "split",
        "dataloader_type",
        "streaming_data_path",
        "streaming_json_key",
        "streaming_shuffle_samples",
        "mock_data",
    ),
    "train": ("seed",),
}
"""Fields by config section that, with the number of samples that the data are built for, set
the order of samples: changes are allowed, with a warning"""

_MOE_TRAINING_FIELDS = (
    "moe_aux_loss_reduction",
    "moe_train_capacity_factor",
    "moe_eval_capacity_factor",
    "moe_min_capacity",
)
"""Fields of the MoE config that change a training, but no weights: changes are logged"""

_DATA_PATH_FIELDS = ("data_path", "train_data_path", "streaming_data_path")
_EVAL_PATH_FIELDS = ("valid_data_path", "test_data_path")


def check_same_run(saved: RunMetadata, current: RunMetadata, where: str) -> None:
    """Check that the weights of a checkpoint fit the current run.

    Args:
        where: Name of the checkpoint for messages.

    Raises:
        ValueError: The tokenizer, the model, the experts or the gate differ. The message names
            the first difference.
    """
    for key, what in TOKENIZER_FIELDS.items():
        _require_same(saved.identity.get(key), current.identity[key], what, where)
    saved_model = _model_description(saved)
    for what, value in _model_description(current).items():
        _require_same(saved_model.get(what), value, what, where)
    for gate in current.config.moe.gate_layers.gates:
        _require_same_gate_shapes(gate, saved.config, current.config, where)
    _check_rope_scaling(saved.config, current.config, where)
    if current.config.model.position_embedding_type == "learned":
        _require_same(
            saved.config.model.max_positions,
            current.config.model.max_positions,
            "--max-position-embeddings",
            where,
        )


def _model_description(run: RunMetadata) -> dict[str, Any]:
    """Return what must be equal in a checkpoint and the run that loads it, by flag.

    Values are resolved, so that equal models set by different flags are equal.
    """
    config = reset_without_effect(run.config)
    model = config.model
    moe = config.moe
    description = _values_by_flag(model, _MODEL_FIELDS)
    description |= _values_by_flag(config.attention, _ATTENTION_FIELDS)
    description |= _values_by_flag(config.rotary, ("rotary_percent",))
    vocab_size = model.vocab_size or run.identity["tokenizer_vocab_size"]
    description |= {
        "--num-query-groups": model.query_groups,
        "--kv-channels": model.head_size,
        "--activation": model.act,
        "the padded vocabulary size": model.padded_vocab(vocab_size),
        "--num-experts": moe.num_experts,
    }
    gates = moe.gates(model.num_layers)
    moe_layers = [i for i, gate in enumerate(gates) if gate is not None]
    if moe.num_experts:
        names = set(gates) - {None}
        description |= {
            "the list of MoE layers": moe_layers,
            "--gate": names.pop() if len(names) == 1 else per_layer_text(gates),
            "--expert-type": moe.expert_type,
            "--moe-weight-on-input": moe.moe_weight_on_input,
            "--moe-latent-size": moe.moe_latent_size,
            "--moe-shared-experts": moe.moe_shared_experts,
            "--moe-shared-expert-intermediate-size": moe.moe_shared_expert_intermediate_size,
            "--moe-shared-expert-gate": moe.moe_shared_expert_gate,
            "the hidden size of an expert": moe.expert_size(model.ffn_size),
        }
        expert_config = expert_config_class(moe.expert_type)(**config.expert_options)
        for flag in flags_of(type(expert_config), EXPERT_OPTIONS):
            description[flag.spellings[0]] = getattr(expert_config, flag.name)
    if len(moe_layers) < model.num_layers:
        description["--ffn-hidden-size"] = model.ffn_size
    return description


def _values_by_flag(section: Any, names: Sequence[str]) -> dict[str, Any]:
    return {flag_name(name): getattr(section, name) for name in names}


def _check_rope_scaling(saved: RunConfig, current: RunConfig, where: str) -> None:
    """Check that rotary frequencies are scaled as in the checkpoint, unless with --finetune.

    Weights fit any scaling, and a new run may extend the context.

    Raises:
        ValueError: They are scaled in another way. The message names the first difference.
    """
    old = _rope_scaling(saved)
    changes = []
    for flag, value in _rope_scaling(current).items():
        if not current.checkpoint.finetune:
            _require_same(old[flag], value, flag, where)
        if value != old[flag]:
            changes.append(f"{flag} {value} instead of {old[flag]}")
    if changes:
        warn_on_rank0(
            "rotary frequencies are scaled in another way than in the checkpoint: %s",
            ", ".join(changes),
        )


def _rope_scaling(config: RunConfig) -> dict[str, Any]:
    """Return the options that scale rotary frequencies by flag; original positions resolved."""
    config = reset_without_effect(config)
    rotary = config.rotary
    if rotary.rope_scaling in ("llama3", "yarn") and not rotary.rope_original_max_positions:
        rotary = dataclasses.replace(
            rotary, rope_original_max_positions=config.model.max_positions
        )
    names = [field.name for field in dataclasses.fields(rotary)]
    names.remove("rotary_percent")
    return _values_by_flag(rotary, names)


def check_same_schedule(saved: RunMetadata, current: RunMetadata, where: str) -> None:
    """Check that a resumed run has the learning rates it would have had without the break.

    Args:
        where: Name of the checkpoint for messages.

    Raises:
        ValueError: They differ. The message names the first difference.
    """
    old = reset_without_effect(saved.config).optimizer
    new = reset_without_effect(current.config).optimizer
    advice = (
        "use the checkpoint's value, or add --override-lr-schedule to continue with the new one"
    )
    for name in SCHEDULE_FIELDS:
        _require_same(getattr(old, name), getattr(new, name), flag_name(name), where, advice)
    decay_length_is_set = new.lr_decay_iters or new.lr_decay_samples or new.lr_decay_tokens
    if not decay_length_is_set:
        if new.lr_decay_style != "constant" or new.lr_warmup_fraction:
            _require_same_length(_length(saved), _length(current), where, advice)
    elif new.lr_warmup_fraction and not saved.samples:
        # Versions that did not record the number of samples took it as a fraction of the run.
        warmup = round(new.lr_warmup_fraction * saved.iterations)
        raise ValueError(
            f"--lr-warmup-fraction {new.lr_warmup_fraction} is a fraction of the decay now, but "
            f"one of the run in the version that wrote checkpoint {where}; add "
            f"--override-lr-schedule, and to keep the old warm-up set --lr-warmup-fraction 0 "
            f"--lr-warmup-iters {warmup}"
        )


def _length(run: RunMetadata) -> RunLength:
    """Return the length of a run in the unit in which its learning rates follow it."""
    length = run.config.train.length
    if length is None or length.unit == "iterations":
        return RunLength("iterations", run.iterations)
    return length


def _require_same_length(saved: RunLength, current: RunLength, where: str, advice: str) -> None:
    if saved.unit == current.unit:
        what = f"the run's number of {saved.unit}, which its learning rates follow,"
        _require_same(saved.total, current.total, what, where, advice)
    what = "the run's length, which its learning rates follow,"
    old = f"{saved.total} {saved.unit}"
    new = f"{current.total} {current.unit}"
    _require_same(old, new, what, where, advice)


def warn_of_changes(saved: RunMetadata, current: RunMetadata) -> None:
    """Log how a resumed run differs from the saved one where differences are allowed."""
    changes = _data_order_changes(saved, current)
    if changes:
        warn_on_rank0(
            "%s differ(s) from the checkpoint's: the order of samples changes from here on, and "
            "samples that were already seen may come again",
            ", ".join(changes),
        )
    eval_changes = _evaluation_changes(saved, current)
    if eval_changes:
        warn_on_rank0(
            "%s differ(s) from the checkpoint's: evaluation figures from here on cannot be "
            "compared with earlier ones",
            ", ".join(eval_changes),
        )
    options = _gate_option_changes(saved.config, current.config)
    if options:
        warn_on_rank0(
            "the gate continues with other options than the checkpoint's: %s",
            ", ".join(options),
        )
    moe_changes = _moe_training_changes(saved.config, current.config)
    if moe_changes:
        warn_on_rank0(
            "the MoE layers continue with other settings than the checkpoint's: %s",
            ", ".join(moe_changes),
        )
    if saved.global_batch_size != current.global_batch_size:
        get_logger().info(
            "the run continues with a global batch of %d samples; the checkpoint was made with %d",
            current.global_batch_size,
            saved.global_batch_size,
        )
    if saved.topology != current.topology:
        get_logger().info(
            "the checkpoint was made with %s; the run continues with %s",
            _describe_topology(saved.topology),
            _describe_topology(current.topology),
        )


def _data_order_changes(saved: RunMetadata, current: RunMetadata) -> list[str]:
    changes = []
    saved_config = reset_without_effect(saved.config)
    current_config = reset_without_effect(current.config)
    for section, names in DATA_ORDER_FIELDS.items():
        old = getattr(saved_config, section)
        new = getattr(current_config, section)
        for name in names:
            if getattr(old, name) == getattr(new, name):
                continue
            if name in _DATA_PATH_FIELDS and _is_same_data(saved, current, name):
                continue
            changes.append(flag_name(name))
    data = current.config.data
    # The order of streamed text, and of cyclic and mock samples, is independent of the length.
    is_independent = data.streaming_data_path or data.mock_data
    follows_length = not is_independent and data.dataloader_type != "cyclic"
    if follows_length and saved.built_samples != current.built_samples:
        changes.append(
            f"the number of samples of the run ({current.built_samples} instead of "
            f"{saved.built_samples})"
        )
    # A growing stream keeps the order of the text that it had.
    ignored = {*data.streaming_data_path, *_evaluation_prefixes(current)}
    changes += _changed_files(saved, current, current.data.keys() - ignored)
    return changes


def _evaluation_changes(saved: RunMetadata, current: RunMetadata) -> list[str]:
    """Return which data differ that are evaluated on, but not trained on."""
    old = reset_without_effect(saved.config).data
    new = reset_without_effect(current.config).data
    changes = []
    for name in _EVAL_PATH_FIELDS:
        is_equal = getattr(old, name) == getattr(new, name)
        if not is_equal and not _is_same_data(saved, current, name):
            changes.append(flag_name(name))
    for name, words in new.named_valid_sets.items():
        old_words = old.named_valid_sets.get(name, words)
        if old_words == words:
            continue
        flag = f"--valid-sets {name}="
        contents = _contents(current, words, flag)
        if not contents or contents != _contents(saved, old_words, flag):
            changes.append(flag)
    return changes + _changed_files(saved, current, _evaluation_prefixes(current))


def _evaluation_prefixes(run: RunMetadata) -> set[str]:
    """Return the prefixes of datasets that a run evaluates on, but does not train on."""
    data = run.config.data
    trained = set()
    for words in (data.data_path, data.train_data_path):
        trained |= {prefix for _, prefix in parse_blend(words, "--data-path")}
    evaluated = set()
    for words in (
        data.valid_data_path,
        data.test_data_path,
        *data.named_valid_sets.values(),
    ):
        evaluated |= {prefix for _, prefix in parse_blend(words, "--valid-data-path")}
    return evaluated - trained


def _changed_files(
    saved: RunMetadata, current: RunMetadata, prefixes: Collection[str]
) -> list[str]:
    changes = []
    for prefix, files in current.data.items():
        if prefix in prefixes and _are_other_files(saved.data.get(prefix, files), files):
            changes.append(f"the files of {prefix}")
    return changes


def _is_same_data(saved: RunMetadata, current: RunMetadata, name: str) -> bool:
    """Return whether a flag names files of the same content in the same proportions, elsewhere.

    Earlier checkpoints do not know the content, or by another method: then only equal paths are
    the same.
    """
    flag = flag_name(name)
    contents = _contents(saved, getattr(saved.config.data, name), flag)
    return bool(contents) and contents == _contents(
        current, getattr(current.config.data, name), flag
    )


def _contents(
    run: RunMetadata, words: Sequence[str], flag: str
) -> list[tuple[float | None, str]]:
    """Return weight and content id of each dataset of a flag; nothing if one is not known."""
    contents = []
    for weight, prefix in parse_blend(words, flag):
        known_id = run.data.get(prefix, {}).get("content_id")
        if not known_id:
            return []
        contents.append((weight, known_id))
    return contents


def _are_other_files(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two descriptions differ, but for content ids that cannot be compared."""
    unknown = {"content_id"}
    if comparable(old.get("content_id", ""), new.get("content_id", "")):
        unknown = set()
    names = (old.keys() | new.keys()) - unknown
    return any(old.get(name) != new.get(name) for name in names)


def _gate_option_changes(saved: RunConfig, current: RunConfig) -> list[str]:
    changes = []
    for gate in current.gate_options:
        changes += _changes_of_gate(gate, saved, current)
    return changes


def _changes_of_gate(gate: str, saved: RunConfig, current: RunConfig) -> list[str]:
    """Return which options of a gate differ, as flags with both values."""
    old = _gate_options(gate, saved)
    changes = []
    for name, value in _gate_options(gate, current).items():
        if old[name] != value:
            flag = _option_flag(gate, name, current)
            changes.append(f"{flag} {value} instead of {old[name]}")
    return changes


def _gate_options(gate: str, config: RunConfig) -> dict[str, Any]:
    """Return all options of a gate: versions before an option did what its default does."""
    defaults = dataclasses.asdict(gate_config_class(gate)())
    return defaults | config.gate_options.get(gate, {})


def _moe_training_changes(saved: RunConfig, current: RunConfig) -> list[str]:
    old = reset_without_effect(saved).moe
    new = reset_without_effect(current).moe
    changes = []
    for name in _MOE_TRAINING_FIELDS:
        if getattr(old, name) != getattr(new, name):
            changes.append(
                f"{flag_name(name)} {getattr(new, name)} instead of {getattr(old, name)}"
            )
    return changes


def _option_flag(gate: str, name: str, config: RunConfig) -> str:
    """Return the flag of a gate's option; with the gate's name if there are several gates."""
    if len(config.moe.gate_layers.gates) == 1:
        return flag_name(name)
    return f"{flag_name(gate)}.{flag_name(name).removeprefix('--')}"


def _describe_topology(topology: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in topology.items())


def _require_same_gate_shapes(
    gate: str, saved: RunConfig, current: RunConfig, where: str
) -> None:
    """Check that a gate's parameters and buffers have the same names and shapes in two runs.

    Raises:
        ValueError: They differ. The message names all options that differ: some of them alone
            may not be valid, so that none can be tried by itself.
    """
    if not current.moe.num_experts:
        return
    shapes = _gate_shapes(gate, saved, current)
    if shapes != _gate_shapes(gate, current, current):
        raise ValueError(
            f"gate {gate} has other parameters than in checkpoint {where}: "
            f"{', '.join(_changes_of_gate(gate, saved, current))}; use the checkpoint's options, "
            "or start a new run without --load"
        )


def _gate_shapes(gate: str, run: RunConfig, model: RunConfig) -> dict[str, torch.Size]:
    """Return names and shapes of the parameters and buffers of a run's gate in a model."""
    with meta_device():
        built = create_gate(
            gate,
            hidden_size=model.model.hidden_size,
            num_experts=model.moe.num_experts,
            layer=1,
            num_moe_layers=2,
            vocab_size=1,
            **_gate_options(gate, run),
        )
    return {name: tensor.shape for name, tensor in built.state_dict().items()}


def _require_same(
    saved: Any,
    current: Any,
    what: str,
    where: str,
    advice: str = "use the checkpoint's value, or start a new run without --load",
) -> None:
    if saved != current:
        raise ValueError(
            f"{what} is {current!r} but checkpoint {where} was made with {saved!r}; {advice}"
        )
