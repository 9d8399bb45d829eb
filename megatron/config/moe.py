"""Config section `moe`: MoE layers and where they are; a gate's own options belong to the gate."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.fields import (
    option,
    require_choices,
    require_not_negative,
    require_positive_integers,
    require_setting,
)
from megatron.config.gate_layers import GateLayers, parse_gate_layers
from megatron.config.needs import setting

AUX_LOSS_REDUCTIONS = ("sum", "mean")
LAYER_FIELDS = ("moe_layers", "expert_interval", "moe_first_k_dense")
"""Fields that select the MoE layers where --gate names a single gate"""
MOE_BACKENDS = ("auto", "reference", "cpu", "grouped_mm", "triton")


@dataclass(frozen=True)
class MoEConfig:
    """The mixture-of-experts layers. The gate's own options are listed with the gate."""

    num_experts: int = 0
    """routed experts per MoE layer; 0: all layers are dense"""
    expert_interval: int = option(1, needs=setting("num_experts"))
    """every n-th layer is an MoE layer: 2 makes layers 2, 4, 6, ... MoE layers"""
    moe_layers: tuple[int, ...] = option((), needs=setting("num_experts"))
    """indices of the MoE layers, counted from 0; alternative to --expert-interval and
    --moe-first-k-dense"""
    gate: str = option("topk", needs=setting("num_experts"))
    """gate (router) of the MoE layers, or a gate per layer, such as hash@0-2,deepseek_v3@3-
    (blocks counted from 0; dense@0 makes block 0 dense); --gate NAME --help lists that gate's
    own flags"""
    gate_path: tuple[str, ...] = option((), needs=setting("num_experts"), repeatable=True)
    """Python files or package folders with gates of your own, which are imported; may be
    given several times"""
    expert_type: str = option("mlp", needs=setting("num_experts"))
    """kind of the routed experts; mlp: the MLP of dense layers; --expert-type NAME --help lists
    that type's own flags"""
    moe_weight_on_input: bool = option(False, needs=setting("num_experts"))
    """multiply the input of an expert by the routing weight instead of its output (Llama 4)"""
    moe_latent_size: int | None = option(None, needs=setting("num_experts"))
    """run the experts on projections of the tokens to this many features, of which fewer bytes
    are sent to other ranks (Nemotron 3); none: on the hidden states"""
    moe_ffn_hidden_size: int = option(0, needs=setting("num_experts"))
    """hidden size of one expert; 0: that of a dense feed-forward layer"""
    moe_aux_loss_reduction: str = option(
        "sum", choices=AUX_LOSS_REDUCTIONS, needs=setting("num_experts")
    )
    """reduction of the gates' auxiliary losses (balance losses, z-losses and others) over MoE
    layers. Published coefficients are those of the sum; with mean a router's gradient is that of
    the sum divided by the number of MoE layers"""
    moe_train_capacity_factor: float = option(0.0, needs=setting("num_experts"))
    """capacity of an expert during training: it accepts factor * k * tokens / experts of the
    tokens of one rank's micro-batch and drops the rest; k is the gate's experts per token, or 1
    where their number varies from token to token (threshold); 0: no limit (dropless)"""
    moe_eval_capacity_factor: float = option(0.0, needs=setting("num_experts"))
    """capacity of an expert during evaluation, as --moe-train-capacity-factor"""
    moe_min_capacity: int = option(
        4,
        needs=(
            setting("num_experts"),
            setting("moe_train_capacity_factor") | setting("moe_eval_capacity_factor"),
        ),
    )
    """lower bound of an expert's capacity"""
    moe_shared_experts: int = option(0, needs=setting("num_experts"))
    """number of shared experts, which process every token; computed as one MLP of this many
    times the expert hidden size"""
    moe_shared_expert_intermediate_size: int = option(0, needs=setting("moe_shared_experts"))
    """hidden size of that MLP if it is not such a multiple; 0: it is"""
    moe_shared_expert_gate: bool = option(False, needs=setting("moe_shared_experts"))
    """multiply the output of the shared experts by sigmoid(w x) with a learned w (Qwen2-MoE)"""
    moe_first_k_dense: int = option(0, needs=setting("num_experts"))
    """the first k layers are dense"""
    moe_expert_parallel_size: int = option(1, needs=setting("num_experts"))
    """expert-parallel size: number of ranks over which one set of experts is distributed"""
    moe_backend: str = option("auto", choices=MOE_BACKENDS, needs=setting("num_experts"))
    """implementation of the expert computation; auto: cpu on the CPU, and on a GPU the first
    available of triton, grouped_mm, reference"""
    check_routing: bool = option(False, needs=setting("num_experts"))
    """check in every forward pass that gates keep their contract: ranges of tokens and
    experts, finite weights; synchronises with the device"""

    def __post_init__(self):
        require_not_negative(
            self,
            "num_experts",
            "moe_shared_experts",
            "moe_shared_expert_intermediate_size",
            "moe_first_k_dense",
            "moe_train_capacity_factor",
            "moe_eval_capacity_factor",
            "moe_min_capacity",
            "moe_ffn_hidden_size",
        )
        require_positive_integers(self, "expert_interval", "moe_expert_parallel_size")
        if self.moe_latent_size is not None:
            require_positive_integers(self, "moe_latent_size")
        require_setting(
            self,
            "moe_layers",
            not self.moe_layers or (self.expert_interval == 1 and self.moe_first_k_dense == 0),
            "only without --expert-interval and --moe-first-k-dense",
            "Use one of the two.",
        )
        if self.gate_layers.is_per_layer:
            self._refuse_layer_flags()
        ep_size = self.moe_expert_parallel_size
        require_setting(
            self,
            "num_experts",
            self.num_experts % ep_size == 0,
            f"a multiple of --moe-expert-parallel-size, which is {ep_size}",
            "Each rank holds the same number of experts.",
        )
        require_choices(self)

    def _refuse_layer_flags(self) -> None:
        """Raise ValueError for flags that select MoE layers, which a list of gates does."""
        for name in LAYER_FIELDS:
            is_default = getattr(self, name) == getattr(MoEConfig, name, ())
            allowed = f"left out with --gate {self.gate}, which says which layers are dense"
            require_setting(self, name, is_default, allowed, "Use one of the two.")

    @property
    def gate_layers(self) -> GateLayers:
        """The gate, or the gate of each layer."""
        return parse_gate_layers(self.gate)

    def expert_size(self, ffn_size: int) -> int:
        """Return the hidden size of a routed expert; `ffn_size` is that of a dense layer."""
        return self.moe_ffn_hidden_size or ffn_size

    def shared_size(self, ffn_size: int) -> int:
        """Return the hidden size of the MLP of all shared experts; 0 without any."""
        size = self.moe_shared_expert_intermediate_size
        return size or self.moe_shared_experts * self.expert_size(ffn_size)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether block `layer`, counted from 0, has an MoE layer."""
        return self.gate_of(layer) is not None

    def gate_of(self, layer: int) -> str | None:
        """Return the gate of block `layer`, counted from 0; None if the block is dense."""
        if self.num_experts == 0:
            return None
        if self.gate_layers.is_per_layer:
            return self.gate_layers.gate_of(layer)
        if self.moe_layers:
            has_experts = layer in self.moe_layers
        else:
            is_late = layer >= self.moe_first_k_dense
            has_experts = is_late and (layer + 1) % self.expert_interval == 0
        return self.gate if has_experts else None

    def gates(self, num_layers: int) -> list[str | None]:
        """Return the gate of each block of a model; None for those that are dense."""
        return [self.gate_of(layer) for layer in range(num_layers)]
