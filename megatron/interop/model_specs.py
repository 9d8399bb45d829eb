"""Names, shapes and dtypes of the tensors of a configuration's model, without building it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.fields import require
from megatron.config.schema import RunConfig
from megatron.engine.zero_shards import GlobalLayout
from megatron.io.safetensors_writer import TensorSpec
from megatron.model.builder import build_run_config_model
from megatron.model.gpt import GPT
from megatron.model.meta_device import meta_device
from megatron.parallel.groups import Groups

MOST_BLOCKS = 10_000
"""Largest number of blocks of which a model is built to know its tensors"""


@dataclass(frozen=True)
class ModelSpecs:
    """The tensors of a model."""

    shapes: dict[str, tuple[int, ...]]
    """Full shapes of the parameters by name"""
    buffers: dict[str, TensorSpec]
    """Dtypes and shapes of the buffers in its state by name"""

    @property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of parameters and buffers by name."""
        return self.shapes | {name: spec.shape for name, spec in self.buffers.items()}

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def model_specs(config: RunConfig, vocab_size: int) -> ModelSpecs:
    """Return the tensors of the model of a configuration.

    Args:
        vocab_size: Size of the vocabulary before padding.

    Raises:
        ValueError: A gate or the expert type refuses its options, or the model is too deep.
    """
    require(
        config.model.num_layers <= MOST_BLOCKS,
        "--num-layers",
        config.model.num_layers,
        f"up to {MOST_BLOCKS}",
    )
    model = build_meta_model(config, vocab_size)
    layout = GlobalLayout.of(model, Groups())
    state = model.state_dict()
    buffers = {}
    for name in layout.buffers:
        buffers[name] = TensorSpec(name, state[name].dtype, tuple(state[name].shape))
    return ModelSpecs(dict(layout.shapes), buffers)


def build_meta_model(config: RunConfig, vocab_size: int) -> GPT:
    """Build the model of a configuration on `meta`, where it takes no memory."""
    with meta_device():
        return build_run_config_model(config, vocab_size)
