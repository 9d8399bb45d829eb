"""Config section `rotary`: rotary position embeddings beyond their base."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_choices,
    require_each,
    require_not_negative,
    require_positive_numbers,
    require_setting,
)
from megatron.config.model import ModelConfig
from megatron.config.needs import setting

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
_LLAMA3 = setting("rope_scaling", "llama3")
_YARN = setting("rope_scaling", "yarn")


@dataclass(frozen=True)
class RotaryConfig:
    """Options of rotary position embeddings; their base belongs to the model."""

    rotary_percent: float = option(
        1.0, needs=(setting("position_embedding_type", "rope"), setting("attention", "gqa"))
    )
    """share of a head's dimensions that is rotated, from the first one on; 0.5: one half"""
    rope_scaling: str = option(
        "none", choices=ROPE_SCALINGS, needs=setting("position_embedding_type", "rope")
    )
    """change of the rotary frequencies for sequences longer than those of the first training.
    linear: divide all by the factor; llama3: low ones only (Llama 3.1); yarn: low ones, and
    scale the attention scores (Peng et al. 2023)"""
    rope_scaling_factor: float = option(
        8.0, needs=setting("rope_scaling", "linear", "llama3", "yarn")
    )
    """factor by which the context is extended"""
    rope_original_max_positions: int = option(
        0, needs=setting("rope_scaling", "llama3", "yarn")
    )
    """positions of the first training, before the extension; 0: those of the model"""
    rope_low_freq_factor: float = option(1.0, needs=_LLAMA3)
    """frequencies with fewer rotations than this in the original positions are divided by the
    factor"""
    rope_high_freq_factor: float = option(4.0, needs=_LLAMA3)
    """frequencies with more rotations than this in the original positions stay; those between
    the two are interpolated"""
    yarn_beta_fast: float = option(32.0, needs=_YARN)
    """frequencies with more rotations than this in the original positions stay"""
    yarn_beta_slow: float = option(1.0, needs=_YARN)
    """frequencies with fewer rotations than this in the original positions are divided by the
    factor; those between the two are interpolated"""
    yarn_truncate: bool = option(True, needs=_YARN)
    """round the first and the last interpolated dimension to integers (not in gpt-oss)"""
    yarn_mscale: float = option(0.0, needs=(_YARN, setting("yarn_mscale_all_dim")))
    """with m(x) = 0.1 x ln(factor) + 1, rotated queries and keys are multiplied by m(mscale) /
    m(mscale-all-dim); 0: by m(1)"""
    yarn_mscale_all_dim: float = option(0.0, needs=_YARN)
    """see --yarn-mscale; latent attention also multiplies scores by m(mscale-all-dim)^2
    (DeepSeek-V2); 0: by 1"""
    yarn_attention_factor: float = option(0.0, needs=_YARN)
    """number that rotated queries and keys are multiplied by; 0: see --yarn-mscale"""

    def __post_init__(self):
        require_choices(self)
        require_each(self, ("rotary_percent",), lambda value: 0 < value <= 1, "0 < share <= 1")
        require_positive_numbers(
            self,
            "rope_scaling_factor",
            "rope_low_freq_factor",
            "yarn_beta_slow",
        )
        require_not_negative(
            self,
            "rope_original_max_positions",
            "yarn_mscale",
            "yarn_mscale_all_dim",
            "yarn_attention_factor",
        )
        for high, low in (
            ("rope_high_freq_factor", "rope_low_freq_factor"),
            ("yarn_beta_fast", "yarn_beta_slow"),
        ):
            lower = getattr(self, low)
            flag = "--" + low.replace("_", "-")
            allowed = f"above {flag}, which is {lower}"
            require_setting(self, high, getattr(self, high) > lower, allowed)

    def check_model(self, model: ModelConfig, head_size: int) -> None:
        """Check that the options fit the model's heads and base.

        Args:
            head_size: dimensions of a head to which rotary positions may apply.
        Raises:
            ValueError: an odd number of dimensions would be rotated, or none, or the base of
                the frequencies is too small for YaRN.
        """
        if model.position_embedding_type != "rope":
            return
        size = self.rotated_size(head_size)
        require_setting(
            self,
            "rotary_percent",
            size > 0 and size % 2 == 0,
            f"a share of the head's {head_size} dimensions that is an even number of them",
        )
        require_setting(
            model,
            "rotary_base",
            self.rope_scaling != "yarn" or model.rotary_base > 1,
            "above 1 with --rope-scaling yarn",
        )

    def rotated_size(self, head_size: int) -> int:
        """Return how many dimensions of a head are rotated."""
        return int(head_size * self.rotary_percent)
