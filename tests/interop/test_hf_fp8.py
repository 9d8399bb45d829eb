"""FP8 weights with scales of blocks: ranges, conversion of a model, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_models import HFCase, hf_model, save_hf
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.interop.hf.convert import convert_from_hf, open_hf_model
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.interop.hf.file_tensor import read_file_tensors
from megatron.interop.hf.fp8 import BlockScaledTensor, dequantize_fp8
from megatron.io.safetensors_writer import read_header

pytest.importorskip("transformers", reason="the reference implementations are not installed")

FP8 = torch.float8_e4m3fn
BLOCK = (16, 12)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
}


def quantize(weight, block=BLOCK):
    """Return a weight [..., R, C] in FP8, and the scales of its blocks."""
    *stack, rows, columns = weight.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    scale = torch.zeros(*stack, *grid)
    quantized = torch.zeros_like(weight)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = (
                ...,
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[..., i, j] = weight[at].abs().amax((-2, -1)) / 448
            quantized[at] = weight[at] / scale[..., i, j, None, None]
    return quantized.to(FP8), scale


def dequantize(weight, scale, block=BLOCK):
    """Multiply every element by the scale of its block, one at a time."""
    values = weight.float()
    flat = values.view(-1, *values.shape[-2:])
    scales = scale.float().view(-1, *scale.shape[-2:])
    for e in range(flat.shape[0]):
        for r in range(flat.shape[1]):
            for c in range(flat.shape[2]):
                flat[e, r, c] *= scales[e, r // block[0], c // block[1]]
    return values


@pytest.mark.parametrize("shape", [(40, 31), (32, 24), (3, 20, 17), (1, 5)])
def test_ranges_equal_a_naive_dequantization(shape, tmp_path):
    """Blocks at the edges are smaller, and ranges begin and end in the middle of rows."""
    weight, scale = quantize(torch.randn(shape))
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "f.safetensors")
    stored = read_file_tensors(tmp_path / "f.safetensors")
    tensor = BlockScaledTensor(stored["w"], stored["w_scale_inv"], BLOCK)
    expected = dequantize(weight, scale).flatten()
    numel = expected.numel()
    assert tensor.shape == shape
    for start, end in [(0, numel), (0, 0), (1, 4), (numel // 3, numel - 2), (numel - 1, numel)]:
        assert torch.equal(tensor.read(start, end - start), expected[start:end])


def test_default_blocks_have_128_elements(tmp_path):
    weight, scale = quantize(torch.randn(130, 257), (128, 128))
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "f.safetensors")
    stored = read_file_tensors(tmp_path / "f.safetensors")
    tensors = dequantize_fp8(stored, {"quant_method": "fp8"})
    expected = dequantize(weight, scale, (128, 128))
    assert list(tensors) == ["w"]
    assert torch.equal(tensors["w"].read(0, expected.numel()).view(130, 257), expected)


def is_quantized(name, tensor):
    """Return whether DeepSeek's FP8 models have a scale for a tensor."""
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj")
    return tensor.dim() == 2 and not any(part in name for part in kept)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory) -> Path:
    """A DeepSeek-V3 model whose third layer predicts a further token, in FP8."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder = tmp_path_factory.mktemp("fp8") / "hf"
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES))
    model.bfloat16().save_pretrained(folder)
    tensors = {}
    source = load_file(folder / "model.safetensors")
    source["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(4)
    source["model.layers.2.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    source["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.randn(24, 32).bfloat16()
    for name, tensor in source.items():
        tensors[name] = tensor
        if is_quantized(name, tensor):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor.float())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_quantization(folder, {"quant_method": "fp8", "weight_block_size": [*BLOCK]})
    return folder


def edit_quantization(folder, value):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = value
    path.write_text(json.dumps(config))


def dequantized(folder):
    """Return the tensors of a folder, dequantised one element at a time."""
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            tensor = dequantize(tensor, stored[f"{name}_scale_inv"])
        if not name.endswith("_scale_inv"):
            tensors[name] = tensor
    return tensors


def test_model_is_read_in_full_precision(fp8_folder):
    """Our weights are the products of FP8 and scales, before any rounding to bf16."""
    weights = open_hf_model(fp8_folder).weights
    expected = dequantized(fp8_folder)
    stack = torch.stack(
        [expected[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    )
    name = "layers.1.mlp.experts.w2"
    assert torch.equal(weights.read(name, 0, stack.numel()).view_as(stack), stack)
    part = weights.read(name, 700, 300)
    assert torch.equal(part, stack.flatten()[700:1000])
    assert (part != part.bfloat16().float()).any()


def test_export_of_fp8_is_bf16(fp8_folder, tmp_path):
    """Also of the layer that is kept aside; config.json no longer says that it is quantised."""
    result = convert_from_hf(fp8_folder, tmp_path / "ours")
    assert len(result.kept) == 2
    convert_to_hf(
        find_verified_checkpoint(tmp_path / "ours"), tmp_path / "back", ExportOptions()
    )
    found = load_file(tmp_path / "back" / "model.safetensors")
    expected = dequantized(fp8_folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype = torch.float32 if "correction_bias" in name else torch.bfloat16
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], tensor.to(dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


WEIGHT = "model.layers.1.self_attn.kv_b_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


def lose_scale(tensors):
    del tensors[SCALE]


def lose_weight(tensors):
    del tensors[WEIGHT]


def widen_weight(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].bfloat16()


def flatten_scale(tensors):
    tensors[SCALE] = tensors[SCALE].flatten()


def round_scale(tensors):
    tensors[SCALE] = tensors[SCALE].long()


def flatten_weight(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].flatten()


@pytest.mark.parametrize(
    "change, message",
    [
        (lose_scale, f"{WEIGHT}' is in FP8 and has no weight_scale_inv"),
        (lose_weight, f"{SCALE}' scales an FP8 weight, which is missing"),
        (widen_weight, f"{SCALE}' scales an FP8 weight, which is in torch.bfloat16"),
        (
            flatten_scale,
            f"{SCALE} is [4]; allowed: [2, 2], one scale for each block of 16 x 12",
        ),
        (round_scale, f"{SCALE} is 'torch.int64'; allowed: torch.float32"),
        (flatten_weight, f"{WEIGHT} is [448]; allowed: a matrix, or a stack of matrices"),
    ],
)
def test_wrong_scale_is_named(change, message, fp8_folder, tmp_path):
    tensors = load_file(fp8_folder / "model.safetensors")
    change(tensors)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((fp8_folder / "config.json").read_text())
    with pytest.raises(ValueError) as error:
        convert_from_hf(folder, tmp_path / "ours")
    assert message in str(error.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "quantization, message",
    [
        (None, "is in FP8, but config.json has no quantization_config"),
        ({"quant_method": "awq"}, "quant_method is 'awq'; allowed: "),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'; allowed: 'e4m3'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "two positive integers"),
    ],
)
def test_other_quantization_is_refused(quantization, message, fp8_folder, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(fp8_folder / "model.safetensors")
    (folder / "config.json").write_text((fp8_folder / "config.json").read_text())
    edit_quantization(folder, quantization)
    with pytest.raises(ValueError) as error:
        open_hf_model(folder)
    assert message in str(error.value)


def test_fp8_of_another_family_is_read(tmp_path):
    """MiniMax-M2 names experts like Mixtral and the format like torch."""
    model = hf_model(HFCase("minimax_m2", "base"))
    folder = save_hf(model, tmp_path / "hf", dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if is_quantized(name, tensor) and "moe.gate." not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor.float())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "float8_e4m3fn"}
    edit_quantization(folder, {**quantization, "weight_block_size": [*BLOCK]})
    weights = open_hf_model(folder).weights
    expected = dequantized(folder)
    name = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    stack = torch.stack([expected[name.format(e)] for e in range(6)])
    found = weights.read("layers.1.mlp.experts.w3", 0, stack.numel())
    assert torch.equal(found.view_as(stack), stack)


def test_own_files_have_no_fp8(fp8_folder):
    """What is read of others is not allowed in checkpoints."""
    with pytest.raises(ValueError, match="'F8_E4M3'.*; allowed dtypes: F64 F32"):
        read_header(fp8_folder / "model.safetensors")
