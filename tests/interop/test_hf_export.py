"""Export of models that came from no Hugging Face folder, and options of the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import handmade
from helpers.hf_conversion import build_our_model, export_hf, our_logits
from helpers.hf_folders import save_model
from helpers.hf_models import load_hf, logits_of, read_tensors
from megatron.checkpoint.weights_only import WeightsSource, write_weights_checkpoint
from megatron.config.schema import (
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from megatron.interop.hf.convert import convert_from_hf, open_hf_model
from megatron.interop.hf.weights import read_from
from megatron.interop.model_specs import model_specs
from megatron.tokenizer.build import build_tokenizer

TEXT = "to be or not to be, that is the question"
pytest.importorskip("transformers", reason="the reference implementations are not installed")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A Mixtral in several files, with a tokenizer of bytes."""
    return save_model(tmp_path_factory.mktemp("hf") / "mixtral", "mixtral")


def our_config(tokenizer: TokenizerConfig, **model) -> RunConfig:
    """Return what --swiglu --gate topk --norm-topk-prob and some sizes configure."""
    sizes = {"num_layers": 2, "hidden_size": 32, "seq_length": 32, **model}
    return RunConfig(
        model=ModelConfig(
            num_attention_heads=4,
            swiglu=True,
            untie_embeddings_and_output_weights=True,
            **sizes,
        ),
        moe=MoEConfig(num_experts=4, gate="topk", moe_ffn_hidden_size=24),
        gate_options={"topk": {"topk": 2, "norm_topk_prob": True}},
        tokenizer=tokenizer,
        optimizer=OptimizerConfig(bf16=True),
    )


def save(config: RunConfig, directory: Path):
    """Write a checkpoint of a random model. Returns the model."""
    tokenizer = build_tokenizer(config.tokenizer)
    specs = model_specs(config, tokenizer.vocab_size)
    model = build_our_model(config, tokenizer.vocab_size)
    tensors = model.state_dict()
    source = WeightsSource(specs.shapes, specs.buffers, read_from(tensors), tensors.get)
    write_weights_checkpoint(directory, config, tokenizer, source)
    return model


def test_trained_model_is_a_mixtral(mixtral, tmp_path):
    """The vocabulary is padded, and the tokenizer is that of transformers."""
    from transformers import AutoTokenizer

    files = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(mixtral))
    model = save(our_config(files, init_method_std=0.3), tmp_path / "ours")
    folder = export_hf(tmp_path / "ours", tmp_path / "theirs", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["dtype"] == "float32"
    assert config["vocab_size"] % 128 == 0
    ids = build_tokenizer(files).encode(TEXT)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == ids.tolist()
    tokens_BS = torch.from_numpy(ids.astype("int64"))[None, :30]
    theirs_BSV = logits_of(load_hf(folder), tokens_BS)
    assert theirs_BSV.std() > 0.1
    assert (our_logits(model, tokens_BS) - theirs_BSV).abs().max() <= 1e-4


def test_compute_dtype_is_the_default(tmp_path):
    """A model that was trained in bf16 is exported in bf16; NullTokenizer has no files."""
    save(our_config(TokenizerConfig("NullTokenizer", tokenizer_model="60")), tmp_path / "ours")
    folder = export_hf(tmp_path / "ours", tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_options_replace_the_folders_choices(mixtral, tmp_path):
    convert_from_hf(mixtral, tmp_path / "ours")
    done = handmade.run(
        "convert_to_hf.py",
        tmp_path / "ours",
        tmp_path / "back",
        *("--dtype", "bfloat16", "--max-shard-size", "20KB"),
    )
    files = read_tensors(tmp_path / "back")
    assert f"mixtral, {len(load_all(mixtral))} tensors" in done.stdout
    assert len(files) > len(read_tensors(mixtral))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    found = load_all(tmp_path / "back")
    for name, tensor in load_all(mixtral).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    load_hf(tmp_path / "back")


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for part in read_tensors(folder).values():
        tensors |= part
    return tensors


def test_too_large_values_are_refused(tmp_path):
    """Half precision ends at 65504; nothing is left of the attempt."""
    config = our_config(TokenizerConfig("NullTokenizer", tokenizer_model="60"))
    save(our_config(config.tokenizer, init_method_std=1e6), tmp_path / "ours")
    with pytest.raises(ValueError, match="--dtype float16 holds values up to 65504"):
        export_hf(tmp_path / "ours", tmp_path / "theirs", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_tools_report_mistakes_in_one_line(mixtral, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("x")
    done = handmade.run("convert_from_hf.py", mixtral, tmp_path / "full", code=2)
    assert "a new or an empty directory" in done.stderr and done.stderr.count("\n") == 1
    handmade.run("convert_from_hf.py", mixtral, tmp_path / "ours")
    for flags, message in (
        (("--family", "gpt9"), "--family is 'gpt9'; allowed: "),
        (("--family", "llama"), "--num-experts is 4; allowed in the family llama: 0."),
        (("--load-step", "-1"), "--load-step is -1"),
        (("--max-shard-size", "big"), "--max-shard-size is 'big'"),
    ):
        done = handmade.run(
            "convert_to_hf.py", tmp_path / "ours", tmp_path / "out", *flags, code=2
        )
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "other"}', '{"format": "moe-megatron hf layout 1"}', "files"],
)
def test_damaged_layout_is_named(mixtral, tmp_path, content):
    from megatron.interop.hf.hf_folder import read_layout

    path = tmp_path / "layout.json"
    if content == "files":
        stored = {"format": "moe-megatron hf layout 1", "files": {"../x": []}}
        content = json.dumps({**stored, "family": "mixtral", "index_metadata": None})
    path.write_text(content)
    with pytest.raises(ValueError, match="layout.json cannot be read"):
        read_layout(path)


def test_tied_copies_must_be_equal(tmp_path):
    """A stored output layer of a tied model is written back, and a different one refused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers.hf_models import edit_tensors

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path / "hf", copy)
    convert_from_hf(tmp_path / "hf", tmp_path / "ours")
    back = export_hf(tmp_path / "ours", tmp_path / "back")
    stored = (tmp_path / "hf/model.safetensors").read_bytes()
    assert (back / "model.safetensors").read_bytes() == stored
    edit_tensors(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight differs"):
        open_hf_model(tmp_path / "hf")


def test_too_large_tokenizer_is_refused(mixtral, tmp_path):
    """Ids above the embeddings would fail in the middle of a run."""
    config = json.loads((mixtral / "config.json").read_text())
    (tmp_path / "hf").mkdir()
    for path in mixtral.iterdir():
        (tmp_path / "hf" / path.name).symlink_to(path)
    (tmp_path / "hf/config.json").unlink()
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"vocab_size is 100; allowed: at least the \d+ ids"):
        open_hf_model(tmp_path / "hf")
