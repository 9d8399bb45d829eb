"""gpt-oss: the released config.json, and experts in MXFP4."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_conversion import export_hf, import_model, our_logits
from helpers.hf_models import edit_config, load_hf, logits_of, new_hf_model, tokens
from helpers.hf_variants import FAMILIES
from megatron.interop.hf.config_map import run_config_of
from megatron.interop.hf.convert import convert_from_hf, open_hf_model
from megatron.interop.hf.file_tensor import read_file_tensors
from megatron.interop.hf.mxfp4 import MXFP4Tensor, dequantize_mxfp4
from megatron.interop.hf.registry import find_family

pytest.importorskip("transformers", reason="the reference implementations are not installed")

RELEASED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
"""Keys and values of gpt-oss-20b's config.json, without quantization_config"""


def test_released_config_is_understood():
    config = run_config_of(find_family("gpt_oss"), RELEASED)
    attention = config.attention
    assert attention.attention_sinks and attention.add_qkv_bias
    assert attention.window_size == 128 and attention.window_layers == (*range(0, 24, 2),)
    rotary = config.rotary
    assert (rotary.rope_scaling, rotary.rope_scaling_factor) == ("yarn", 32.0)
    assert rotary.rope_original_max_positions == 4096 and not rotary.yarn_truncate
    assert config.gate_options["topk"]["topk"] == 4
    assert config.gate_options["topk"]["router_bias"]
    assert config.expert_options["limit"] == 7.0


def test_missing_rope_and_layer_types_have_defaults():
    """As in transformers: YaRN, and windows in every second block from the first one on."""
    explicit = run_config_of(find_family("gpt_oss"), RELEASED)
    missing = {
        key: value
        for key, value in RELEASED.items()
        if key not in ("rope_scaling", "layer_types", "rope_theta", "swiglu_limit")
    }
    assert run_config_of(find_family("gpt_oss"), missing) == explicit


# MXFP4

NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def quantize(weight):
    """Return blocks and scales of stacked matrices [E, R, C]: the nearest numbers of each block."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups / exponent.exp2().unsqueeze(-1)
    code = (scaled.abs().unsqueeze(-1) - NUMBERS).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = code[..., 0::2] + 16 * code[..., 1::2]
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8)


def reference(blocks, scales):
    """Dequantise with transformers; bf16 [E, C, R]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def test_every_number_equals_transformers(tmp_path):
    """All pairs of four bits, with all scales."""
    blocks = torch.arange(256).repeat(16).view(1, 64, 4, 16).to(torch.uint8)
    for first in range(0, 256, 64):
        row_scales = torch.arange(first, first + 64).to(torch.uint8)
        scales = row_scales[None, :, None].expand(1, 64, 4).contiguous()
        path = tmp_path / f"{first}.safetensors"
        save_file({"w_blocks": blocks, "w_scales": scales}, path)
        tensor = dequantize_mxfp4(read_file_tensors(path), MXFP4)["w"]
        expected = reference(blocks, scales)
        assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
        values = tensor.read(0, expected.numel()).view(expected.shape)
        assert torch.equal(values, expected)


def test_ranges_cross_experts(tmp_path):
    blocks, scales = quantize(torch.randn(3, 6, 64))
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "f.safetensors")
    stored = read_file_tensors(tmp_path / "f.safetensors")
    tensor = MXFP4Tensor(stored["w_blocks"], stored["w_scales"])
    expected = reference(blocks, scales).flatten()
    size = 6 * 64
    for start, end in ((0, 0), (5, 9), (size - 1, size + 1), (7, 3 * size), (0, 3 * size)):
        assert torch.equal(tensor.read(start, end - start), expected[start:end])


@pytest.fixture(scope="module")
def mxfp4_folder(tmp_path_factory):
    """A model with experts in MXFP4 in two files, and the folder of its unquantised form."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    config = {**FAMILIES["gpt_oss"].base, "intermediate_size": 64}
    model = new_hf_model("gpt_oss", **config).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "mxfp4")
    tensors = load_file(folder / "mxfp4/model.safetensors")
    stored = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        blocks, scales = quantize(tensor.float().transpose(1, 2))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = reference(blocks, scales).contiguous()
    shutil.copytree(folder / "mxfp4", folder / "bf16")
    save_file(tensors, folder / "bf16/model.safetensors", {"format": "pt"})
    save_in_two_files(stored, folder / "mxfp4")
    edit_config(folder / "mxfp4", quantization_config=MXFP4)
    return folder


def save_in_two_files(tensors, folder):
    """Save tensors as the released model: shards with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_quantised_model_equals_transformers(mxfp4_folder):
    """transformers loads the same folder, and dequantises its experts."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    theirs = AutoModelForCausalLM.from_pretrained(
        mxfp4_folder / "mxfp4", quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = import_model(mxfp4_folder / "mxfp4")
    expected = logits_of(theirs.float().eval(), tokens())
    torch.testing.assert_close(our_logits(ours.model, tokens()), expected, rtol=0, atol=1e-4)
    unquantised = import_model(mxfp4_folder / "bf16")
    for name, tensor in unquantised.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name


def test_quantised_model_is_exported_in_bf16(mxfp4_folder, tmp_path):
    convert_from_hf(mxfp4_folder / "mxfp4", tmp_path / "ours")
    back = export_hf(tmp_path / "ours", tmp_path / "back")
    expected = load_file(mxfp4_folder / "bf16/model.safetensors")
    found = {}
    for path in sorted(back.glob("*.safetensors")):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert load_hf(back).config.num_local_experts == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("w_scales"),
            "'w_scales' is missing, without which 'w_blocks' has no values",
        ),
        (
            lambda t: t.pop("w_blocks"),
            "'w_blocks' is missing, without which 'w_scales' has no values",
        ),
        (
            lambda t: t.update(w_scales=t["w_scales"][:, 1:].contiguous()),
            r"the shape of the tensor w_scales is \[2, 3, 2\]; allowed: \[2, 4, 2\]",
        ),
        (
            lambda t: t.update(w_blocks=t["w_blocks"].flatten(2)),
            r"the shape of the tensor w_blocks is \[2, 4, 32\]; allowed: \[experts, rows",
        ),
        (
            lambda t: t.update(w_scales=t["w_scales"].float()),
            "the dtype of the tensor w_scales is 'torch.float32'; allowed: torch.uint8",
        ),
    ],
)
def test_inconsistent_blocks_are_refused(change, message, tmp_path):
    blocks, scales = quantize(torch.randn(2, 4, 64))
    tensors = {"w_blocks": blocks, "w_scales": scales}
    change(tensors)
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=message):
        dequantize_mxfp4(read_file_tensors(tmp_path / "f.safetensors"), MXFP4)


def test_lost_scales_of_a_folder_are_named(mxfp4_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(mxfp4_folder / "mxfp4", folder)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    path = folder / index["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    index_path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{name}' is missing"):
        open_hf_model(folder)
