"""Folders of our own family: from checkpoints, into transformers, and back, without a change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from helpers import runs  # noqa: E402
from helpers.outside_gates import restored_registry, write_gate  # noqa: E402
from helpers.transformers_twins import (  # noqa: E402
    VOCAB,
    build,
    make_run,
    twin_state,
    with_aligned_weights,
)
from megatron.checkpoint.consolidate import find_verified_checkpoint  # noqa: E402
from megatron.checkpoint.shards import CheckpointReader  # noqa: E402
from megatron.checkpoint.weights_only import (  # noqa: E402
    WeightsSource,
    write_weights_checkpoint,
)
from megatron.config.schema import MoEConfig, RunConfig, TokenizerConfig  # noqa: E402
from megatron.inference.generate import generate  # noqa: E402
from megatron.inference.sampling import Sampling  # noqa: E402
from megatron.initialize import build_inference_model, initialize_inference  # noqa: E402
from megatron.interop.hf.convert import convert_from_hf, open_hf_model  # noqa: E402
from megatron.interop.hf.export import ExportOptions, convert_to_hf  # noqa: E402
from megatron.interop.hf_model import MoEMegatronForCausalLM  # noqa: E402
from megatron.interop.model_specs import model_specs  # noqa: E402
from megatron.log import get_logger  # noqa: E402
from megatron.moe.gate import available_gates  # noqa: E402
from megatron.moe.gate_registry import import_gate_files  # noqa: E402
from megatron.tokenizer.build import build_tokenizer  # noqa: E402

TOKENS = torch.tensor([[3, 9, 30, 9, 1, 12, 28, 7]])
TOKENIZER = TokenizerConfig("NullTokenizer", tokenizer_model=str(VOCAB - 1))


def write_checkpoint(run: RunConfig, directory: Path) -> torch.nn.Module:
    """Write the weights of a model as a checkpoint; returns the model."""
    gpt = build(run)
    state = gpt.state_dict()
    specs = model_specs(run, VOCAB)

    def read(name: str, start: int, length: int) -> torch.Tensor:
        return state[name].flatten()[start : start + length]

    source = WeightsSource(specs.shapes, specs.buffers, read, lambda name: state[name])
    write_weights_checkpoint(directory, run, build_tokenizer(run.tokenizer), source)
    return gpt


def with_tokenizer(run: RunConfig) -> RunConfig:
    return RunConfig(
        model=run.model,
        moe=run.moe,
        tokenizer=TOKENIZER,
        gate_options=run.gate_options,
        expert_options=run.expert_options,
    )


def export(checkpoint: Path, output: Path, **options) -> Path:
    convert_to_hf(find_verified_checkpoint(checkpoint), output, ExportOptions(**options))
    return output


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(find_verified_checkpoint(checkpoint).path)
    tensors = {name: reader.read("weight", name) for name in reader.shapes}
    return tensors | {name: reader.buffer(name) for name in reader.buffers}


@pytest.mark.parametrize("name", available_gates())
def test_round_trip_is_bit_identical(name, tmp_path):
    """A checkpoint, exported, loaded by transformers, saved by it, converted, exported again."""
    gpt = write_checkpoint(with_tokenizer(make_run(name)), tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "hf", family="moe_megatron")
    model = with_aligned_weights(transformers.AutoModelForCausalLM.from_pretrained(folder))
    for key, tensor in twin_state(gpt).items():
        assert torch.equal(model.state_dict()[key], tensor), key
    expected = gpt(TOKENS, progress=1.0, independent_sequences=True).logits
    assert torch.equal(model(TOKENS).logits, expected)
    assert model.config.eos_token_id == VOCAB - 1 == model.generation_config.eos_token_id
    model.save_pretrained(tmp_path / "saved")
    convert_from_hf(tmp_path / "saved", tmp_path / "back")
    before = tensors_of(tmp_path / "ours")
    after = tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype, key
    again = export(tmp_path / "back", tmp_path / "again")
    for file in ("model.safetensors", "generation_config.json"):
        assert (again / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert json.loads((again / "config.json").read_text()) == config


def test_auto_falls_back_to_own_family(tmp_path, caplog):
    """A gate that no family of transformers has; its state and router stay fp32 in bf16."""
    run = with_tokenizer(make_run("remoe", {"topk": 3}))
    write_checkpoint(run, tmp_path / "ours")
    with caplog.at_level(logging.INFO, logger=get_logger().name):
        folder = export(tmp_path / "ours", tmp_path / "hf", dtype=torch.bfloat16)
    assert "the family is moe_megatron, which" in caplog.text
    assert "; --gate is 'remoe'; allowed in the family mixtral: 'topk'" in caplog.text
    opened = open_hf_model(folder)
    dtypes = {key: tensor.dtype for key, tensor in opened.source.tensors.items()}
    gate = "model.layers.0.mlp.gate."
    assert dtypes[f"{gate}router.weight"] == dtypes[f"{gate}reg_lambda"] == torch.float32
    assert dtypes["model.layers.0.mlp.experts.w1"] == torch.bfloat16
    assert opened.config.moe == run.moe and opened.config.model.vocab_size == VOCAB
    assert opened.config.gate_options == {"remoe": {"topk": 3}}
    assert opened.config.tokenizer == TOKENIZER and opened.config.optimizer.bf16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MoEMegatronForCausalLM and model.dtype == torch.bfloat16


def test_gates_per_layer_and_dense_blocks_are_exported(tmp_path):
    run = RunConfig(
        model=make_run(num_layers=3).model,
        moe=MoEConfig(num_experts=4, gate="hash@0,topk@1,dense@2", moe_ffn_hidden_size=16),
        tokenizer=TOKENIZER,
        gate_options={"hash": {"topk": 1}, "topk": {"topk": 3}},
    )
    gpt = write_checkpoint(run, tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "hf")
    model = with_aligned_weights(transformers.AutoModelForCausalLM.from_pretrained(folder))
    expected = gpt(TOKENS, progress=1.0, independent_sequences=True).logits
    assert torch.equal(model(TOKENS).logits, expected)
    options = open_hf_model(folder).config.gate_options
    assert options["topk"]["topk"] == 3 and options.keys() == {"hash", "topk"}


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("run"), "config.json: run is None; allowed: a JSON object"),
        (
            lambda c: c["run"].update(data={}),
            r"config.json: run is \['data'\]; allowed: the sec",
        ),
        (lambda c: c.update(gates=[1]), r"config.json: gates is \[1\]; allowed: "),
        (lambda c: c["run"]["model"].update(vocab_size=0), "run.model.vocab_size is 0"),
        (
            lambda c: c["run"]["gate_options"]["topk"].update(topk="many"),
            "gate_options.topk.topk is 'many'; allowed: an integer",
        ),
        (lambda c: c.update(sliding_window=3), "config.json: 'sliding_window' is 3"),
    ],
)
def test_wrong_config_is_refused(change, message, tmp_path):
    write_checkpoint(with_tokenizer(make_run()), tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "hf", family="moe_megatron")
    change_config(folder, change)
    with pytest.raises(ValueError, match=message):
        convert_from_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_outside_gate_is_not_imported_by_path(tmp_path):
    file = write_gate(tmp_path, "travelling")
    with restored_registry():
        import_gate_files([str(file)])
        write_checkpoint(with_tokenizer(make_run("travelling")), tmp_path / "ours")
        folder = export(tmp_path / "ours", tmp_path / "hf")
        assert open_hf_model(folder).config.moe.gate == "travelling"
    with restored_registry(), pytest.raises(ValueError, match="'travelling' of .*not imported"):
        open_hf_model(folder)


def _greedy_tokens(folder: str) -> list[list[int]]:
    run = initialize_inference(folder)
    model = build_inference_model(run)
    return generate(
        model,
        TOKENS.tolist(),
        max_new_tokens=5,
        vocab_size=run.vocab_size,
        sampling=Sampling(temperature=0),
    )


def test_programs_start_from_a_folder(ranks1, tmp_path):
    """Generation gives transformers' tokens, and a run that changes nothing the same tensors."""
    write_checkpoint(with_tokenizer(make_run("cosine")), tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(TOKENS, max_new_tokens=5, do_sample=False)[:, 8:].tolist()
    assert ranks1.run(_greedy_tokens, str(folder)) == [expected]
    flags = [
        *("--init-from-hf", str(folder), "--mock-data", "--seq-length", "16"),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1"),
        *("--lr", "1e-30", "--weight-decay", "0", "--eval-iters", "0"),
        *("--save", str(tmp_path / "run")),
    ]
    ranks1.run(runs.train, flags)
    again = export(tmp_path / "run", tmp_path / "again")
    before = safetensors_torch.load_file(folder / "model.safetensors")
    after = safetensors_torch.load_file(again / "model.safetensors")
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
