"""Blocks of tensors: each transform reads what it writes, and the map of tensors is complete."""

from __future__ import annotations

import json

import pytest
import torch

from megatron.config.schema import ModelConfig, RunConfig
from megatron.interop.hf import transforms as t
from megatron.interop.hf.convert import open_hf_model
from megatron.interop.hf.registry import find_family
from megatron.interop.hf.tensor_map import map_tensors
from megatron.interop.hf.weights import HFTensors, read_from
from megatron.interop.model_specs import model_specs

REVERSED = t.ordered_rows("reversed", lambda config: torch.arange(5, -1, -1))
ALL = [
    t.UNCHANGED,
    t.TRANSPOSED,
    t.FIRST_HALF,
    t.SECOND_HALF,
    t.EVEN_ROWS,
    t.ODD_ROWS,
    t.transposed(t.EVEN_ROWS),
    t.transposed(t.SECOND_HALF),
    REVERSED,
]


@pytest.mark.parametrize("transform", ALL, ids=lambda transform: transform.name)
def test_block_is_read_where_it_is_written(transform):
    ours = torch.randn(6, 4)
    config = RunConfig()
    theirs = torch.full(transform.their_shape((6, 4)), torch.nan)
    transform.put(theirs, ours, config)
    assert torch.equal(transform.take(theirs, (6, 4), config), ours)
    assert int(theirs.isfinite().sum()) == ours.numel()
    if transform.offset is not None:
        start = transform.offset((6, 4))
        assert torch.equal(theirs.flatten()[start : start + 24], ours.flatten())


def test_row_order_names_the_source_row():
    ours = REVERSED.take(torch.arange(6.0)[:, None], (6, 1), RunConfig())
    assert ours.flatten().tolist() == [5, 4, 3, 2, 1, 0]


def test_interleaved_pairs_become_halves():
    """Rows 1 to 4 of each head of 6 rotate in pairs (1, 2) and (3, 4)."""
    order = t.half_rotated_rows(num_heads=2, head_size=6, rope_start=1, rope_size=4)
    assert order.tolist() == [0, 1, 3, 2, 4, 5, 6, 7, 9, 8, 10, 11]


@pytest.mark.parametrize("layout", [0, 1])
def test_their_tensors_come_from_ours(layout):
    """Stacked experts and single ones hold the same elements."""
    family = find_family("mixtral")
    shapes = {f"layers.0.mlp.experts.{w}": (3, 4, 2) for w in ("w1", "w3")}
    shapes["layers.0.mlp.experts.w2"] = (3, 2, 4)
    ours = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensor_map = map_tensors(family, family.layouts[layout], shapes)
    theirs = HFTensors(tensor_map, RunConfig(), read_from(ours))
    prefix = "model.layers.0"
    for expert in range(3):
        gate, up, down = (ours[f"layers.0.mlp.experts.{w}"][expert] for w in ("w1", "w3", "w2"))
        if layout == 0:
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            assert torch.equal(theirs.read_full(f"{experts}.w3.weight"), up)
            assert torch.equal(theirs.read_full(f"{experts}.w2.weight"), down)
        else:
            fused = theirs.read_full(f"{prefix}.mlp.experts.gate_up_proj")
            assert torch.equal(fused[expert], torch.cat((gate, up)))
            assert torch.equal(
                theirs.read_full(f"{prefix}.mlp.experts.down_proj")[expert], down
            )


def test_tensor_without_a_rule_is_named():
    with pytest.raises(
        ValueError, match="'embed_positions.weight'; allowed: those of the family"
    ):
        map_tensors(find_family("llama"), None, {"embed_positions.weight": (4, 2)})


def test_absurd_depth_is_refused():
    with pytest.raises(ValueError, match="--num-layers is 1000000; allowed: up to 10000"):
        model_specs(RunConfig(model=ModelConfig(num_layers=1_000_000)), 10)


def test_far_too_large_config_is_refused(tmp_path):
    """The names of a billion experts are not made."""
    from safetensors.torch import save_file

    content = {
        "model_type": "mixtral",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 8,
        "intermediate_size": 8,
        "num_local_experts": 1_000_000_000,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match="the model of config.json is '.*; allowed: about the 8"
    ):
        open_hf_model(tmp_path)
