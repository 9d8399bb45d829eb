"""moe-megatron: a trainer for MoE language models in which the gate is what people study."""

__version__ = "0.1.0"
