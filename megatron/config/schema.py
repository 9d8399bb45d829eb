"""The configuration of a run: sections (frozen dataclasses) whose fields are flags.

The string under a field is its `--help` text, and a field's metadata may carry `flags` (other
spellings of its flag) and `choices`. Building a config does no I/O. Each section checks its
own fields; checks that need two sections are in `RunConfig`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron.config.attention import AttentionConfig
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.evaluation import EvaluationConfig
from megatron.config.fault_tolerance import FaultToleranceConfig
from megatron.config.fields import require
from megatron.config.model import ACTIVATIONS, ModelConfig
from megatron.config.moe import MOE_BACKENDS, MoEConfig
from megatron.config.monitoring import LoggingConfig, ProfilingConfig
from megatron.config.optimizer import DECAY_STYLES, OptimizerConfig
from megatron.config.rotary import RotaryConfig
from megatron.config.tokenizer import TOKENIZERS, TokenizerConfig
from megatron.config.training import TrainConfig

__all__ = [
    "ACTIVATIONS",
    "DECAY_STYLES",
    "MOE_BACKENDS",
    "RUN_JSON_LAYOUT",
    "SECTIONS",
    "TOKENIZERS",
    "AttentionConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "FaultToleranceConfig",
    "LoggingConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ProfilingConfig",
    "RotaryConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrainConfig",
]

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "attention": AttentionConfig,
    "rotary": RotaryConfig,
    "moe": MoEConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "deepspeed": DeepSpeedConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "fault_tolerance": FaultToleranceConfig,
    "logging": LoggingConfig,
    "profiling": ProfilingConfig,
}

# The sections of run.json, and the config sections whose fields each of them holds, in this
# order. Checkpoints contain run.json, so this layout outlives a rearrangement of SECTIONS.
RUN_JSON_LAYOUT: dict[str, tuple[str, ...]] = {
    "model": ("model", "attention", "rotary"),
    "moe": ("moe",),
    "tokenizer": ("tokenizer",),
    "data": ("data",),
    "optimizer": ("optimizer", "deepspeed"),
    "train": ("fault_tolerance", "checkpoint", "train", "evaluation", "logging", "profiling"),
    "gate_options": ("gate_options",),
    "expert_options": ("expert_options",),
}


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. `gate_options` holds the options of each gate by its name."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault_tolerance: FaultToleranceConfig = FaultToleranceConfig()
    logging: LoggingConfig = LoggingConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    attention: AttentionConfig = AttentionConfig()
    rotary: RotaryConfig = RotaryConfig()
    gate_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """fields of each gate's Config by the name of the gate"""
    expert_options: dict[str, Any] = field(default_factory=dict)
    """fields of the expert type's Config"""

    def __post_init__(self):
        moe = self.moe
        num_layers = self.model.num_layers
        zero_stage = self.deepspeed.zero_stage
        require(
            zero_stage > 0 or moe.num_experts == 0,
            "--zero-stage",
            zero_stage,
            "1, 2 or 3 with experts",
            "DeepSpeed's ZeRO 0 gets the gradient norm of experts wrong, so clipping would "
            "be wrong.",
        )
        require(
            zero_stage > 0 or not self.optimizer.fp16,
            "--zero-stage",
            zero_stage,
            "1, 2 or 3 with --fp16",
            "DeepSpeed scales the loss of fp16 with ZeRO only.",
        )
        require(
            all(0 <= layer < num_layers for layer in moe.moe_layers),
            "--moe-layers",
            list(moe.moe_layers),
            f"blocks from 0 to {num_layers - 1}",
        )
        moe.gate_layers.check(num_layers)
        for name, options in self.gate_options.items():
            known = name in moe.gate_layers.gates and isinstance(options, dict)
            allowed = f"options by gate, of {' '.join(moe.gate_layers.gates)}"
            require(known, "gate_options", {name: options}, allowed)
        require(
            moe.num_experts == 0 or any(map(moe.is_moe_layer, range(num_layers))),
            "--expert-interval",
            moe.expert_interval,
            f"a value that leaves at least one MoE layer among {num_layers} layers, the first "
            f"{moe.moe_first_k_dense} of which are dense",
            "Lower it or --moe-first-k-dense.",
        )
        self.attention.check_heads(self.model)
        self.rotary.check_model(self.model, self.attention.rotary_head_size(self.model))
        self._check_mock_data()

    def _check_mock_data(self) -> None:
        require(
            not (self.data.mock_data and self.tokenizer.lacks_files)
            or self.model.vocab_size > 1,
            "--mock-data",
            self.data.mock_data,
            f"with --vocab-size above 1, or with the files of {self.tokenizer.tokenizer_type}",
            "For example: --vocab-size 50257.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts in the layout of run.json."""
        values = dataclasses.asdict(self)
        stored: dict[str, Any] = {}
        for stored_section, sections in RUN_JSON_LAYOUT.items():
            stored[stored_section] = {}
            for section in sections:
                stored[stored_section].update(values[section])
        return stored
