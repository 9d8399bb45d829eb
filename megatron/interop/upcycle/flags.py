"""Flags of upcycling: those of a training run for the experts, and those of `UpcycleOptions`.

The configuration of the dense model is the default of every flag, as `--config` of a training run
is. Only flags of MoE layers, of gates and the seed may change it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron.config import cli
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.fields import flag_name, require
from megatron.config.monitoring import LoggingConfig, ProfilingConfig
from megatron.config.run_json import run_json_text
from megatron.config.schema import SECTIONS, RunConfig
from megatron.interop.upcycle.options import UpcycleOptions
from megatron.log import get_logger
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
from megatron.moe.gate import available_gates, gate_class, gate_config_class
from megatron.moe.gate_registry import import_gate_files

_GATES = (gate_config_class, available_gates, import_gate_files)
_NEW_VALUES = (("model", "init_method_std"), ("train", "seed"))
"""Fields outside of the section `moe` that may be set: the router's noise and its seed"""
_SHARED_FLAGS = ("--moe-shared-experts", "--moe-shared-expert-intermediate-size")


@dataclass(frozen=True)
class UpcycleRequest:
    """The MoE model that flags ask for."""

    config: RunConfig
    """configuration of the MoE model"""
    options: UpcycleOptions
    set_flags: frozenset[str]
    """flags on the command line, without values"""
    dense_width: int
    """number of neurons of a dense layer"""

    @property
    def moe_layers(self) -> list[int]:
        """Blocks whose dense layer is replaced."""
        gates = self.config.moe.gates(self.config.model.num_layers)
        return [layer for layer, gate in enumerate(gates) if gate is not None]

    @property
    def num_slices(self) -> int:
        """Number of different slices of the dense layer among the experts of a layer."""
        if self.options.is_split:
            return self.config.moe.num_experts
        return self.options.granularity


def parse_request(dense: RunConfig, argv: Sequence[str]) -> UpcycleRequest:
    """Return the MoE model that flags make of a dense model.

    Args:
        dense: configuration of the dense model.
        argv: flags.
    Raises:
        ValueError: a flag does not exist or has no effect here, or sizes do not fit.
    """
    width = dense.model.ffn_size
    dense = _base_config(dense)
    words = [_with_hyphens(word) for word in argv]
    given = frozenset(word.partition("=")[0] for word in words if word.startswith("--"))
    words += _shared_flags(words)
    config, options = _parse(dense, words)
    require(config.moe.num_experts > 0, "--num-experts", 0, "a positive number", "Set it.")
    for name in config.moe.gate_layers.gates:
        is_grouped = gate_class(name).expert_kind == "grouped"
        require(
            is_grouped, "--gate", name, "a gate whose experts are MLPs", "Choose another one."
        )
    _refuse_other_experts(config, given)
    more = _size_flags(width, config, options) + _norm_flags(config, given)
    # Compared before the width of dense layers is left out, where no dense layer remains.
    _refuse_other_changes(dense, config)
    config, options = _parse(_without_unused_width(dense, config), [*words, *more])
    return UpcycleRequest(config, options, given, width)


