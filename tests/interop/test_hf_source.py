"""Folders of Hugging Face models: what may be wrong with their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.interop.hf.source import DEQUANTIZERS, HFSource, read_file_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def folder(path: Path, config=None, sharded: bool = False) -> Path:
    """Write a folder whose config.json names a family and whose tensors are any."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if not sharded:
        save_file(TENSORS, path / "model.safetensors")
        return path
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, path / f"model-{name}.safetensors")
    write_index(path, {"a": "model-a.safetensors", "b": "model-b.safetensors"})
    return path


def write_index(path: Path, weight_map, **content) -> None:
    text = json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map, **content})
    (path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_read_by_ranges(tmp_path, sharded):
    source = HFSource(folder(tmp_path / "hf", sharded=sharded))
    assert source.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = source.tensors[name]
        assert found.shape == tuple(tensor.shape) and found.dtype == tensor.dtype
        for start in range(tensor.numel()):
            assert torch.equal(
                found.read(start, 2 * (start < 3)), tensor.view(-1)[start:][: 2 * (start < 3)]
            )


def test_links_are_followed(tmp_path):
    """The cache of the hub stores files elsewhere; further files do not matter."""
    stored = folder(tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in stored.iterdir():
        (linked / path.name).symlink_to(path)
    (linked / ".gitattributes").write_text("x")
    (linked / "original.pth").write_bytes(b"x")
    assert HFSource(linked).tensors.keys() == TENSORS.keys()


def lost_file(path):
    (path / "model-b.safetensors").unlink()


def lost_tensor(path):
    write_index(path, {name: f"model-{name[0]}.safetensors" for name in ("a", "b", "a2")})


def unlisted_tensor(path):
    save_file({"a": TENSORS["a"], "c": TENSORS["b"]}, path / "model-a.safetensors")


def moved_tensor(path):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, path / "model-a.safetensors")


def path_in_index(path):
    write_index(path, {"a": "../model-a.safetensors"})


def no_weight_map(path):
    write_index(path, ["a"])


def wrong_metadata(path):
    write_index(path, {"a": "model-a.safetensors"}, metadata=[1])


def truncated(path):
    file = path / "model-a.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def too_long(path):
    with open(path / "model-a.safetensors", "ab") as file:
        file.write(b"xx")


def not_json(path):
    (path / "config.json").write_text("{")


def not_an_object(path):
    (path / "config.json").write_text("[1]")


def no_config(path):
    (path / "config.json").unlink()


def no_family(path):
    (path / "config.json").write_text("{}")


def unknown_family(path):
    (path / "config.json").write_text('{"model_type": "gpt5"}')


def list_as_family(path):
    (path / "config.json").write_text('{"model_type": ["llama"]}')


def unknown_quantization(path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (path / "config.json").write_text(json.dumps(config))


def wrong_quantization(path):
    config = {"model_type": "llama", "quantization_config": 8}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lost_file, "model-b.safetensors, which does not exist"),
        (lost_tensor, "'a2', which model-a.safetensors does not have"),
        (unlisted_tensor, "has the tensor 'c', which .* does not name"),
        (moved_tensor, "has the tensor 'b', which is in model-b.safetensors"),
        (path_in_index, "weight_map is '../model-a.safetensors'"),
        (no_weight_map, "weight_map is .*allowed: a file by name"),
        (wrong_metadata, "metadata is .*allowed: an object"),
        (truncated, "size of .*model-a.safetensors is .*truncated"),
        (too_long, "size of .*model-a.safetensors is"),
        (not_json, "config.json is not JSON"),
        (not_an_object, r"config.json is \[1\]; allowed: a JSON object"),
        (no_config, "has no config.json"),
        (no_family, "allowed: an object with the key model_type"),
        (unknown_family, "model_type is 'gpt5'; allowed: .*llama.* mixtral"),
        (list_as_family, r"model_type is \['llama'\]; allowed"),
        (unknown_quantization, "quant_method is 'awq'; allowed"),
        (wrong_quantization, "quantization_config is 8; allowed: an object"),
    ],
)
def test_bad_folders_are_refused(tmp_path, change, message):
    path = folder(tmp_path / "hf", sharded=True)
    change(path)
    with pytest.raises(ValueError, match=message):
        HFSource(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "pickled weights, pytorch_model.bin"), ("x.txt", "no weights")],
)
def test_other_weights_are_refused(tmp_path, name, message):
    path = folder(tmp_path / "hf")
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(ValueError, match=f"{message}.*allowed: model.safetensors"):
        HFSource(path)


def test_shortened_file_is_named(tmp_path):
    """A file that is cut after it was opened is noticed when it is read."""
    path = folder(tmp_path / "hf") / "model.safetensors"
    tensors = read_file_tensors(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(OSError, match="has become shorter"):
        tensors["a"].read(0, 6)


def test_quantised_tensors_are_replaced(tmp_path, monkeypatch):
    """A dequantizer gets the stored tensors and the description of their format."""
    seen = []

    def dequantize(tensors, quantization):
        seen.append(quantization["quant_method"])
        return {"a": tensors["a"]}

    monkeypatch.setitem(DEQUANTIZERS, "test", dequantize)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "test"}}
    source = HFSource(folder(tmp_path / "hf", config))
    assert list(source.tensors) == ["a"] and seen == ["test"]
    assert sorted(source.stored) == ["a", "b"]
