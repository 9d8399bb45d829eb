"""--init-from-hf: the settings of a Hugging Face model, under those of the command line."""

from __future__ import annotations

import json

import pytest

from megatron.config import cli
from megatron.config.schema import RunConfig
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
from megatron.moe.gate import available_gates, gate_config_class

MIXTRAL_LIKE = {
    "model": {"num_layers": 3, "hidden_size": 48, "swiglu": True, "vocab_size": 99},
    "moe": {"num_experts": 6, "gate": "topk", "moe_ffn_hidden_size": 40},
    "gate_options": {"topk": {"topk": 2, "norm_topk_prob": True}},
    "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "folder"},
}
DENSE = {"model": {"num_layers": 3, "hidden_size": 48}}


def parse(*words: str, model: dict | None = None) -> RunConfig:
    model = model or MIXTRAL_LIKE
    return cli.parse(
        list(words),
        gate_config_class,
        available_gates,
        expert_types=KNOWN_EXPERT_TYPES,
        read_hf_config=lambda folder: json.loads(json.dumps(model)),
    )


def test_hf_config_sets_the_model():
    config = parse("--init-from-hf", "folder")
    assert config.checkpoint.init_from_hf == "folder"
    assert (config.model.num_layers, config.model.hidden_size) == (3, 48)
    assert config.model.act == "swiglu"
    assert (config.moe.num_experts, config.moe.gate) == (6, "topk")
    assert config.gate_options["topk"]["norm_topk_prob"] is True
    assert config.tokenizer.tokenizer_model == "folder"


def test_flags_take_precedence_over_hf_config():
    config = parse("--init-from-hf=folder", "--topk", "3", "--tokenizer-type", "ByteTokenizer")
    assert config.gate_options["topk"]["topk"] == 3
    assert config.gate_options["topk"]["norm_topk_prob"] is True
    assert config.tokenizer.tokenizer_type == "ByteTokenizer"


def test_another_gate_drops_the_options(caplog):
    config = parse("--init-from-hf", "folder", "--gate", "threshold", "--threshold", "0.7")
    assert config.moe.gate == "threshold" and config.moe.num_experts == 6
    assert config.gate_options["threshold"]["threshold"] == 0.7
    assert "--gate threshold replaces topk of folder" in caplog.text


def test_hf_config_replaces_that_of_run_json(tmp_path):
    """The gate and the experts of a run.json are not used; its training settings are."""
    stored = {
        "version": 3,
        "model": {"num_layers": 9, "hidden_dropout": 0.25},
        "moe": {"num_experts": 4, "gate": "threshold"},
        "gate_options": {"threshold": {"threshold": 0.5}},
        "optimizer": {"lr": 0.125},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(stored))
    config = parse("--config", str(path), "--init-from-hf", "folder")
    assert (config.model.num_layers, config.model.hidden_dropout) == (3, 0.25)
    assert (config.moe.num_experts, config.moe.gate) == (6, "topk")
    assert config.optimizer.lr == 0.125
    dense = parse("--config", str(path), "--init-from-hf", "folder", model=DENSE)
    assert dense.moe.num_experts == 0


def test_load_needs_load_or_init():
    with pytest.raises(ValueError, match="init-from-hf.*allowed: .*--load-or-init"):
        parse("--init-from-hf", "folder", "--load", "runs/x")
    config = parse("--init-from-hf", "folder", "--load", "runs/x", "--load-or-init")
    assert config.checkpoint.load == "runs/x"


def test_load_replaces_stored_origin(tmp_path):
    """The run.json of a run that started from a model can be used to resume it."""
    path = tmp_path / "run.json"
    stored = {"version": 3, "train": {"init_from_hf": "folder"}}
    path.write_text(json.dumps(stored))
    assert parse("--config", str(path)).checkpoint.init_from_hf == "folder"
    config = parse("--config", str(path), "--load", "runs/x")
    assert config.checkpoint.init_from_hf == ""


def test_programs_without_reader_refuse():
    with pytest.raises(ValueError, match="--init-from-hf is 'folder'; allowed: only in a"):
        cli.parse(["--init-from-hf", "folder"], gate_config_class, available_gates)


def test_flags_are_not_refused_before_files_are_read():
    cli.refuse_early(["--init-from-hf", "folder", "--num-query-groups", "3"])
    with pytest.raises(ValueError, match="num-query-groups"):
        cli.refuse_early(["--num-query-groups", "3"])
