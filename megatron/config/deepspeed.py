"""Config section `deepspeed`: the ZeRO stage and the user's DeepSpeed configuration file."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import option, require_choices


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Settings of the DeepSpeed engine."""

    zero_stage: int = option(1, choices=(0, 1, 2, 3))
    """DeepSpeed ZeRO stage"""
    deepspeed_config: str = ""
    """JSON file merged into the DeepSpeed configuration; it may not contradict what flags
    set"""

    def __post_init__(self):
        require_choices(self)
