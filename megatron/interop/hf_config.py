"""The configuration of our models in transformers: `model_type` moe_megatron."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from megatron.checkpoint.gate_code import describe_expert_types, describe_gates
from megatron.config.fields import require
from megatron.config.format_version import with_version
from megatron.config.run_json import config_from_dict
from megatron.config.schema import RunConfig
from megatron.optional_packages import import_optional

_transformers = import_optional("transformers", "hf", "megatron.interop.hf_model")

MODEL_TYPE = "moe_megatron"
ARCHITECTURE = "MoEMegatronForCausalLM"
_SECTIONS = ("model", "moe", "gate_options", "expert_options")
"""Sections of run.json that describe a model"""
_OF_A_RUN = {
    "gate_path": (),
    "moe_expert_parallel_size": 1,
    "moe_backend": "auto",
    "moe_eval_capacity_factor": 0.0,
    "check_routing": False,
}
"""Fields of the section moe that belong to a run and its machine, with their values here. Under a
capacity the other sequences of a batch would decide which experts a token gets"""
_GATES_OF_TOKEN_IDS = ("hash",)
"""Gates with a table that has one row per token id"""


def config_fields(run: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Return the fields of a config.json that describe the model of a run.

    Args:
        vocab_size: size of the vocabulary before padding.
    """
    stored = run.to_dict()
    sections = {name: dict(stored[name]) for name in _SECTIONS}
    sections["model"]["vocab_size"] = vocab_size
    sections["moe"] |= _OF_A_RUN
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "run": json.loads(json.dumps(with_version(sections))),
        "gates": describe_gates(run),
        "expert_types": describe_expert_types(run),
    }


@cache
def _parse(text: str, where: str) -> RunConfig:
    return config_from_dict(json.loads(text), where)


class MoEMegatronConfig(_transformers.PreTrainedConfig):
    """Describes a model as the sections of a run.json do.

    What transformers and its tools ask a config for, such as `hidden_size`, is derived from them.

    Raises:
        ValueError: the sections do not describe a model; the message names the field.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    run: dict[str, Any] | None = None
    """the sections model, moe, gate_options and expert_options of a run.json, with its version.
    `vocab_size` in the section model is the size before padding"""
    gates: dict[str, Any] | None = None
    """origin of the code of each gate, as checkpoints record it"""
    expert_types: dict[str, Any] | None = None
    """likewise of the expert type"""
    use_cache: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        self.run = self.run or {}
        self.gates = self.gates or {}
        self.expert_types = self.expert_types or {}
        unknown = sorted(self.run.keys() - {"version", *_SECTIONS})
        require(not unknown, "run of a config.json", unknown, f"the sections {_SECTIONS}")
        assert self.run_config is not None
        super().__post_init__(**kwargs)

    @staticmethod
    def of(run: RunConfig, vocab_size: int, **kwargs: Any) -> MoEMegatronConfig:
        """Describe the model of a run.

        Args:
            vocab_size: size of the vocabulary before padding.
            kwargs: other fields of the config.
        """
        fields = config_fields(run, vocab_size)
        del fields["model_type"]
        return MoEMegatronConfig(**fields, **kwargs)

    @property
    def run_config(self) -> RunConfig:
        """The sections, parsed; all others have their defaults."""
        return _parse(json.dumps(self.run), "run of a config.json")

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding, padding included."""
        model = self.run_config.model
        return model.padded_vocab(model.vocab_size)

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        """Set the number of rows, which is the size of the vocabulary from now on.

        Raises:
            ValueError: a gate has a table of token ids.
        """
        gates = self.run_config.moe.gate_layers.gates
        has_table = any(name in _GATES_OF_TOKEN_IDS for name in gates)
        allowed = f"{self.vocab_size}, as a gate of {' '.join(gates)} has a row per token id"
        require(not has_table or size == self.vocab_size, "vocab_size", size, allowed)
        shape = {"vocab_size": size, "make_vocab_size_divisible_by": 1}
        self.run = {**self.run, "model": {**self.run.get("model", {}), **shape}}

    @property
    def hidden_size(self) -> int:
        return self.run_config.model.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Hidden size of a dense feed-forward layer."""
        return self.run_config.model.ffn_size

    @property
    def num_hidden_layers(self) -> int:
        return self.run_config.model.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.run_config.model.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.run_config.model.query_groups

    @property
    def head_dim(self) -> int:
        return self.run_config.model.head_size

    @property
    def max_position_embeddings(self) -> int:
        return self.run_config.model.max_positions

    @property
    def num_experts(self) -> int:
        return self.run_config.moe.num_experts

    @property
    def initializer_range(self) -> float:
        """Standard deviation of new weights, such as those of added tokens."""
        return self.run_config.model.init_method_std

    @property
    def tie_word_embeddings(self) -> bool:
        return not self.run_config.model.untie_embeddings_and_output_weights
