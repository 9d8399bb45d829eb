"""Random models of the real transformers classes, and the folders they are saved to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.hf_variants import FAMILIES, VOCAB
from megatron.interop.hf.registry import all_families

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HFCase:
    """One configuration of a family."""

    model_type: str
    variant: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.variant}"

    @property
    def config(self) -> dict[str, Any]:
        """Keys of the configuration that differ from the class's defaults."""
        family = FAMILIES[self.model_type]
        return {**family.base, **family.variants.get(self.variant, {})}

    @property
    def has_experts(self) -> bool:
        """Whether the model has MoE layers."""
        return any("experts" in key for key in self.config)


def families_under_test() -> list[str]:
    """Return the families that have a converter and configurations to test it."""
    return [name for name in FAMILIES if name in all_families()]


def cases(*model_types: str) -> list[HFCase]:
    """Return all configurations of some families, or of all."""
    return [
        HFCase(model_type, variant)
        for model_type in model_types or families_under_test()
        for variant in ("base", *FAMILIES[model_type].variants)
    ]


@cache
def hf_model(case: HFCase) -> nn.Module:
    """Build a family's model in fp32 with random weights, once per process.

    Tests must not change it.
    """
    return new_hf_model(case.model_type, **case.config)


def new_hf_model(model_type: str, **config: Any) -> nn.Module:
    """Build a model of a family; no tensor keeps its default value."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    hf_config = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    randomize(model, seed=0)
    return model.eval()


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all parameters and stored buffers of a model.

    Weights have a standard deviation that keeps activations near 1. Norms are near 1, and
    biases are small enough not to decide everything.
    """
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    unique = {id(tensor): (name, tensor) for name, tensor in stored.items()}
    with torch.no_grad():
        for name, tensor in unique.values():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif "bias" in name or "sinks" in name:
                tensor.copy_(0.3 * noise)
            elif "embed" in name or "gate.weight" in name:
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(1.5 * tensor.shape[-1] ** -0.5 * noise)


def tokens(rows: int = 2, length: int = 20) -> Tensor:
    """Return random token ids, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def save_hf(
    model: nn.Module,
    folder: Path,
    *,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
) -> Path:
    """Save a model as transformers does.

    Args:
        fused: store experts as transformers holds them in memory, instead of as the family
            was released.
        dtype: dtype of the stored tensors, except those that transformers keeps in fp32.
        shard_size: largest size of a file.
    """
    if dtype != torch.float32:
        model = _converted(model, dtype)
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=shard_size)
    return folder


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in another dtype, in which correction biases stay fp32."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in copy.state_dict(keep_vars=True).items():
        if not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
    copy.config.dtype = dtype
    return copy


def load_hf(folder: Path) -> nn.Module:
    """Load a folder with transformers in fp32, and check that all tensors fit."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each safetensors file of a folder, by file and name."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def tensor_order(path: Path) -> list[str]:
    """Return the names of a file's tensors in the order of their bytes."""
    with safe_open(path, "pt") as file:
        return list(file.offset_keys())


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a folder's single safetensors file after a change of its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


def logits_of(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return a transformers model's logits [B, S, V]."""
    with torch.no_grad():
        return model(tokens_BS).logits


def gradients_of(model: nn.Module, tokens_BS: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of the mean next-token cross-entropy of each parameter."""
    model.zero_grad()
    logits_BSV = model(tokens_BS).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        yield name, torch.zeros_like(parameter) if gradient is None else gradient
    model.zero_grad()


def gradients_as_weights(case: HFCase, tokens_BS: Tensor) -> nn.Module:
    """Return a model whose weights are the gradients of a case's model.

    Saved and converted like weights, they can be compared by our names.
    """
    model = hf_model(case)
    gradients = dict(gradients_of(model, tokens_BS))
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(gradients[name])
    return copy
