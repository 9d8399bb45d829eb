"""Any of our models as a folder of transformers: its config.json holds sections of a run.json.

The tensors have our names, with the prefix of transformers' models. `interop/hf_model.py` has
the classes that load such a folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.gate_code import (
    describe_expert_types,
    describe_gates,
    require_known_gates,
)
from megatron.config.fields import require
from megatron.config.flags import flags_of
from megatron.config.format_version import with_version
from megatron.config.run_json import config_from_dict, parse_stored_values
from megatron.config.schema import RunConfig
from megatron.interop.hf.family import Family, Settings, TensorRule
from megatron.moe.gate import gate_config_class

MODEL_TYPE = "moe_megatron"
ARCHITECTURE = "MoEMegatronForCausalLM"
MODEL_SECTIONS = ("model", "moe", "gate_options", "expert_options", "tokenizer")
"""Sections of run.json that a config.json may have"""
_OF_A_RUN = {
    "gate_path": [],
    "moe_expert_parallel_size": 1,
    "moe_backend": "auto",
    "moe_eval_capacity_factor": 0.0,
    "check_routing": False,
}
"""Fields of the section moe that belong to a run and its machine, with their values here. Under a
capacity the other sequences of a batch would decide which experts a token gets"""
_TOKENIZERS_WITHOUT_FILES = ("ByteTokenizer", "NullTokenizer")


def model_fields(run: RunConfig) -> dict[str, Any]:
    """Return the fields of a config.json that describe the model of a run.

    Args:
        run: `vocab_size` in its section model is the size of the vocabulary before padding.
    """
    stored = json.loads(json.dumps(run.to_dict()))
    sections = {name: stored[name] for name in MODEL_SECTIONS}
    sections["moe"] |= _OF_A_RUN
    if run.tokenizer.tokenizer_type not in _TOKENIZERS_WITHOUT_FILES:
        del sections["tokenizer"]
    return {
        "run": with_version(sections),
        "gates": describe_gates(run),
        "expert_types": describe_expert_types(run),
    }


def run_of_fields(run: Any, gates: Any, where: str = "config.json") -> RunConfig:
    """Return the configuration of which a config.json holds the sections.

    Args:
        run: content of its key "run".
        gates: content of its key "gates".
        where: the file, for messages.
    Raises:
        ValueError: a section is unknown or refuses a value, or a gate is not imported.
    """
    what = f"{where}: run"
    require(isinstance(run, dict), what, run, "a JSON object")
    unknown = sorted(run.keys() - {"version", *MODEL_SECTIONS})
    require(not unknown, what, unknown, f"the sections {' '.join(MODEL_SECTIONS)}")
    is_object = isinstance(gates, dict) and all(isinstance(g, dict) for g in gates.values())
    require(is_object, f"{where}: gates", gates, "a JSON object of objects")
    require_gates(gates, where)
    config = config_from_dict(run, what)
    require(
        config.model.vocab_size > 0,
        f"{what}.model.vocab_size",
        config.model.vocab_size,
        "a positive integer, the size of the vocabulary before padding",
    )
    options = run.get("gate_options", {})
    typed = {}
    for gate in config.moe.gate_layers.gates if config.moe.num_experts else ():
        flags = flags_of(gate_config_class(gate), "gate_options")
        section = f"gate_options.{gate}"
        typed[gate] = parse_stored_values(options.get(gate, {}), section, flags, what)
    return dataclasses.replace(config, gate_options=typed)


def require_gates(gates: dict[str, dict[str, str]], where: str) -> None:
    """Check that the gates of a config.json are built-in, installed or imported.

    Args:
        gates: content of its key "gates".
        where: the file or folder, for messages.
    Raises:
        ValueError: one is not.
    """
    try:
        require_known_gates(gates, where)
    except ValueError as error:
        advice = "in Python: megatron.moe.gate_registry.import_gate_files([FILE])"
        raise ValueError(f"{error}; {advice}") from None


class _Sections:
    """The keys of config.json that hold a configuration of ours."""

    keys = ("run", "gates", "expert_types")

    def to_ours(self, config: Mapping[str, Any]) -> Settings:
        raise AssertionError("read_run reads the sections")

    def to_theirs(self, run: RunConfig) -> dict[str, Any]:
        return model_fields(run)


def _read_run(content: Mapping[str, Any]) -> RunConfig:
    return run_of_fields(content.get("run"), content.get("gates", {}))


def _same_name(ours: str) -> TensorRule:
    """Return the rule of a tensor, whose name has a prefix in transformers."""
    return TensorRule(ours, ours if ours.startswith("lm_head.") else f"model.{ours}")


MOE_MEGATRON = Family(
    name=MODEL_TYPE,
    architecture=ARCHITECTURE,
    config=(_Sections(),),
    tensors=(),
    note="every model of ours; needs `import megatron.interop.hf_model`",
    default_rule=_same_name,
    read_run=_read_run,
    fp32_tensors=r"layers\.\d+\.mlp\.gate\..*",
    pads_vocabulary=True,
)

FAMILIES = (MOE_MEGATRON,)
