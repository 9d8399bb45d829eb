"""Conversion of a Hugging Face folder to a checkpoint and back, as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_folders import save_model
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.checkpoint.loader import LoadedCheckpoint
from megatron.checkpoint.shards import CheckpointReader
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.run_json import read_run_json
from megatron.interop.hf.convert import convert_from_hf, open_hf_model
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.tokenizer.build import build_tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 3,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A folder that transformers saved, in several files."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "mixtral"
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).save_pretrained(folder, max_shard_size="60KB")
    return folder


def export(checkpoint: Path, output: Path, **options) -> Path:
    convert_to_hf(find_verified_checkpoint(checkpoint), output, ExportOptions(**options))
    return output


def test_round_trip_gives_equal_files(mixtral, tmp_path):
    convert_from_hf(mixtral, tmp_path / "ours")
    back = export(tmp_path / "ours", tmp_path / "back")
    names = sorted(path.name for path in mixtral.iterdir())
    assert sorted(path.name for path in back.iterdir()) == names
    assert len(names) > 5
    for name in names:
        if name.endswith(".safetensors"):
            assert (back / name).read_bytes() == (mixtral / name).read_bytes(), name
        else:
            assert json.loads((back / name).read_text()) == json.loads(
                (mixtral / name).read_text()
            )


def test_ranges_are_those_of_the_checkpoint(mixtral, tmp_path):
    """`HFWeights.read` agrees with a checkpoint reader, across the boundaries of experts."""
    reader = CheckpointReader(convert_from_hf(mixtral, tmp_path / "ours").path)
    weights = open_hf_model(mixtral).weights
    for name in ("layers.1.mlp.experts.w1", "layers.0.self_attn.k_proj.weight"):
        full = reader.read("weight", name)
        for start, length in ((0, 5), (100, 0), (48 * 32 - 3, 7), (17, len(full) - 20)):
            if start + length <= len(full):
                ours = weights.read(name, start, length)
                assert torch.equal(ours, full[start : start + length])


def changed(source: Path, target: Path, change) -> Path:
    """Copy a folder to a single file of weights whose tensors `change` edits in place."""
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def lose(tensors):
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]


def add(tensors):
    tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"] = torch.zeros(48, 32)


def reshape(tensors):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name].t().contiguous()


@pytest.mark.parametrize("change", [lose, add, reshape])
def test_other_tensors_are_refused(mixtral, tmp_path, change):
    folder = changed(mixtral, tmp_path / "hf", change)
    with pytest.raises(ValueError, match=r"experts\.[23]\.w3\.weight"):
        convert_from_hf(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_moved_checkpoint_finds_its_tokenizer(tmp_path):
    """The flags name files next to the checkpoint; text generation takes those inside it."""
    folder = save_model(tmp_path / "hf", "mixtral")
    path = convert_from_hf(folder, tmp_path / "ours").path
    named = Path(read_run_json(path / "run.json").tokenizer.tokenizer_model)
    assert named == tmp_path / "ours/tokenizer/tokenizer.json" and named.is_file()
    (tmp_path / "ours").rename(tmp_path / "moved")
    loaded = LoadedCheckpoint(
        tmp_path / "moved/iter_0000000", CheckpointConfig(load="x", finetune=True), []
    )
    tokenizer = build_tokenizer(loaded.metadata.config.tokenizer)
    assert tokenizer.decode(tokenizer.encode("text")) == "text"


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    """Not even the tokenizer in a directory that existed before."""
    folder = save_model(tmp_path / "hf", "mixtral")
    (tmp_path / "ours").mkdir()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("megatron.interop.hf.convert.write_hf_folder", fail)
    with pytest.raises(OSError, match="no space"):
        convert_from_hf(folder, tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())
