"""Config section `rotary`: rotary position embeddings beyond their base."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require_each, require_setting
from megatron.config.model import ModelConfig
from megatron.config.needs import setting


@dataclass(frozen=True)
class RotaryConfig:
    """Options of rotary position embeddings; their base belongs to the model."""

    rotary_percent: float = option(1.0, needs=setting("position_embedding_type", "rope"))
    """share of a head's dimensions that is rotated, from the first one on; 0.5: one half"""

    def __post_init__(self):
        require_each(self, ("rotary_percent",), lambda value: 0 < value <= 1, "0 < share <= 1")

    def check_heads(self, model: ModelConfig) -> None:
        """Check that an even number of dimensions is rotated.

        Raises:
            ValueError: the number is odd or 0.
        """
        size = self.rotated_size(model.head_size)
        require_setting(
            self,
            "rotary_percent",
            model.position_embedding_type != "rope" or (size > 0 and size % 2 == 0),
            f"a share of the head's {model.head_size} dimensions that is an even number of them",
        )

    def rotated_size(self, head_size: int) -> int:
        """Return how many dimensions of a head are rotated."""
        return int(head_size * self.rotary_percent)