def _with_hyphens(word: str) -> str:
    """Return a flag as the parser spells it."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _shared_flags(words: Sequence[str]) -> list[str]:
    """Return the flags of a shared expert if --shared-neurons is among the words.

    They are known before anything is parsed, because other flags, such as that of a gate on the
    shared expert, have an effect only with them.
    """
    neurons = ""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--shared-neurons":
            neurons = value if equals else "".join(words[i + 1 : i + 2])
    if not neurons.isdecimal() or int(neurons) == 0:
        return []
    experts, width = _SHARED_FLAGS
    return [experts, "1", width, neurons]


def _parse(dense: RunConfig, argv: Sequence[str]) -> tuple[RunConfig, UpcycleOptions]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.json"
        path.write_text(run_json_text(dense), encoding="utf-8")
        return cli.parse_with(
            UpcycleOptions,
            ["--config", str(path), *argv],
            *_GATES,
            expert_types=KNOWN_EXPERT_TYPES,
        )


def _base_config(dense: RunConfig) -> RunConfig:
    """Return the configuration on which the flags build: without directories of the dense run.

    ZeRO 0, which experts cannot have, becomes ZeRO 1.
    """
    zero_stage = max(1, dense.deepspeed.zero_stage)
    return replace(
        dense,
        deepspeed=replace(dense.deepspeed, zero_stage=zero_stage),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        profiling=ProfilingConfig(),
    )


def _without_unused_width(dense: RunConfig, config: RunConfig) -> RunConfig:
    """Return the configuration without the width of dense layers if none is left."""
    layers = range(config.model.num_layers)
    if not all(map(config.moe.is_moe_layer, layers)):
        return dense
    return replace(dense, model=replace(dense.model, ffn_hidden_size=0))


def _refuse_other_changes(dense: RunConfig, config: RunConfig) -> None:
    """Raise ValueError for a flag that would change anything but experts and gates."""
    for section in SECTIONS:
        if section == "moe":
            continue
        for field in fields(getattr(dense, section)):
            before = getattr(getattr(dense, section), field.name)
            after = getattr(getattr(config, section), field.name)
            require(
                before == after or (section, field.name) in _NEW_VALUES,
                flag_name(field.name),
                after,
                f"{before!r}, as the dense model has it",
                "Leave the flag out: only experts, gates, --seed and --init-method-std, the "
                "router's noise, may change.",
            )


def _refuse_other_experts(config: RunConfig, given: frozenset[str]) -> None:
    """Raise ValueError for experts that cannot compute what a dense layer does."""
    moe = config.moe
    require(
        moe.expert_type == "mlp",
        "--expert-type",
        moe.expert_type,
        "mlp, the layer that is copied or divided",
    )
    advice = "Leave it out: the experts must compute what the dense layer does."
    require(
        moe.moe_latent_size is None, "--moe-latent-size", moe.moe_latent_size, "none", advice
    )
    require(not moe.moe_weight_on_input, "--moe-weight-on-input", True, "off", advice)
    for flag in _SHARED_FLAGS:
        require(
            flag not in given,
            flag,
            "set",
            "left out; --shared-neurons makes a shared expert of some of the dense layer's neurons",
        )


def _expert_width(width: int, config: RunConfig, options: UpcycleOptions) -> int:
    """Return the width of an expert.

    Args:
        width: that of a dense layer.
    Raises:
        ValueError: the neurons cannot be divided equally.
    """
    num_experts = config.moe.num_experts
    if not options.is_split:
        granularity = options.granularity
        require(
            num_experts % granularity == 0,
            "--num-experts",
            num_experts,
            f"a multiple of --granularity {granularity}",
            f"Each copy of the dense layer becomes {granularity} experts.",
        )
        require(
            width % granularity == 0,
            "--granularity",
            granularity,
            f"a divisor of the dense layer's width, which is {width}",
        )
        return width // granularity
    shared = options.shared_neurons
    require(shared < width, "--shared-neurons", shared, f"less than the dense width {width}")
    require(
        (width - shared) % num_experts == 0,
        "--num-experts",
        num_experts,
        f"a divisor of the {width - shared} neurons that the experts share out",
        f"The dense layer has {width}; --shared-neurons {width % num_experts or num_experts} "
        "would leave a multiple.",
    )
    return (width - shared) // num_experts


def _size_flags(width: int, config: RunConfig, options: UpcycleOptions) -> list[str]:
    """Return the flags of the experts' sizes.

    Args:
        width: that of a dense layer.
    Raises:
        ValueError: --moe-ffn-hidden-size is set to another width.
    """
    expert_width = _expert_width(width, config, options)
    given = config.moe.moe_ffn_hidden_size
    require(
        given in (0, expert_width),
        "--moe-ffn-hidden-size",
        given,
        f"{expert_width}, which follows from the dense layer and the number of experts",
        "Leave it out.",
    )
    return ["--moe-ffn-hidden-size", str(expert_width)]


def _norm_flags(config: RunConfig, given: frozenset[str]) -> list[str]:
    """Return --norm-topk-prob if weights that add up to 1 are possible and not decided by flags."""
    layers = config.moe.gate_layers
    if len(layers.gates) != 1 or any(flag.endswith("norm-topk-prob") for flag in given):
        return []
    options: dict[str, Any] = config.gate_options[layers.gates[0]]
    if options.get("norm_topk_prob", True) or options.get("topk", 2) == 1:
        return []
    get_logger().info(
        "--norm-topk-prob is on, so that the weights of a token's experts have the same sum for "
        "all tokens; --no-norm-topk-prob turns it off"
    )
    return ["--norm-topk-prob"]
