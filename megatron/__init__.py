"""moe-megatron: a trainer for mixture-of-experts language models in which the gate is the thing under study."""

__version__ = "0.1.0"
