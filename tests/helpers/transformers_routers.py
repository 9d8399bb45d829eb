"""The router classes of the installed transformers: finding, building and calling them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 12
EXPERTS = 8
VOCAB = 30
# Values of the attributes that a configuration has; sizes, and numbers unlike all defaults.
SIZES = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_top_k": 3,
    "top_k_experts": 3,
    "zero_expert_num": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "route_scale": 1.7,
    "router_scaling_factor": 1.7,
    "moe_routed_scaling_factor": 1.7,
    "moe_router_scaling_factor": 1.7,
    "output_multiplier": 0.6,
    "moe_router_logit_softcapping": 0.9,
    "moe_norm_min": 0.7,
    "expert_capacity": 1000,
}
# Families whose routers do not name their configuration class, and the name does not show it.
CONFIGS = {
    "dbrx": "DbrxFFNConfig",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextConfig",
    "inkling2": "Inkling2TextConfig",
}
# Attributes that select a branch of a router: all combinations are compared.
BRANCHES = {
    "norm_topk_prob": (True, False),
    "topk_method": ("group_limited_greedy", "greedy"),
    "expert_selection_fn": ("softmax", "sigmoid"),
    "scoring_func": ("sigmoid", "sqrtsoftplus"),
    "use_expert_bias": (True, False),
    "router_bias": (True, False),
}


def models_folder() -> Path:
    """Return the folder of the model families, without importing transformers."""
    return Path(importlib.util.find_spec("transformers").origin).parent / "models"


def router_classes() -> list[str]:
    """Return "family/Class" of all routers, by the source text.

    A router is a class whose name ends in Router, or one that selects experts itself.
    """
    found = []
    for path in sorted(models_folder().glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^class (\w+)\(.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL
        ):
            selects = re.search(r"topk\(|argmax\(", match[0]) and "expert" in match[0]
            is_full_model = re.search(r"For[A-Z]\w+$", match[1])
            if match[1].endswith("Router") or (selects and not is_full_model):
                found.append(f"{path.parent.name}/{match[1]}")
    return found


def _module(name: str, kind: str) -> ModuleType:
    family = name.split("/")[0]
    return importlib.import_module(f"transformers.models.{family}.{kind}_{family}")


@cache
def _config_class(name: str) -> type:
    """Return the configuration class of a router.

    It is the annotated one, or the one in the family's module whose name the router's begins
    with, or else the first that has experts.
    """
    cls = router_class(name)
    module = _module(name, "configuration")
    parameters = inspect.signature(cls.__init__).parameters
    annotation = parameters["config"].annotation if "config" in parameters else None
    if name.split("/")[0] in CONFIGS:
        return getattr(module, CONFIGS[name.split("/")[0]])
    if isinstance(annotation, type) and annotation.__name__.endswith("Config"):
        return annotation
    if isinstance(annotation, str):
        return getattr(module, annotation)
    with_experts = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and {"num_experts_per_tok", "moe_topk", "moe_k"} & {*dir(value)}
    ]
    stems = {config.__name__.removesuffix("Config"): config for config in with_experts}
    matching = [stem for stem in stems if cls.__name__.startswith(stem)]
    if matching:
        return stems[max(matching, key=len)]
    return with_experts[0]


def router_class(name: str) -> type[nn.Module]:
    """Return a router class by "family/Class"."""
    return getattr(_module(name, "modeling"), name.split("/")[1])


def configurations(name: str) -> list[Any]:
    """Return tiny configurations of a router, one for each combination of its branches."""
    config_class = _config_class(name)
    configs = [config_class()]
    source = inspect.getsource(router_class(name))
    branches = {key: values for key, values in BRANCHES.items() if f".{key}" in source}
    for key, values in branches.items():
        if hasattr(configs[0], key):
            configs = [
                _with(config_class, config, key, v) for config in configs for v in values
            ]
    for config in configs:
        config.allow_global_per_layer_attribute_access = True
        for attribute, value in SIZES.items():
            if hasattr(config, attribute):
                setattr(config, attribute, value)
    return configs


def _with(config_class: type, config: Any, key: str, value: Any) -> Any:
    """Return a copy of a configuration with another value of one attribute."""
    copy = config_class()
    for branch in BRANCHES:
        if hasattr(config, branch):
            setattr(copy, branch, getattr(config, branch))
    setattr(copy, key, value)
    return copy


def build(name: str, config: Any) -> nn.Module:
    """Return a router, or the MoE block of which it is a part, in evaluation mode."""
    if name.startswith("dbrx/"):
        model_config = _module(name, "configuration").DbrxConfig()
        model_config.ffn_config = config
        return router_class("dbrx/DbrxFFN")(model_config).eval()
    cls = router_class(name)
    if name == "jetmoe/JetMoeTopKGating":
        return cls(config.hidden_size, config.num_local_experts, config.num_experts_per_tok)
    return cls(config).float().eval()


def dense_weights(
    name: str, router: nn.Module, x_TD: Tensor, ids_T: Tensor, bias_E: Tensor
) -> Tensor:
    """Run a router; return its weights [T, choices], NaN where a choice is not selected.

    Args:
        bias_E: bias of the MoE block, for routers that receive it as an argument.
    """
    family = name.split("/")[0]
    if family == "dbrx":
        weight_Tk, expert_Tk = router.route_tokens_to_experts(router.router(x_TD[None]))
        return _scattered(weight_Tk, expert_Tk, EXPERTS)
    arguments = {}
    parameters = inspect.signature(router.forward).parameters
    if "input_ids" in parameters:
        arguments["input_ids"] = ids_T
    for argument in ("expert_bias", "e_score_correction_bias"):
        if argument in parameters:
            arguments[argument] = bias_E
    if family in ("afmoe", "switch_transformers"):  # they take [batch, sequence, hidden]
        x_TD = x_TD[None]
    outputs = router(x_TD, **arguments)
    if family == "jetmoe":
        return _of_sorted_rows(outputs, len(x_TD))
    if family == "llama4":
        return outputs[0].masked_fill(outputs[0] == 0, torch.nan)
    if family == "nllb_moe":
        return outputs[1].masked_fill(outputs[1] == 0, torch.nan)
    if family == "switch_transformers":
        return torch.where(outputs[0][0].bool(), outputs[1][0], torch.nan)
    if family == "longcat_flash":
        return _scattered(outputs[1], outputs[2], EXPERTS + SIZES["zero_expert_num"])
    return _scattered(outputs[1], outputs[2], EXPERTS)


def _scattered(weight_Tk: Tensor, expert_Tk: Tensor, num_choices: int) -> Tensor:
    empty_TC = torch.full((len(weight_Tk), num_choices), torch.nan)
    return empty_TC.scatter(1, expert_Tk, weight_Tk)


def _of_sorted_rows(outputs: tuple, num_tokens: int) -> Tensor:
    """Return JetMoE's weights, which it lists by expert."""
    _, token_A, weight_A, expert_size, _ = outputs
    expert_A = torch.arange(EXPERTS).repeat_interleave(torch.tensor(expert_size))
    empty_TE = torch.full((num_tokens, EXPERTS), torch.nan)
    return empty_TE.index_put((token_A, expert_A), weight_A)
