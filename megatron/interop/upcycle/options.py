"""Options of upcycling: how the experts of an MoE model are made from dense layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_choices,
    require_each,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.needs import setting

COPY = "copy"
SPLIT_STRATEGIES = ("sequential", "random", "kmeans", "coactivation", "gradient")
STRATEGIES = (COPY, *SPLIT_STRATEGIES)
"""Ways to make experts: copies of the dense layer, and ways to divide its neurons"""
DATA_STRATEGIES = ("coactivation", "gradient")
"""Strategies that need statistics of the dense model on text"""
_IS_SPLIT = setting("strategy", *SPLIT_STRATEGIES)
_HAS_DATA = setting("sample_data")


@dataclass(frozen=True)
class UpcycleOptions:
    """Options of upcycling, whose fields are flags of the tool."""

    strategy: str = option(COPY, choices=STRATEGIES)
    """copy: every expert is a copy of the dense layer, or a slice of it with --granularity; the
    others divide the neurons of the dense layer among the experts, each to one expert:
    consecutive, random, balanced k-means of the rows of the gate (up) projection, those that are
    active together, or by the importance |h dL/dh| for clusters of tokens"""
    granularity: int = option(1, needs=setting("strategy", COPY))
    """each copy is cut into this many experts of consecutive neurons; --num-experts counts the
    slices"""
    noise_std: float = 0.0
    """noise that is added to the experts' weights, as a fraction of the standard deviation of the
    dense matrix"""
    drop_ratio: float = 0.0
    """fraction of the neurons of each expert whose weights are drawn again, with the mean and the
    standard deviation of those that they replace (drop-upcycling)"""
    shared_neurons: int = option(0, needs=_IS_SPLIT)
    """number of neurons that become a shared expert, which always runs: the first ones, random
    ones (random), those most often active (coactivation) or the most important (gradient)"""
    router_init: str = option("noise", choices=("noise", "centroids"))
    """initial router: the gate's own random weights, or the centre of each expert: of its rows of
    the gate (up) projection, or with --sample-data of the tokens that activate it"""
    scale: str = option("auto", choices=("auto", "none"))
    """factor of the routed experts; auto: with equal logits of all experts, the experts of a token
    add up to the dense layer, or to E / k times k of its E slices; none: no factor"""
    scale_in: str = option(
        "auto", choices=("auto", "gate", "weights"), needs=setting("scale", "auto")
    )
    """where the factor is: in the gate's --routed-scaling-factor, if it has that option, or in the
    experts' down projections; auto: in the gate, or with --output-format hf in the weights, because
    Mixtral has no factor"""
    sample_data: str = ""
    """text for strategies and centroids that need activations: JSONL files, or the prefix of
    .bin/.idx files"""
    sample_tokens: int = option(8192, needs=_HAS_DATA)
    """number of tokens of --sample-data that are used"""
    active_fraction: float = option(0.1, needs=_HAS_DATA)
    """a neuron counts as active for a token if its |h| is among this fraction of the largest"""

    output_format: str = option("megatron", choices=("megatron", "hf"))
    """megatron: a directory of checkpoints that --load continues; hf: a Hugging Face folder of the
    first family that expresses the model, such as Mixtral, or of moe_megatron if none does"""

    def __post_init__(self):
        require_choices(self)
        require_positive_integers(self, "granularity", "sample_tokens")
        require_not_negative(self, "shared_neurons", "noise_std")
        require_each(self, ("drop_ratio",), lambda value: 0 <= value <= 1, "0 to 1")
        require_each(self, ("active_fraction",), lambda value: 0 < value <= 1, "0 < x <= 1")
        needs_data = self.strategy in DATA_STRATEGIES
        require_setting(
            self,
            "strategy",
            bool(self.sample_data) or not needs_data,
            f"{' '.join(name for name in STRATEGIES if name not in DATA_STRATEGIES)} without "
            "--sample-data",
            "Give text of the kind that the model was trained on with --sample-data.",
        )
        require_setting(
            self,
            "router_init",
            self.router_init == "noise" or self.is_split,
            f"noise with --strategy {COPY}",
            "Copies have the same centre.",
        )
        uses_data = needs_data or self.router_init == "centroids"
        require_setting(
            self,
            "sample_data",
            uses_data or not self.sample_data,
            f"only with --strategy {' or '.join(DATA_STRATEGIES)}, or --router-init centroids",
            "Leave it out.",
        )

    @property
    def scales_weights(self) -> bool:
        """Whether the factor is in the weights, whatever options the gate has."""
        if self.scale_in == "auto":
            return self.output_format == "hf"
        return self.scale_in == "weights"

    @property
    def is_split(self) -> bool:
        """Whether the experts divide the neurons among them, instead of being copies."""
        return self.strategy != COPY
