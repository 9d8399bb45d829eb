"""Hugging Face folders in and out: a dense model of transformers becomes one of its MoE models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers import dense_models
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.checkpoint.loader import find_checkpoint
from megatron.config.checkpoint import CheckpointConfig
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.interop.upcycle.convert import UpcycleResult, upcycle
from megatron.interop.upcycle.dense_source import open_dense_source
from megatron.interop.upcycle.flags import parse_request
from megatron.model.gpt import GPT
from megatron.parallel.groups import Groups
from megatron.tokenizer.build import build_tokenizer

VOCAB_SIZE = 61
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def run(folder: Path, output: Path, flags: str) -> UpcycleResult:
    source = open_dense_source(folder)
    return upcycle(source, parse_request(source.config, flags.split()), output)


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of transformers' model of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens()).logits


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(4))


def our_model(directory: Path) -> GPT:
    options = CheckpointConfig(load=str(directory), finetune=True)
    checkpoint = find_checkpoint(options, Groups(), required=True)
    config = checkpoint.metadata.config
    model = dense_models.build(config, config.model.vocab_size)
    checkpoint.load_weights(model, Groups())
    return model.eval()


def our_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return our_model(directory)(tokens()).logits


@pytest.mark.parametrize(
    "flags", ["--num-experts 4 --topk 2", "--num-experts 8 --granularity 2 --topk 4"]
)
def test_llama_becomes_mixtral_in_transformers(llama, tmp_path, flags):
    result = run(llama, tmp_path / "mixtral", f"{flags} --output-format hf")
    assert result.path == tmp_path / "mixtral"
    config = json.loads((tmp_path / "mixtral" / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["num_local_experts"] == int(flags.split()[1])
    torch.testing.assert_close(logits(tmp_path / "mixtral"), logits(llama), rtol=0, atol=1e-5)
    assert (tmp_path / "mixtral" / "generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]


@pytest.mark.parametrize("name, family", [("Qwen2", "moe_megatron"), ("Qwen3", "qwen3_moe")])
def test_qwen_becomes_moe_in_transformers(tmp_path, name, family):
    """Biases and norms of the attention are taken over; Qwen2-MoE has a shared expert."""
    import transformers

    import megatron.interop.hf_model  # noqa: F401 - registers moe_megatron

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES, head_dim=8)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "dense")
    flags = "--num-experts 4 --topk 2 --output-format hf"
    run(tmp_path / "dense", tmp_path / "moe", flags)
    content = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert content["model_type"] == family
    expected = logits(tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "moe"), expected, rtol=0, atol=1e-5)


def test_shared_neurons_become_those_of_qwen2_moe(tmp_path):
    """Its shared expert has a gate, which starts at a half of the doubled output."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path / "dense")
    flags = (
        "--num-experts 4 --topk 4 --strategy random --shared-neurons 16 --init-method-std 1e-8"
    )
    flags += " --moe-shared-expert-gate --output-format hf"
    run(tmp_path / "dense", tmp_path / "moe", flags)
    content = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert content["model_type"] == "qwen2_moe"
    assert content["shared_expert_intermediate_size"] == 16
    expected = logits(tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "moe"), expected, rtol=0, atol=1e-5)


def test_llama_becomes_our_checkpoint(llama, tmp_path):
    run(llama, tmp_path / "moe", "--num-experts 4 --topk 2")
    torch.testing.assert_close(our_logits(tmp_path / "moe"), logits(llama), rtol=0, atol=1e-5)
    folder = tmp_path / "moe" / "iter_0000000" / "hf"
    assert [path.name for path in folder.iterdir()] == ["generation_config.json"]
    checkpoint = find_verified_checkpoint(tmp_path / "moe")
    convert_to_hf(checkpoint, tmp_path / "mixtral", ExportOptions())
    torch.testing.assert_close(logits(tmp_path / "mixtral"), logits(llama), rtol=0, atol=1e-5)


def test_tokenizer_outlives_the_checkpoint_of_iteration_0(llama, tmp_path):
    """A training run that continues there may delete that checkpoint (`--keep-last`)."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    content = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    dense = shutil.copytree(llama, tmp_path / "dense")
    (dense / "tokenizer.json").write_text(json.dumps(content))
    run(dense, tmp_path / "moe", "--num-experts 4 --topk 2")
    options = CheckpointConfig(load=str(tmp_path / "moe"), finetune=True)
    checkpoint = find_checkpoint(options, Groups(), required=True)
    tokenizer = checkpoint.metadata.config.tokenizer
    assert Path(tokenizer.tokenizer_model).parent == tmp_path / "moe" / "tokenizer"
    shutil.rmtree(dense)
    shutil.rmtree(tmp_path / "moe" / "iter_0000000")
    assert build_tokenizer(tokenizer).encode("w3").tolist() == [3]


def test_split_equals_itself_in_transformers(llama, tmp_path):
    """The factor E is in the down projections, because Mixtral has none."""
    flags = "--num-experts 4 --topk 2 --strategy kmeans --router-init centroids --seed 7"
    run(llama, tmp_path / "moe", flags)
    run(llama, tmp_path / "mixtral", f"{flags} --output-format hf")
    expected = our_logits(tmp_path / "moe")
    torch.testing.assert_close(logits(tmp_path / "mixtral"), expected, rtol=0, atol=1e-5)


def test_dense_folder_runs_on_text(llama, tmp_path):
    """Its tokenizer without files reads ids."""
    ids = " ".join(str(i) for i in tokens().flatten().tolist())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": ids}) + "\n")
    flags = f"--strategy gradient --num-experts 4 --topk 4 --sample-data {tmp_path}/text.jsonl"
    run(llama, tmp_path / "moe", flags)
    model = our_model(tmp_path / "moe")
    for block in model.layers:
        torch.nn.init.zeros_(block.mlp.gate.router.weight)
    with torch.no_grad():
        ours = model(tokens()).logits
    torch.testing.assert_close(ours, logits(llama), rtol=0, atol=1e-5)


def test_factor_in_the_gate_needs_another_family(llama, tmp_path):
    """No family with grouped-query attention and softmax has a factor: ours has."""
    flags = "--num-experts 4 --topk 2 --strategy random --output-format hf --scale-in gate"
    run(llama, tmp_path / "moe", flags)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["model_type"] == "moe_megatron"


def test_moe_folder_is_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ValueError, match="is 2; allowed: 0, a dense model"):
        open_dense_source(tmp_path / "mixtral")


def test_unknown_family_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2'; allowed: "):
        open_dense_source(tmp_path)


def test_existing_folder_is_refused(llama, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="allowed: a new or an empty directory"):
        run(llama, tmp_path, "--num-experts 4 --topk 2 --output-format hf")
