"""Routing trace files: safetensors with a header that says what was recorded.

Metadata of the header, all strings:

    format    "moe-megatron routing trace"
    version   "1"
    model     identity of the weights, or ""
    layers    JSON: [{"gate", "num_experts", "num_zero_computation"}] of each MoE layer
    form      "fixed" or "ragged"

Tensors, of which those in brackets are optional:

    experts         form "fixed": choices [T, L, K], when all positions have K experts everywhere
    [weights]       form "fixed": fp32 [T, L, K]
    experts.3       form "ragged", of MoE layer 3: choices [A]
    offsets.3       form "ragged": position t has the assignments [offsets[t], offsets[t + 1])
    [weights.3]     form "ragged": fp32 [A]
    [token_ids]     input token of each position [T]
    [documents]     first position of each document [N]
    [text_bytes]    text of all positions, UTF-8
    [text_offsets]  position t has the bytes [text_offsets[t], text_offsets[t + 1])

Integers have the narrowest of the dtypes uint8, int16, int32 and int64 that holds the largest
value which the header allows. Choices are routed experts, then zero-computation experts.

Shape suffixes are those of `megatron.moe.routing_trace`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.fields import require
from megatron.io.atomic_write import atomic_path
from megatron.io.safetensors_writer import (
    TORCH_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    read_header,
    read_metadata,
)
from megatron.io.untrusted import open_regular, parse_json
from megatron.moe.routing_trace import LayerTrace, RoutingTrace, offsets_of_counts

TRACE_FORMAT = "moe-megatron routing trace"
_VERSION = 1
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
_LAYER_KEYS = {"gate": str, "num_experts": int, "num_zero_computation": int}
_RECORD_AGAIN = "The file is damaged, or another program wrote it: record the trace again."


def write_routing_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Write a trace file atomically.

    Raises:
        OSError: it cannot be written; nothing is left under its name.
    """
    tensors = _tensors_of(trace)
    metadata = {
        "format": TRACE_FORMAT,
        "version": str(_VERSION),
        "model": trace.model,
        "layers": json.dumps([_description(layer) for layer in trace.layers]),
        "form": _form(trace),
    }
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with atomic_path(path) as temporary, SafetensorsWriter(temporary, specs, metadata) as file:
        for spec in file.specs:
            file.write(tensors[spec.name])
        file.finish()


def read_routing_trace(path: str | Path) -> RoutingTrace:
    """Read a trace file and check all that is in it.

    Raises:
        ValueError: it is not a trace file, is damaged, or was written by a newer version; the
            message names it.
        OSError: it cannot be read.
    """
    metadata = read_metadata(path)
    _check_metadata(path, metadata)
    described = _layer_descriptions(path, metadata["layers"])
    tensors = _read_tensors(path)
    has_weights = "weights" in tensors or "weights.0" in tensors
    if metadata["form"] == "fixed":
        layers = _fixed_layers(path, tensors, described)
    else:
        layers = _ragged_layers(path, tensors, described, has_weights)
    num_positions = len(layers[0].token_offsets_T1) - 1
    token_ids_T = None
    if "token_ids" in tensors:
        token_ids_T = _integers(path, tensors, "token_ids", 1)
    starts_N = None
    if "documents" in tensors:
        starts_N = _integers(path, tensors, "documents", 1)
    texts = None
    if "text_offsets" in tensors:
        texts = _texts(path, tensors, num_positions)
    require(not tensors, f"a tensor of {path}", sorted(tensors)[:1], "those of a routing trace")
    try:
        return RoutingTrace(layers, metadata["model"], token_ids_T, starts_N, texts)
    except ValueError as error:
        message = str(error).replace("a routing trace", f"the routing trace {path}")
        raise ValueError(message) from None


def _form(trace: RoutingTrace) -> str:
    if trace.constant_k:
        return "fixed"
    return "ragged"


