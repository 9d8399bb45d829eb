"""What conversion refuses, for every family: one error that names the cause, nothing written."""

from __future__ import annotations

import os
import shutil

import pytest

from helpers.hf_models import HFCase, edit_config, edit_tensors, families_under_test
from helpers.hf_variants import FAMILIES
from megatron.interop.hf.convert import convert_from_hf

pytest.importorskip("transformers", reason="the reference implementations are not installed")

every_family = pytest.mark.parametrize("model_type", families_under_test())


@pytest.fixture
def folder(hf_folder, tmp_path):
    """Return a function that copies the folder of a family, so that a test can change it."""

    def copy(model_type):
        target = tmp_path / "hf"
        shutil.copytree(hf_folder(HFCase(model_type, "base")), target)
        return target

    return copy


def assert_refused(folder, name):
    """Check that conversion fails with a message of one line that contains `name`."""
    output = folder.parent / "ours"
    with pytest.raises((ValueError, OSError)) as error:
        convert_from_hf(folder, output)
    message = str(error.value)
    assert name in message
    assert "\n" not in message
    assert not output.exists()


def chosen_tensors(tensors):
    """Return the first and the last tensor, and one in between, in alphabetical order."""
    names = sorted(tensors)
    return names[0], names[len(names) // 2], names[-1]


@pytest.mark.parametrize("which", [0, 1, 2])
@every_family
def test_lost_tensor_is_named(model_type, which, folder):
    source = folder(model_type)
    lost = []

    def lose(tensors):
        lost.append(chosen_tensors(tensors)[which])
        del tensors[lost[0]]

    edit_tensors(source, lose)
    assert_refused(source, lost[0])


@every_family
def test_extra_tensor_is_named(model_type, folder):
    """Such as one more expert, or a bias that the family has not."""
    source = folder(model_type)
    extra = []

    def add(tensors):
        names = [name for name in tensors if "down_proj" in name or "w2" in name]
        old = sorted(names)[-1]
        extra.append(old.replace("down_proj", "side_proj").replace(".w2.", ".w9."))
        tensors[extra[0]] = tensors[old].clone()

    edit_tensors(source, add)
    assert_refused(source, extra[0])


@every_family
def test_misshapen_tensor_is_named(model_type, folder):
    source = folder(model_type)
    changed = []

    def transpose(tensors):
        changed.append(sorted(n for n in tensors if "v_proj" in n or "kv_b_proj" in n)[-1])
        tensor = tensors[changed[0]]
        tensors[changed[0]] = tensor.reshape(
            tensor.shape[::-1] if tensor.dim() > 1 else (1, -1)
        )

    edit_tensors(source, transpose)
    assert_refused(source, changed[0])


@every_family
def test_truncated_file_is_named(model_type, folder):
    source = folder(model_type)
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    assert_refused(source, "model.safetensors")


@every_family
def test_unknown_key_is_named(model_type, folder):
    source = folder(model_type)
    edit_config(source, attention_that_nobody_has=3)
    assert_refused(source, "attention_that_nobody_has")


@pytest.mark.parametrize(
    "model_type, changes, name",
    [
        (model_type, changes, name)
        for model_type in families_under_test()
        for changes, name in FAMILIES[model_type].refused
    ],
)
def test_bad_value_is_named(model_type, changes, name, folder):
    source = folder(model_type)
    edit_config(source, **changes)
    assert_refused(source, name)
