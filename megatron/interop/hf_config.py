"""The configuration of our models in transformers: `model_type` moe_megatron."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.interop.hf.families.moe_megatron import (
    ARCHITECTURE,
    MODEL_TYPE,
    model_fields,
    run_of_fields,
)
from megatron.optional_packages import import_optional

_transformers = import_optional("transformers", "hf", "megatron.interop.hf_model")
_GATES_OF_TOKEN_IDS = ("hash",)
"""Gates with a table that has one row per token id"""


@cache
def _parse(run: str, gates: str, where: str) -> RunConfig:
    return run_of_fields(json.loads(run), json.loads(gates), where)


class MoEMegatronConfig(_transformers.PreTrainedConfig):
    """Describes a model as the sections of a run.json do.

    What transformers and its tools ask a config for, such as `hidden_size`, is derived from them.

    Raises:
        ValueError: the sections do not describe a model; the message names the field.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    run: dict[str, Any] | None = None
    """sections of a run.json, with its version: model, moe, gate_options and expert_options.
    `vocab_size` in the section model is the size before padding. Default: a dense model"""
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
        self.run = self.run or {"model": {"vocab_size": 256}}
        self.gates = self.gates or {}
        self.expert_types = self.expert_types or {}
        assert self.run_config.model.vocab_size > 0
        super().__post_init__(**kwargs)

    @staticmethod
    def of(run: RunConfig, vocab_size: int, **kwargs: Any) -> MoEMegatronConfig:
        """Describe the model of a run.

        Args:
            vocab_size: size of the vocabulary before padding.
            kwargs: other fields of the config.
        """
        run = replace(run, model=replace(run.model, vocab_size=vocab_size))
        fields = model_fields(run)
        return MoEMegatronConfig(architectures=[ARCHITECTURE], **fields, **kwargs)

    @property
    def run_config(self) -> RunConfig:
        """The sections, parsed; all others have their defaults."""
        return _parse(json.dumps(self.run), json.dumps(self.gates), "config.json")

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
