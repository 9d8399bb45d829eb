"""Map config.json to a configuration of ours and back, by the rules of a family.

Every key of a config.json is understood by a rule of the family, or has no effect on any model;
another key is an error. In the other direction the written config.json is mapped back: what then
differs from the configuration is what the family cannot express.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.config.effect import reset_without_effect
from megatron.config.fields import flag_name, require, shortened
from megatron.config.flags import flags_of
from megatron.config.run_json import parse_stored_values
from megatron.config.schema import (
    SECTIONS,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from megatron.interop.hf.config_rules import Router
from megatron.interop.hf.family import Family, Settings
from megatron.interop.model_specs import MOST_BLOCKS
from megatron.moe.experts.expert_type import expert_config_class
from megatron.moe.gate import gate_config_class

_COMMON_KEYS = (
    # What the file describes, and how it was written.
    "architectures auto_map base_model_name _name_or_path model_type torch_dtype dtype "
    "transformers_version transformers.js_config name_or_path "
    # How the tensors are stored, which their reader decides.
    "quantization_config "
    # How transformers runs the model.
    "use_cache output_attentions output_hidden_states output_router_logits return_dict "
    "torchscript use_bfloat16 attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal experts_implementation "
    "_experts_implementation gradient_checkpointing use_return_dict "
    "return_dict_in_generate pruned_heads chunk_size_feed_forward low_cpu_mem_usage "
    # Special tokens and generation, which generation_config.json has, too.
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "remove_invalid_values tokenizer_class prefix task_specific_params "
    # Other kinds of models.
    "id2label label2id problem_type finetuning_task is_encoder_decoder is_decoder "
    "add_cross_attention cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss"
)
COMMON_KEYS = frozenset(_COMMON_KEYS.split())
"""Keys of config.json that change no model of a family"""

_TRAINING_FIELDS = {
    "model": "seq_length init_method_std attention_dropout hidden_dropout "
    "make_vocab_size_divisible_by vocab_size",
    "moe": "gate gate_path moe_layers expert_interval moe_first_k_dense "
    "moe_aux_loss_reduction moe_train_capacity_factor moe_eval_capacity_factor "
    "moe_min_capacity moe_expert_parallel_size moe_backend check_routing",
    "gate": "balance_scope jitter bias_update_speed",
}
"""Fields by section that change no result of the model in inference, or that are compared
in another form"""
_RESOLVED_FIELDS = (
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "activation",
    "swiglu",
    "max_position_embeddings",
    "rope_original_max_positions",
    "window_size",
    "window_layers",
    "moe_shared_experts",
    "moe_shared_expert_intermediate_size",
)
"""Fields that are compared by the value that they mean"""


_COMPARED_FIRST = ("moe.num_experts", "moe.gate", "moe.expert_type")


class _Content(dict[str, Any]):
    """Content of a config.json, in which a missing key is the user's mistake."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json has no key {key!r}, which the model needs")