def _tensors_of(trace: RoutingTrace) -> dict[str, Tensor]:
    tensors = {}
    if trace.constant_k:
        tensors |= _fixed_tensors(trace)
    else:
        for number, layer in enumerate(trace.layers):
            tensors[f"experts.{number}"] = _narrow(layer.expert_A, layer.num_choices - 1)
            offsets_T1 = layer.token_offsets_T1
            tensors[f"offsets.{number}"] = _narrow(offsets_T1, int(offsets_T1[-1]))
            if trace.has_weights:
                tensors[f"weights.{number}"] = layer.weight_A
    if trace.token_ids_T is not None:
        largest = int(trace.token_ids_T.max()) if len(trace.token_ids_T) else 0
        tensors["token_ids"] = _narrow(trace.token_ids_T, largest)
    if trace.document_starts_N is not None:
        tensors["documents"] = _narrow(trace.document_starts_N, trace.num_positions)
    if trace.texts is not None:
        encoded = [text.encode("utf-8", errors="replace") for text in trace.texts]
        content = bytearray(b"".join(encoded))
        tensors["text_bytes"] = torch.frombuffer(content or bytearray(1), dtype=torch.uint8)
        tensors["text_bytes"] = tensors["text_bytes"][: len(content)]
        lengths_T = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
        tensors["text_offsets"] = _narrow(offsets_of_counts(lengths_T), len(content))
    return tensors


def _fixed_tensors(trace: RoutingTrace) -> dict[str, Tensor]:
    k = trace.constant_k
    largest = max(layer.num_choices for layer in trace.layers) - 1
    experts = [layer.expert_A.view(-1, k) for layer in trace.layers]
    tensors = {"experts": _narrow(torch.stack(experts, dim=1), largest)}
    if trace.has_weights:
        weights = [layer.weight_A.view(-1, k) for layer in trace.layers]
        tensors["weights"] = torch.stack(weights, dim=1)
    return tensors


def _narrow(values: Tensor, largest: int) -> Tensor:
    """Return integers in the narrowest dtype that holds `largest`."""
    fitting = [dtype for dtype in _INTEGERS if largest <= torch.iinfo(dtype).max]
    return values.to(fitting[0])


def _check_metadata(path: str | Path, metadata: dict[str, str]) -> None:
    require(
        metadata.get("format") == TRACE_FORMAT,
        f"the format of {path}",
        metadata.get("format", "not given"),
        f"{TRACE_FORMAT!r}, which its header names",
        "Name a file that --trace wrote.",
    )
    version = metadata.get("version", "")
    is_number = version.isascii() and version.isdecimal() and len(version) < 10
    require(
        is_number and 1 <= int(version) <= _VERSION,
        f"the version of the routing trace {path}",
        version,
        f"1 to {_VERSION}",
        "A newer version of this program wrote it: update this one.",
    )
    require(
        "model" in metadata and "layers" in metadata,
        f"the metadata of the routing trace {path}",
        sorted(metadata),
        "format, version, model, layers and form",
        _RECORD_AGAIN,
    )
    form = metadata.get("form", "")
    require(
        form in ("fixed", "ragged"),
        f"the form of the routing trace {path}",
        form,
        "fixed or ragged",
        _RECORD_AGAIN,
    )


def _layer_descriptions(path: str | Path, text: str) -> list[dict[str, Any]]:
    """Parse and check the metadata `layers`."""
    try:
        layers = parse_json(text)
    except ValueError:
        layers = None
    is_valid = isinstance(layers, list) and len(layers) > 0
    is_valid = is_valid and all(_is_description(layer) for layer in layers)
    require(
        is_valid,
        f"the layers of the routing trace {path}",
        text,
        "a JSON list of objects with gate (a string), num_experts (1 or more) and "
        "num_zero_computation (0 or more)",
        _RECORD_AGAIN,
    )
    return layers


def _description(layer: LayerTrace) -> dict[str, Any]:
    return {key: getattr(layer, key) for key in _LAYER_KEYS}


