"""Parameters of a cell's model: all of them, and those that a token uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatron.config.schema import RunConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.model.builder import build_run_config_model
from megatron.model.meta_device import meta_device
from megatron.model.parameter_count import count_parameters
from megatron.moe.layer_sums import find_moe_layers
from megatron.tokenizer.build import build_tokenizer


@dataclass(frozen=True)
class CellSize:
    """Parameters of a model, and how they depend on the experts that a token uses."""

    total: int
    active_min: int
    """used by a token that visits the fewest experts that its gates allow"""
    active_max: int
    """used by a token that visits the most"""
    routed: tuple[int, ...] = ()
    """parameters of the routed experts of each MoE layer"""
    num_experts: tuple[int, ...] = ()
    """routed experts of each MoE layer"""

    @property
    def is_fixed(self) -> bool:
        """Whether every token uses the same number of experts."""
        return self.active_min == self.active_max

    def active(self, experts_per_token: float | Sequence[float]) -> float:
        """Return the parameters that a token uses with this mean number of computing experts.

        Args:
            experts_per_token: in every MoE layer, or a list of one mean for each.
        """
        if isinstance(experts_per_token, (int, float)):
            experts_per_token = [experts_per_token] * len(self.routed)
        assert len(experts_per_token) == len(self.routed), "one mean for each MoE layer"
        used = [
            number * mean / experts
            for number, mean, experts in zip(
                self.routed, experts_per_token, self.num_experts, strict=True
            )
        ]
        return self.total - sum(self.routed) + math.fsum(used)

    def planned_active(self, declared: float | None) -> float | None:
        """Return the parameters that a token is expected to use; None: not declared.

        Args:
            declared: estimate of the experts per token; exact numbers take precedence over it.
        """
        if self.is_fixed:
            return float(self.active_max)
        if declared is None:
            return None
        return self.active(declared)


def cell_size(config: RunConfig) -> CellSize:
    """Count the parameters of the model of a configuration, without memory for them.

    Raises:
        ValueError: the model cannot be built, or the tokenizer cannot be read.
        OSError: a file of the tokenizer is missing.
    """
    model_config = replace(
        config.model, vocab_size=max(config.model.vocab_size, vocabulary_size(config))
    )
    with meta_device():
        model = build_run_config_model(
            replace(config, model=model_config), model_config.vocab_size
        )
    count = count_parameters(model)
    layers = find_moe_layers(model)
    routed = []
    for layer in layers:
        stacks = [p.numel() // p.shape[0] for p in layer.experts.parameters()]
        routed.append(sum(stacks) * layer.num_experts)
    return CellSize(
        total=count.total,
        active_min=count.active_min,
        active_max=count.active_max,
        routed=tuple(routed),
        num_experts=tuple(layer.gate.num_experts for layer in layers),
    )


def vocabulary_size(config: RunConfig) -> int:
    """Return the size of the vocabulary before padding.

    Raises:
        ValueError: the tokenizer cannot be read.
        OSError: one of its files is missing.
    """
    if config.model.vocab_size and config.data.mock_data and config.tokenizer.lacks_files:
        return config.model.vocab_size
    return _tokenizer_vocabulary(config.tokenizer)


@cache
def _tokenizer_vocabulary(config: TokenizerConfig) -> int:
    return build_tokenizer(config).vocab_size
