"""The base class of expert types, and their constructor.

An expert type is one file of `megatron/moe/experts/types/`, or outside the tree. A
subclass of `ExpertType` with `name=` registers itself:

    class MyExperts(ExpertType, name="mine"):
        @dataclass(frozen=True)
        class Config: ...  # fields become flags with the prefix --expert-
        def __init__(self, config, context): ...  # add_matrix, add_vector
        def apply_experts(self, x_TD, weight_S, rows) -> Tensor: ...

All parameters are stacks [E, ...] with one entry per expert of this rank. That is all
that expert parallelism, ZeRO, checkpoints and parameter counts need to know of a type.
The layer sends rows and weights to the ranks that hold the experts before it calls the
experts, so a type never communicates.

Shape suffixes: E experts on this rank, T tokens (with sharded experts: rows received),
S rows (one per assignment, sorted by expert), D features of a token row, H outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.config.expert_choice import ExpertTypes
from megatron.moe.dispatch.permute import PermuteTokens, UnpermuteTokens
from megatron.moe.dispatch.plan import PermutedTokens
from megatron.moe.experts.backends import choose_expert_backend
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.experts.expert_registry import EXPERT_TYPES
from megatron.moe.experts.grouped_linear import add_expert_bias, grouped_linear
from megatron.moe.gate_registry import REGISTRY


@dataclass(frozen=True)
class ExpertContext:
    """Sizes of one rank's experts and how they are computed; the same for all types."""

    num_local: int
    """number of experts on this rank"""
    hidden_size: int
    """features of a token row: the model's hidden size, or --moe-latent-size"""
    ffn_size: int
    """hidden size of one expert"""
    activation: str = "gelu"
    """the model's --activation, which a type may ignore"""
    init: ExpertInit = field(default_factory=ExpertInit)
    """distribution and seed of the initial weights"""
    backend: str = "auto"
    """value of --moe-backend; see `megatron.moe.experts.backends`"""
    weight_on_input: bool = False
    """multiply the experts' inputs by the routing weights instead of their outputs"""