def _is_description(layer: Any) -> bool:
    """Return whether a JSON value describes a layer, with numbers that tensors can hold."""
    if not isinstance(layer, dict) or set(layer) != set(_LAYER_KEYS):
        return False
    if not all(type(layer[key]) is kind for key, kind in _LAYER_KEYS.items()):
        return False
    return 1 <= layer["num_experts"] < 2**40 and 0 <= layer["num_zero_computation"] < 2**40


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file."""
    header, data_start = read_header(path, TORCH_DTYPES)
    with open_regular(path) as file:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        size = os.fstat(file.fileno()).st_size
        require(
            size == data_start + end,
            f"the size of the routing trace {path}",
            size,
            f"{data_start + end} bytes, as its header says",
            "The file is truncated or damaged: record the trace again.",
        )
        file.seek(data_start)
        data = bytearray(file.read(end))
    tensors = {}
    for name, entry in header.items():
        dtype = TORCH_DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        # A copy of the bytes: the parts of a file need not be aligned to their dtypes.
        content = torch.frombuffer(data[start:end] or bytearray(8), dtype=torch.uint8)
        tensors[name] = content[: end - start].view(dtype).view(entry["shape"])
    return tensors


def _take(path: str | Path, tensors: dict[str, Tensor], name: str, dimensions: int) -> Tensor:
    """Remove a tensor with so many dimensions from the dict and return it."""
    shape = "missing"
    if name in tensors:
        shape = list(tensors[name].shape)
    require(
        name in tensors and tensors[name].dim() == dimensions,
        f"tensor {name} of the routing trace {path}",
        shape,
        f"a tensor of {dimensions} dimensions",
        _RECORD_AGAIN,
    )
    return tensors.pop(name)


def _integers(
    path: str | Path, tensors: dict[str, Tensor], name: str, dimensions: int
) -> Tensor:
    """Take a tensor as int64."""
    values = _take(path, tensors, name, dimensions)
    require(
        values.dtype in _INTEGERS,
        f"the dtype of tensor {name} of the routing trace {path}",
        values.dtype,
        "an integer dtype",
        _RECORD_AGAIN,
    )
    return values.long()


def _weights(
    path: str | Path, tensors: dict[str, Tensor], name: str, experts: Tensor
) -> Tensor:
    """Take the weights of some choices."""
    values = _take(path, tensors, name, experts.dim())
    require(
        values.dtype == torch.float32 and values.shape == experts.shape,
        f"tensor {name} of the routing trace {path}",
        f"{values.dtype} {list(values.shape)}",
        f"{torch.float32} {list(experts.shape)}, the shape of the experts",
        _RECORD_AGAIN,
    )
    return values


def _fixed_layers(
    path: str | Path, tensors: dict[str, Tensor], described: list[dict[str, Any]]
) -> tuple[LayerTrace, ...]:
    expert_TLK = _integers(path, tensors, "experts", 3)
    num_positions, num_layers, k = expert_TLK.shape
    require(
        num_layers == len(described) and num_positions > 0 and k > 0,
        f"the shape of the experts of the routing trace {path}",
        list(expert_TLK.shape),
        f"[positions, {len(described)} layers, k], each 1 or more",
        _RECORD_AGAIN,
    )
    weight_TLK = None
    if "weights" in tensors:
        weight_TLK = _weights(path, tensors, "weights", expert_TLK)
    layers = []
    for number, description in enumerate(described):
        weight_A = None
        if weight_TLK is not None:
            weight_A = weight_TLK[:, number].flatten()
        layer = LayerTrace(
            **description,
            token_offsets_T1=torch.arange(num_positions + 1) * k,
            expert_A=expert_TLK[:, number].flatten(),
            weight_A=weight_A,
        )
        layers.append(layer)
    return tuple(layers)


def _ragged_layers(
    path: str | Path,
    tensors: dict[str, Tensor],
    described: list[dict[str, Any]],
    has_weights: bool,
) -> tuple[LayerTrace, ...]:
    layers = []
    for number, description in enumerate(described):
        expert_A = _integers(path, tensors, f"experts.{number}", 1)
        offsets_T1 = _integers(path, tensors, f"offsets.{number}", 1)
        require(
            len(offsets_T1) > 0,
            f"tensor offsets.{number} of the routing trace {path}",
            "empty",
            "1 number or more",
            _RECORD_AGAIN,
        )
        weight_A = None
        if has_weights:
            weight_A = _weights(path, tensors, f"weights.{number}", expert_A)
        layer = LayerTrace(
            **description,
            token_offsets_T1=offsets_T1,
            expert_A=expert_A,
            weight_A=weight_A,
        )
        layers.append(layer)
    return tuple(layers)


def _texts(path: str | Path, tensors: dict[str, Tensor], num_positions: int) -> tuple[str, ...]:
    content = _integers(path, tensors, "text_bytes", 1).to(torch.uint8).numpy().tobytes()
    offsets = _integers(path, tensors, "text_offsets", 1).tolist()
    is_valid = len(offsets) == num_positions + 1 and offsets[0] == 0
    require(
        is_valid and offsets == sorted(offsets) and offsets[-1] == len(content),
        f"tensor text_offsets of the routing trace {path}",
        f"{len(offsets)} numbers",
        f"{num_positions + 1} ascending numbers from 0 to the {len(content)} bytes of the text",
        _RECORD_AGAIN,
    )
    parts = [content[start:end] for start, end in zip(offsets, offsets[1:])]
    # Damaged bytes are shown as U+FFFD: the text is there to be looked at.
    return tuple(part.decode("utf-8", errors="replace") for part in parts)
