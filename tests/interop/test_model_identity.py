"""Identities of weights: equal for copies, different after any change."""

from __future__ import annotations

import shutil

import pytest

from helpers.hf_folders import save_model
from megatron.interop.model_identity import checkpoint_identity, hf_identity


def test_checkpoint_identity_is_that_of_copies(finished, tmp_path):
    first = finished / "checkpoints/iter_0000010"
    last = finished / "checkpoints/iter_0000020"
    paths = [path for path in (first, last) if path.is_dir()]
    shutil.copytree(last, tmp_path / "copy")
    assert checkpoint_identity(tmp_path / "copy") == checkpoint_identity(last)
    assert checkpoint_identity(last).startswith("checkpoint:")
    assert len({checkpoint_identity(path) for path in paths}) == len(paths)
    (tmp_path / "copy/manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json is missing"):
        checkpoint_identity(tmp_path / "copy")


def test_hf_identity_changes_with_weights(tmp_path):
    folder = save_model(tmp_path / "mixtral", "mixtral")
    identity = hf_identity(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert hf_identity(tmp_path / "copy") == identity and identity.startswith("hf:")
    weights = next((tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hf_identity(tmp_path / "copy") != identity
