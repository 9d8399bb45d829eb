"""The optimizer: its construction, its parameter groups and the state it keeps.

A new optimizer is added here: build it in `build_optimizer`, register its class in
`register_optimizer_with_zero`, and name its state tensors in a class attribute `moments`.
Its flags are fields of `OptimizerConfig` (megatron/config/optimizer.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from megatron.config.schema import OptimizerConfig
from megatron.engine.startup_patches import UncompiledAdamMethods, import_muon_uncompiled
from megatron.log import get_logger
from megatron.moe.experts.expert_type import ExpertType
from megatron.moe.layer_sums import find_moe_layers


class AdamW(UncompiledAdamMethods, torch.optim.AdamW):
    """torch's AdamW without imports of torch's compiler."""

    moments = ("exp_avg", "exp_avg_sq")
    """Keys of the state of a parameter that have its shape. Checkpoints store them and the
    number of steps, under `step`, which must be all that the optimizer keeps."""


class ClippedAdamW(AdamW):
    """AdamW that clips gradients, and skips a step whose gradients are not finite.

    DeepSpeed's own optimizers do the same and report both under these names. In fp32 without ZeRO,
    DeepSpeed uses torch's optimizer directly.

    Args:
        max_norm: maximum gradient norm; 0: no clipping.
    """

    overflow = False
    """Whether the last step was skipped"""
    _global_grad_norm: Tensor | None = None
    """Gradient norm of the last step before clipping, which DeepSpeed's engine reads"""

    def __init__(self, *args: Any, max_norm: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_norm = max_norm

    def step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.overflow = not norm.isfinite()
        if self.overflow:
            return
        if self.max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        super().step()


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, zero_stage: int
) -> torch.optim.Optimizer:
    """Build the optimizer that is passed to `deepspeed.initialize`.

    Args:
        model: the model after its MoE layers were wrapped for DeepSpeed, because the
            parameter groups depend on which parameters are sharded.
    """
    register_optimizer_with_zero()
    optimizer_class = AdamW
    if zero_stage == 0 and config.precision == "fp32":
        optimizer_class = partial(ClippedAdamW, max_norm=config.clip_grad)
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:
        if "lr_scale" in group:
            get_logger().info(
                "optimizer group: %s: %d tensors", group["name"], len(group["params"])
            )
    return optimizer_class(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def register_optimizer_with_zero() -> None:
    """Make ZeRO accept our optimizer class.

    ZeRO imports Muon when it is built; importing it here first shortens the start.
    """
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    import_muon_uncompiled()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into named groups: matrices, vectors, gates, and experts.

    Only matrices have weight decay: norms, biases, embeddings and gate parameters have
    none. Gate parameters have groups of their own because they are fp32 where the
    others are bf16, and ZeRO flattens each group into one buffer of one dtype. Sharded
    experts have one group per expert-parallel group, as DeepSpeed requires.

    Returns:
        Groups as torch's optimizers take them. `lr_scale` is a factor of the learning rate
        where a gate has set one.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    expert_vectors = _stacked_vectors(model)
    gates = _gate_groups(model)
    options: dict[str, dict[str, float]] = {"matrices": {"weight_decay": weight_decay}}
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in gates:
            name, group_options = gates[id(p)]
            options[name] = group_options
        elif p.dim() < 2 or id(p) in embeddings or id(p) in expert_vectors:
            name = "vectors"
        else:
            name = "matrices"
        members.setdefault(name, []).append(p)
    groups = [
        {"name": name, "params": params, "weight_decay": 0.0, **options.get(name, {})}
        for name, params in members.items()
        if params
    ]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]


def _gate_groups(model: nn.Module) -> dict[int, tuple[str, dict[str, float]]]:
    """Return name and options of the group of each gate parameter, by the parameter's id.

    Raises:
        ValueError: a gate puts a parameter of another module, or one twice, into its groups.
    """
    found = {}
    for layer in find_moe_layers(model):
        gate = layer.gate
        own = {id(p) for p in gate.parameters()}
        found |= dict.fromkeys(own, ("gates", {}))
        for group in gate.parameter_groups():
            values = {"lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
            name = f"gates, lr x{group.lr_scale:g}, weight decay {group.weight_decay:g}"
            for p in group.params:
                if id(p) not in own:
                    raise ValueError(
                        f"parameter_groups of gate {gate.name!r} has a parameter twice, or one "
                        "that is not the gate's; allowed: each of gate.parameters() once"
                    )
                own.remove(id(p))
                found[id(p)] = (name, values)
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, multiplied by their `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _stacked_vectors(model: nn.Module) -> set[int]:
    """Return the ids of expert parameters that are stacks of vectors: the experts' biases."""
    vectors = set()
    for layer in find_moe_layers(model):
        if isinstance(layer.experts, ExpertType):
            vectors |= {id(p) for p in layer.experts.parameters() if p.dim() < 3}
    return vectors
