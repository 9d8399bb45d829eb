"""The optimizer and its parameter groups."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn

from megatron.moe.metrics import moe_layers


class AdamW(torch.optim.AdamW):
    """torch's AdamW for programs that compile nothing.

    torch keeps these methods out of compiled code, for which the first call imports the compiler: 1 to 2 s of the start
    of a run. Here they are what is inside, with the same results.
    """

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(method)
        for method in (
            torch.optim.Optimizer.add_param_group,
            torch.optim.Optimizer.zero_grad,
            torch.optim.Optimizer.state_dict,
            torch.optim.Optimizer.load_state_dict,
        )
    )
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class CheckedAdamW(AdamW):
    """Skips a step whose gradients are not finite, and says so in `overflow`, as DeepSpeed's own optimizers do.

    In fp32 without ZeRO, DeepSpeed uses the optimizer as it is, and looks at no gradient.
    """

    overflow = False

    def step(self) -> None:
        gradients = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        self.overflow = not nn.utils.get_total_norm(gradients, float("inf")).isfinite()
        if not self.overflow:
            super().step()


def register_optimizer_with_zero() -> None:
    """Let DeepSpeed's ZeRO take our optimizer, and import its Muon, which it does whatever the optimizer is, without
    torch.compile on its functions: the compiler takes another second to import, and no run uses Muon."""
    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    compile_, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named optimizer groups: matrices with weight decay, the rest without, gates apart, experts per expert group.

    Norms, biases, embeddings and everything in a gate have no weight decay. Gates are a group of their own because
    their parameters are fp32 while the others are bf16: ZeRO flattens a group into one buffer of one dtype.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    gates = {id(p) for layer in moe_layers(model) for p in layer.gate.parameters()}
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        plain = p.dim() < 2 or id(p) in embeddings
        members["gates" if id(p) in gates else "vectors" if plain else "matrices"].append(p)
    groups = [
        {
            "name": name,
            "params": params,
            "weight_decay": weight_decay if name == "matrices" else 0.0,
        }
        for name, params in members.items()
        if params
    ]
    return [
        g for g in split_params_into_different_moe_groups_for_optimizer(groups) if g["params"]
    ]
