"""Every family against its class in transformers: values, gradients and files.

The models have random weights and tiny sizes. transformers' code is the one that runs the full
models, and no weights can be downloaded here.
"""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch

from helpers.hf_conversion import (
    export_hf,
    import_model,
    our_gradients,
    our_logits,
    read_tensor,
    save_ours,
)
from helpers.hf_models import (
    HFCase,
    cases,
    edit_tensors,
    families_under_test,
    gradients_as_weights,
    hf_model,
    load_hf,
    logits_of,
    new_hf_model,
    read_tensors,
    save_hf,
    tensor_order,
    tokens,
)
from helpers.hf_variants import FAMILIES
from megatron.interop.hf.convert import convert_from_hf, open_hf_model

pytest.importorskip("transformers", reason="the reference implementations are not installed")

LARGEST_DIFFERENCE = 1e-4
every_case = pytest.mark.parametrize("case", cases(), ids=str)
every_moe_case = pytest.mark.parametrize(
    "case", [case for case in cases() if case.has_experts], ids=str
)


@every_case
def test_logits_equal_transformers(case, imported):
    theirs_BSV = logits_of(hf_model(case), tokens())
    ours_BSV = our_logits(imported(case).model, tokens())
    assert theirs_BSV.std() > 1, "logits near 0 show no difference"
    assert (ours_BSV - theirs_BSV).abs().max() <= LARGEST_DIFFERENCE


@every_case
def test_gradients_equal_transformers(case, imported, tmp_path):
    """Their gradients are saved and converted as if they were weights."""
    folder = save_hf(gradients_as_weights(case, tokens()), tmp_path / "gradients")
    theirs = open_hf_model(folder).weights
    ours = our_gradients(imported(case).model, tokens())
    for name, gradient in ours.items():
        expected = read_tensor(theirs, name)
        largest = expected.abs().max()
        assert largest > 0, name
        assert (gradient - expected).abs().max() <= 1e-4 * largest, name


@every_moe_case
def test_fused_experts_are_the_same(case, imported, tmp_path):
    """The layout of experts on disk does not matter, nor the number of files."""
    folder = save_hf(hf_model(case), tmp_path / "fused", fused=True, shard_size="30KB")
    assert len(read_tensors(folder)) > 1
    fused = import_model(folder)
    assert fused.source.config == imported(case).source.config
    expected = imported(case).model.state_dict()
    for name, tensor in fused.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@every_case
def test_export_loads_in_transformers(case, imported, tmp_path):
    """A model of ours with other weights, which does not know the folder it came from."""
    source = imported(case).source
    model = copy.deepcopy(imported(case).model)
    change_weights(model)
    save_ours(source, model.state_dict(), tmp_path / "ours")
    folder = export_hf(tmp_path / "ours", tmp_path / "theirs", family=case.model_type)
    theirs_BSV = logits_of(load_hf(folder), tokens())
    ours_BSV = our_logits(model, tokens())
    assert (ours_BSV - theirs_BSV).abs().max() <= LARGEST_DIFFERENCE
    before_BSV = logits_of(hf_model(case), tokens())
    assert (ours_BSV - before_BSV).abs().max() > 1e-2


@torch.no_grad()
def change_weights(model):
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict(keep_vars=True).items():
        size = 0.02 if "expert_bias" in name else 0.1 / math.sqrt(tensor.shape[-1])
        tensor.add_(size * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(
    "options",
    [{}, {"fused": True, "dtype": torch.bfloat16, "shard_size": "30KB"}],
    ids=["fp32", "bf16-fused-sharded"],
)
@every_case
def test_round_trip_is_bit_identical(case, options, tmp_path):
    """Tensors, their dtypes, order and files, and config.json."""
    folder = save_hf(hf_model(case), tmp_path / "hf", **options)
    convert_from_hf(folder, tmp_path / "ours")
    back = export_hf(tmp_path / "ours", tmp_path / "back")
    expected = read_tensors(folder)
    found = read_tensors(back)
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert tensor_order(back / file) == tensor_order(folder / file)
        for name, tensor in tensors.items():
            assert found[file][name].dtype == tensor.dtype, name
            assert torch.equal(found[file][name], tensor), name
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in back.iterdir()) == names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((back / name).read_text()) == json.loads(
                (folder / name).read_text()
            )


@pytest.mark.parametrize(
    "model_type", [name for name in families_under_test() if FAMILIES[name].kept]
)
def test_kept_tensors_are_written_back(model_type, hf_folder, tmp_path):
    """Layers that predict further tokens are not part of the model, and are not lost."""
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder(HFCase(model_type, "base")), folder)
    names = FAMILIES[model_type].kept

    def add(tensors):
        for name in names:
            tensors[name] = torch.randn(7, 5).bfloat16()

    edit_tensors(folder, add)
    assert convert_from_hf(folder, tmp_path / "ours").kept == list(names)
    found = read_tensors(export_hf(tmp_path / "ours", tmp_path / "back"))
    expected = read_tensors(folder)
    for name in names:
        tensor = found["model.safetensors"][name]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected["model.safetensors"][name])


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "deepseek_v3", "llama"])
def test_stored_rotary_frequencies_are_dropped(model_type, hf_folder, tmp_path):
    """Files that earlier versions of transformers wrote have them; they are computed."""
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder(HFCase(model_type, "base")), folder)
    expected = read_tensors(folder)["model.safetensors"]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert convert_from_hf(folder, tmp_path / "ours").dropped == [name]
    found = read_tensors(export_hf(tmp_path / "ours", tmp_path / "back"))["model.safetensors"]
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    "model_type", [name for name in families_under_test() if FAMILIES[name].has_balance_loss]
)
def test_balance_loss_equals_pooled_loss(model_type, tmp_path):
    """At one layer transformers' loss is k times ours: it divides loads by T, and we by k T.

    With more layers theirs multiplies the means over all layers, ours is a sum over layers.
    """
    config = {**FAMILIES[model_type].base, **FAMILIES[model_type].one_moe_layer}
    theirs = new_hf_model(model_type, **config)
    zero_biases(theirs)
    outputs = theirs(tokens(), output_router_logits=True)
    expected = theirs.config.router_aux_loss_coef * outputs.aux_loss
    ours = import_model(save_hf(theirs, tmp_path / "hf"))
    ours.model.eval()
    aux_loss = ours.model(tokens(), tokens()).aux_loss
    torch.testing.assert_close(aux_loss, expected, rtol=1e-5, atol=0)
    assert aux_loss > 0


@torch.no_grad()
def zero_biases(model):
    """Set selection biases to 0: transformers' loss counts selections without them."""
    for name, tensor in model.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor.zero_()


@pytest.mark.parametrize("case", cases("mixtral"), ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_ranges_are_parts_of_tensors(case, fused, imported, tmp_path):
    """Each rank reads ranges, which start and end anywhere in a matrix or an expert."""
    folder = save_hf(hf_model(case), tmp_path / "hf", fused=fused)
    weights = open_hf_model(folder).weights
    for name, expected in imported(case).model.state_dict().items():
        flat = expected.flatten()
        step = max(1, len(flat) // 3 - 1)
        parts = []
        for start in range(0, len(flat), step):
            parts.append(weights.read(name, start, min(step, len(flat) - start)))
        assert torch.equal(torch.cat(parts), flat), name