def complete(family: Family, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a config.json with the family's defaults.

    Raises:
        ValueError: A key is not understood.
    """
    known = family.known_keys | COMMON_KEYS
    for key, value in content.items():
        require(
            key in known or value is None,
            f"config.json: {shortened(key)}",
            value,
            f"no such key with model_type {family.name}",
            "What it means for the model is not known here, so it is not ignored; remove it "
            "if it has no effect.",
        )
    return _Content({**family.defaults, **_with_common_names(family, content)})


def _with_common_names(family: Family, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the names of keys that rules use.

    Raises:
        ValueError: A key has another value than its other name.
    """
    renamed = {}
    for key, value in content.items():
        name = family.aliases.get(key, key)
        other = renamed.setdefault(name, value)
        require(
            value is other or value == other,  # a NaN is not equal to itself
            f"config.json: {key}",
            value,
            f"the value of its other name, {shortened(other)}",
            "Remove one of the two.",
        )
    return renamed


def settings_of(family: Family, content: Mapping[str, Any]) -> Settings:
    """Return our settings for the content of a config.json.

    Raises:
        ValueError: A key is missing or not understood, or a value is refused.
    """
    config = complete(family, content)
    num_layers = config["num_hidden_layers"]
    require(
        isinstance(num_layers, int) and 0 < num_layers <= MOST_BLOCKS,
        "config.json: num_hidden_layers",
        num_layers,
        f"an integer from 1 to {MOST_BLOCKS}",
    )
    settings: Settings = {}
    for rule in family.config:
        try:
            settings |= rule.to_ours(config)
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            found = {key: config[key] for key in rule.keys if key in config}
            raise ValueError(
                f"config.json has {shortened(found)}: a value is of a wrong type or 0 ({error})"
            ) from None
    return settings


def sections_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return settings by section, with typed values; the gate's under "gate".

    Raises:
        ValueError: A value has a wrong type.
    """
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field_name = name.partition(".")
        by_section.setdefault(section, {})[field_name] = value
    typed = {}
    for section, values in by_section.items():
        listed = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        flags = flags_of(_class_of(section, by_section), section)
        typed[section] = parse_stored_values(listed, section, flags, "config.json")
    return typed


def _class_of(section: str, by_section: Mapping[str, Mapping[str, Any]]) -> type:
    """Return the config class of a section of settings."""
    moe = by_section.get("moe", {})
    if section == "gate":
        return gate_config_class(moe["gate"])
    if section == "expert":
        return expert_config_class(moe["expert_type"])
    return SECTIONS[section]


def run_config_of(
    family: Family, content: Mapping[str, Any], tokenizer: TokenizerConfig | None = None
) -> RunConfig:
    """Return a run's configuration for the model of a config.json.

    Args:
        tokenizer: The run's tokenizer; None: the default one.

    Raises:
        ValueError: As `settings_of`, or a section refuses a value.
    """
    if family.read_run is not None:
        config = family.read_run(complete(family, content))
        optimizer = OptimizerConfig(**_precision_of(content))
        tokenizer = tokenizer or config.tokenizer
        return dataclasses.replace(config, tokenizer=tokenizer, optimizer=optimizer)
    sections = sections_of(settings_of(family, content))
    gate_values = sections.pop("gate", {})
    expert_values = sections.pop("expert", {})
    try:
        parts = {section: SECTIONS[section](**values) for section, values in sections.items()}
        parts["tokenizer"] = tokenizer or TokenizerConfig()
        parts["optimizer"] = OptimizerConfig(**_precision_of(content))
        config = RunConfig(**parts)
        moe = config.moe
        if moe.num_experts:
            gate_config = gate_config_class(moe.gate)(**gate_values)
            expert_config = expert_config_class(moe.expert_type)(**expert_values)
            config = dataclasses.replace(
                config,
                gate_options={moe.gate: dataclasses.asdict(gate_config)},
                expert_options=dataclasses.asdict(expert_config),
            )
        return config
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def _precision_of(content: Mapping[str, Any]) -> dict[str, bool]:
    """Return the flags of the compute precision by the dtype that config.json names."""
    dtype = str(content.get("dtype") or content.get("torch_dtype"))
    return {"bf16": dtype.endswith("bfloat16"), "fp16": dtype == "float16"}


def config_json_of(family: Family, run: RunConfig) -> dict[str, Any]:
    """Return the content of a config.json for the model of a configuration.

    `vocab_size` of the configuration is that of the model, padding included.

    Raises:
        ValueError: The family cannot express the model; the message names the first setting.
    """
    problem = first_difference(family, run)
    if problem:
        raise ValueError(problem)
    return _config_json(family, run)


def _config_json(family: Family, run: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
    }
    for rule in family.config:
        content |= rule.to_theirs(run)
    return content


def first_difference(family: Family, run: RunConfig) -> str:
    """Return what of a model a family cannot express, as one sentence; empty: nothing."""
    if family.read_run is not None:
        return ""  # it holds our configuration itself
    advice = "Use --family moe_megatron, which expresses every model"
    if not run.moe.num_experts and any(isinstance(rule, Router) for rule in family.config):
        return f"--num-experts is 0; allowed in the family {family.name}: 1 or more. {advice}"
    if family.adjust is not None:
        run = family.adjust(run)
    ours = _comparable(run)
    try:
        theirs = _comparable(run_config_of(family, _config_json(family, run)))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        other = _other_gate(family, run)
        if other:  # the error follows from its options
            return f"{other}. {advice}"
        return f"the family {family.name} cannot express this model: {error}. {advice}"
    # First what other differences may follow from.
    for name in dict.fromkeys((*_COMPARED_FIRST, *sorted({*ours, *theirs}))):
        if ours.get(name) != theirs.get(name):
            flag = flag_name(name.partition(".")[2])
            return (
                f"{flag} is {shortened(ours.get(name))}; allowed in the family {family.name}: "
                f"{shortened(theirs.get(name))}. {advice}"
            )
    return ""


def _other_gate(family: Family, run: RunConfig) -> str:
    """Return which gate of a model is not the family's, as half a sentence; empty: none."""
    allowed = {rule.gate for rule in family.config if isinstance(rule, Router)}
    for gate in run.moe.gate_layers.gates if allowed and run.moe.num_experts else ():
        if gate not in allowed:
            gates = " or ".join(map(repr, sorted(allowed)))
            return f"--gate is {gate!r}; allowed in the family {family.name}: {gates}"
    return ""


def _comparable(run: RunConfig) -> dict[str, Any]:
    """Return the settings that define the model, by name, in one spelling of several."""
    run = reset_without_effect(run)
    values = {
        "model.num_query_groups": run.model.query_groups,
        "model.kv_channels": run.model.head_size,
        "model.max_position_embeddings": run.model.max_positions,
        "model.activation": run.model.act,
        "attention.window_size": _windows(run),
        "moe.num_experts": run.moe.num_experts,
    }
    if run.rotary.rope_scaling in ("llama3", "yarn"):
        positions = run.rotary.rope_original_max_positions or run.model.max_positions
        values["rotary.rope_original_max_positions"] = positions
    gates = run.moe.gates(run.model.num_layers)
    if None in gates:
        values["model.ffn_hidden_size"] = run.model.ffn_size
    compared = ["model", "attention", "rotary"]
    if run.moe.num_experts:
        compared.append("moe")
        values["moe.gate"] = gates
        values |= _gate_values(run)
        expert_config = expert_config_class(run.moe.expert_type)(**run.expert_options)
        for name, value in dataclasses.asdict(expert_config).items():
            values[f"expert.expert_{name}"] = value
    for section in compared:
        left_out = {*_TRAINING_FIELDS.get(section, "").split(), *_RESOLVED_FIELDS}
        for name, value in dataclasses.asdict(getattr(run, section)).items():
            if name not in left_out:
                values[f"{section}.{name}"] = value
    if run.moe.num_experts:
        values["moe.moe_ffn_hidden_size"] = run.moe.expert_size(run.model.ffn_size)
        shared_size = run.moe.shared_size(run.model.ffn_size)
        values["moe.moe_shared_expert_intermediate_size"] = shared_size
    return values


def _windows(run: RunConfig) -> list[int]:
    """Return the sliding window of each block; 0: none."""
    return [run.attention.window_of(layer) for layer in range(run.model.num_layers)]


def _gate_values(run: RunConfig) -> dict[str, Any]:
    """Return the options of all gates that change their decisions."""
    values = {}
    for gate in run.moe.gate_layers.gates:
        options = dataclasses.asdict(gate_config_class(gate)(**run.gate_options.get(gate, {})))
        for name, value in options.items():
            if name.endswith("_coeff") or name in _TRAINING_FIELDS["gate"].split():
                continue
            if name == "bias_rule" and value != "none":
                value = "sign"  # all rules have the same biases
            values[f"{gate}.{name}"] = value
    return values