class ExpertType(nn.Module):
    """Base class of all expert types: the experts of one rank as stacked weights."""

    initialises_itself: ClassVar[bool] = True
    """`create_experts` draws the initial weights, so the model's initialisation skips
    them"""
    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """Options of an expert type; their fields become flags. This type has none."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is not None:
            EXPERT_TYPES.register(name, cls)
            cls.name = name

    def __init__(self, config: Any, context: ExpertContext):
        super().__init__()
        self.config = config
        self.context = context
        self.num_local = context.num_local
        self._stds: dict[str, float] = {}

    def add_matrix(
        self, name: str, outputs: int, inputs: int, *, is_output: bool = False
    ) -> None:
        """Add the parameter `name` [E, outputs, inputs], one matrix per expert.

        Args:
            is_output: whether it is the down projection, whose initial weights are
                smaller in deeper models.
        """
        init = self.context.init
        self._stds[name] = init.output_std if is_output else init.init_std
        shape = (self.num_local, outputs, inputs)
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def add_vector(self, name: str, size: int, *, exists: bool = True) -> None:
        """Add the parameter `name` [E, size], which starts as zeros: biases.

        Such parameters have no weight decay.

        Args:
            exists: False: the attribute is None.
        """
        if not exists:
            self.register_parameter(name, None)
            return
        self._stds[name] = 0.0
        shape = (self.num_local, size)
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def init_expert(self, local: int, generator: torch.Generator) -> None:
        """Draw one expert's initial weights, in the order in which they were added.

        Args:
            local: number of the expert on this rank.
            generator: depends on the seed, the layer and the expert's global number
                only, so that weights do not depend on how experts are sharded.
        """
        for name, std in self._stds.items():
            weight = getattr(self, name).data[local]
            if std == 0:
                weight.zero_()
            else:
                weight.normal_(0, std, generator=generator)

    def forward(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        """Return the weighted sum of each token's experts: [T, D].

        With experts on several ranks, T counts rows received from all of them, one
        expert each.
        """
        if not self.context.weight_on_input:
            return self.apply_experts(x_TD, weight_S, rows)
        x_SD = self.gather(x_TD, rows)
        weight_S = weight_S[: len(x_SD)]
        x_SD = (x_SD * weight_S.unsqueeze(1)).to(x_SD.dtype)
        rows_as_tokens = rows.one_row_per_token(len(x_SD))
        y_SD = self.apply_experts(x_SD, torch.ones_like(weight_S), rows_as_tokens)
        return UnpermuteTokens.apply(y_SD, None, rows)

    def apply_experts(self, x_TD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        """Compute the experts; the method that a type implements.

        Args:
            x_TD: token rows in the compute dtype.
            weight_S: fp32 routing weights of the rows.
            rows: the token and the expert of each row, for the methods below.
        Returns:
            Sum over each token's rows of weight * expert(x), [T, D] in x's dtype.
        """
        raise NotImplementedError(f"expert type {type(self).__name__} has no apply_experts")

    def gather(self, x_TD: Tensor, rows: PermutedTokens) -> Tensor:
        """Return the token rows sorted by expert: [S, D]."""
        x_SD = PermuteTokens.apply(x_TD, rows)
        if self._backend(x_TD) in ("reference", "cpu"):
            return x_SD[: int(rows.expert_offsets_E[-1])]
        # On a GPU the rows past the last expert's stay, as reading their number would
        # wait for the device. `linear` and `combine` ignore them.
        return x_SD

    def linear(
        self,
        x_SD: Tensor,
        weight_EHD: Tensor,
        rows: PermutedTokens,
        bias_EH: Tensor | None = None,
    ) -> Tensor:
        """Return W_e x (+ b_e) of each row's expert e: [S, H]."""
        offsets_E = rows.expert_offsets_E
        y_SH = grouped_linear(x_SD, weight_EHD, offsets_E, self._backend(x_SD))
        if bias_EH is None:
            return y_SH
        return add_expert_bias(y_SH, bias_EH, offsets_E)

    def combine(self, y_SD: Tensor, weight_S: Tensor, rows: PermutedTokens) -> Tensor:
        """Return each token's sum of its rows times their weights: [T, D]."""
        return UnpermuteTokens.apply(y_SD, weight_S[: len(y_SD)], rows)

    def _backend(self, x: Tensor) -> str:
        """Return the backend of the matrix products on rows of this device and dtype."""
        c = self.context
        features = (c.hidden_size, c.ffn_size)
        return choose_expert_backend(c.backend, x.device.type, x.dtype, features)[0]


def available_expert_types() -> list[str]:
    """Return the names of all expert types, sorted."""
    _import_all()
    return sorted(EXPERT_TYPES.classes)


def expert_config_class(name: str) -> type:
    """Return the Config class of an expert type: its fields are the type's options.

    Raises:
        ValueError: no such type; the message lists the known ones.
    """
    _import_all()
    return EXPERT_TYPES.find(name).Config


@torch.no_grad()
def create_experts(name: str, context: ExpertContext, **options: Any) -> ExpertType:
    """Build one rank's experts with their initial weights.

    Args:
        name: registered name, see `available_expert_types`.
        options: fields of the type's Config.
    Raises:
        ValueError: unknown type or option (the message lists the known ones), or a
            value that the type refuses.
    """
    _import_all()
    config = EXPERT_TYPES.make_config(name, options)
    experts = EXPERT_TYPES.find(name)(config, context)
    if not any(parameter.is_meta for parameter in experts.parameters()):
        for local in range(context.num_local):
            experts.init_expert(local, context.init.generator(local))
    return experts


def _import_all() -> None:
    """Import built-in types and those of installed packages."""
    EXPERT_TYPES.import_built_in()
    REGISTRY.import_installed()


KNOWN_EXPERT_TYPES = ExpertTypes(expert_config_class, available_expert_types)
"""The expert types of this process, for the parser of flags"""
