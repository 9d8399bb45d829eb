"""A folder of a Hugging Face model: config.json and the tensors of its safetensors files.

Only headers are read when it is opened, and everything that can be wrong with files is found then:
a missing or truncated file, an index that does not fit the files, weights that are pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.config.fields import require, shortened
from megatron.interop.hf.family import Family
from megatron.interop.hf.file_tensor import FileTensor, SourceTensor, read_file_tensors
from megatron.interop.hf.fp8 import dequantize_fp8, refuse_unscaled
from megatron.interop.hf.mxfp4 import dequantize_mxfp4
from megatron.interop.hf.registry import family_of
from megatron.io.untrusted import read_json_file

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = f"{SINGLE_FILE}.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


Dequantizer = Callable[[dict[str, FileTensor], Mapping[str, Any]], dict[str, SourceTensor]]
"""Turns the tensors of a quantised source into those that a family maps, in the same order, by
the value of quantization_config

Raises ValueError for a scale without its tensor and other inconsistencies."""

DEQUANTIZERS: dict[str, Dequantizer] = {"fp8": dequantize_fp8, "mxfp4": dequantize_mxfp4}
"""Dequantizers by quant_method"""


class HFSource:
    """A folder of a Hugging Face model, with its family and its tensors in the order of its files.

    Raises:
        ValueError: config.json or a file of weights is missing, malformed, or of an unknown
            family, or the weights are pickled.
        OSError: A file cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config_json(self.folder)
        """Content of config.json"""
        self.family: Family = family_of(self.config)
        self.files: list[str] = []
        """Names of the files of weights, in order"""
        self.index_metadata: dict[str, Any] | None = None
        """"metadata" of the index; None: the weights are in one file without an index"""
        self.stored = self._find_tensors()
        """Tensors as they are in the files, by name"""
        self.tensors: dict[str, SourceTensor] = self._dequantize()
        """Tensors as the family maps them, by name"""

    def _find_tensors(self) -> dict[str, FileTensor]:
        index_path = self.folder / INDEX
        if index_path.is_file():
            return self._read_index(index_path)
        if (self.folder / SINGLE_FILE).is_file():
            self.files = [SINGLE_FILE]
            return read_file_tensors(self.folder / SINGLE_FILE)
        pickled = [path.name for pattern in _PICKLED for path in self.folder.glob(pattern)]
        advice = "Save the model with transformers' save_pretrained, which writes safetensors."
        found = "no weights"
        if pickled:
            found = f"pickled weights, {min(pickled)}, which could run code when loaded"
        require(False, str(self.folder), found, f"{SINGLE_FILE} or {INDEX}", advice)
        return {}

    def _read_index(self, path: Path) -> dict[str, FileTensor]:
        content = _read_object(path)
        weight_map = content.get("weight_map")
        is_map = isinstance(weight_map, dict) and all(
            isinstance(name, str) for name in weight_map.values()
        )
        require(is_map, f"{path}: weight_map", weight_map, "a file by name of tensor")
        metadata = content.get("metadata", {})
        require(isinstance(metadata, dict), f"{path}: metadata", metadata, "an object")
        self.index_metadata = metadata
        self.files = sorted(set(weight_map.values()))
        tensors: dict[str, FileTensor] = {}
        for name in self.files:
            file = self.folder / name
            is_name = "/" not in name and name.endswith(".safetensors")
            require(is_name, f"{path}: weight_map", name, "names of safetensors files")
            if not file.is_file():
                raise ValueError(f"{path} names {name}, which does not exist")
            for tensor, stored in read_file_tensors(file).items():
                _check_indexed(path, tensor, weight_map.get(tensor), name)
                tensors[tensor] = stored
        for tensor, name in weight_map.items():
            if tensor not in tensors:
                raise ValueError(
                    f"{path} names the tensor {shortened(tensor)}, which {name} does not have"
                )
        return tensors

    def _dequantize(self) -> dict[str, SourceTensor]:
        quantization = self.config.get("quantization_config")
        if not quantization:
            refuse_unscaled(self.stored)
            return dict(self.stored)
        what = "config.json: quantization_config"
        require(isinstance(quantization, dict), what, quantization, "an object")
        method = quantization.get("quant_method")
        known = " ".join(sorted(DEQUANTIZERS)) or "none"
        advice = "Dequantise the model with transformers first."
        require(
            isinstance(method, str) and method in DEQUANTIZERS,
            f"{what}: quant_method",
            method,
            known,
            advice,
        )
        return DEQUANTIZERS[method](self.stored, quantization)


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder.

    Raises:
        ValueError: It is missing, or is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}; allowed: the folder of a Hugging Face model"
        )
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json_file(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(content, dict), str(path), content, "a JSON object")
    return content


def _check_indexed(path: Path, tensor: str, expected: str | None, found: str) -> None:
    if expected is None:
        raise ValueError(
            f"{found} has the tensor {shortened(tensor)}, which {path} does not name"
        )
    if expected != found:
        raise ValueError(
            f"{found} has the tensor {shortened(tensor)}, which is in {expected} by {path}"
        )
