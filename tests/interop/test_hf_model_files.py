"""Our models in transformers: saving, loading, dtypes, vocabularies, gates outside the tree."""

from __future__ import annotations

import json
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from helpers.outside_gates import restored_registry, write_gate  # noqa: E402
from helpers.transformers_twins import (  # noqa: E402
    VOCAB,
    build,
    make_run,
    twin_state,
    twins,
    with_aligned_weights,
)
from megatron.inference.model import cast_for_inference  # noqa: E402
from megatron.interop.hf_model import (  # noqa: E402
    MoEMegatronConfig,
    MoEMegatronForCausalLM,
    MoEMegatronModel,
)
from megatron.moe.gate import available_gates, gate_class  # noqa: E402
from megatron.moe.gate_registry import import_gate_files  # noqa: E402

TOKENS = torch.tensor([[3, 9, 30, 9, 1, 12, 28, 7], [5, 17, 11, 0, 22, 6, 40, 2]])


def load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return with_aligned_weights(model)


@pytest.mark.parametrize("name", available_gates())
def test_saved_model_is_loaded_unchanged(name, tmp_path):
    """In fp32 and in bf16, with the state of gates in fp32."""
    gpt, model = twins(make_run(name))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is MoEMegatronForCausalLM and not loaded.training
    for key, tensor in twin_state(gpt).items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    half = load(tmp_path, dtype=torch.bfloat16)
    cast_for_inference(gpt, "bf16", torch.device("cpu"))
    for key, tensor in twin_state(gpt).items():
        found = half.state_dict()[key]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
    assert torch.equal(
        half(TOKENS).logits, gpt(TOKENS, progress=1.0, independent_sequences=True)[3]
    )


def test_tied_and_sharded_files_are_loaded(tmp_path):
    run = make_run(untie_embeddings_and_output_weights=False)
    _, model = twins(run)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    names = {name for file in files for name in safetensors_torch.load_file(file)}
    assert "lm_head.weight" not in names and "model.layers.1.mlp.experts.w2" in names
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_auto_classes_find_config_and_base_model(tmp_path):
    _, model = twins(make_run())
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MoEMegatronConfig and config.run_config == model.config.run_config
    derived = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert derived == (16, 2, 4) and config.num_key_value_heads == 2 and config.head_dim == 4
    assert config.vocab_size == 48 and config.run_config.model.vocab_size == VOCAB
    assert config.max_position_embeddings == 24 and config.num_experts == 4
    assert config.intermediate_size == 64 and not config.tie_word_embeddings
    base = with_aligned_weights(transformers.AutoModel.from_pretrained(tmp_path))
    assert type(base) is MoEMegatronModel
    hidden = base(TOKENS).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(TOKENS).logits)


def test_new_models_have_initial_weights_of_training():
    run = make_run("remoe")
    config = MoEMegatronConfig.of(run, VOCAB)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gpt = build(run, seed=run.train.seed)
    cast_for_inference(gpt, "bf16", torch.device("cpu"))
    parameters = dict(model.named_parameters())
    for key, tensor in twin_state(gpt).items():
        if key in parameters:
            assert torch.equal(parameters[key], tensor), key
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert parameters["model.layers.0.mlp.gate.router.weight"].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert model.to(torch.float16).model.layers[0].mlp.gate.router.weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_is_resized(tied, tmp_path):
    _, model = twins(make_run(untie_embeddings_and_output_weights=not tied))
    before = model(TOKENS).logits
    model.resize_token_embeddings(60)
    logits = model(TOKENS).logits
    assert logits.shape[-1] == 60 == model.config.vocab_size
    torch.testing.assert_close(logits[..., :48], before)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.run_config.model.vocab_size == 60
    assert torch.equal(loaded(TOKENS).logits, logits)


def test_table_of_token_ids_is_not_resized():
    _, model = twins(make_run("hash"))
    message = "vocab_size is 60; allowed: 48, as a gate of hash has a row per token id"
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(60)


def change_tensors(folder, change) -> None:
    """Rewrite the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})


ROUTER = "model.layers.0.mlp.gate.router.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(ROUTER), rf"missing_keys of .* is \['{ROUTER}'\]; allowed: none"),
        (lambda t: t.update(extra=torch.ones(1)), r"unexpected_keys of .* is \['extra'\]"),
    ],
)
def test_lost_and_extra_tensors_are_refused(change, message, tmp_path):
    twins(make_run())[1].save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_misshapen_tensor_is_refused(tmp_path):
    twins(make_run())[1].save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({ROUTER: t[ROUTER][:2].clone()}))
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        load(tmp_path)
    with pytest.raises(ValueError, match="mismatched_keys of .*router.weight"):
        load(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(data={}), r"config.json: run is \[.data.\]; allowed: "),
        (lambda run: run["moe"].update(num_expert=3), "unknown key 'moe.num_expert'; did you"),
        (lambda run: run["model"].update(hidden_size=-1), "--hidden-size is -1"),
        (
            lambda run: run["model"].update(vocab_size=0),
            "config.json: run.model.vocab_size is 0",
        ),
        (lambda run: run.update(version=99), "format version 99"),
    ],
)
def test_wrong_config_is_refused(change, message, tmp_path):
    twins(make_run())[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    change(content["run"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_outside_gate_must_be_imported(tmp_path):
    """The path that a folder records is not imported, even where the file exists."""
    file = write_gate(tmp_path, "from_outside")
    folder = tmp_path / "model"
    with restored_registry():
        import_gate_files([str(file)])
        _, model = twins(make_run("from_outside", {"shift": 1}))
        model.save_pretrained(folder)
        expected = model(TOKENS).logits
        assert torch.equal(load(folder)(TOKENS).logits, expected)
        origin = model.config.gates["from_outside"]
        assert origin["path"] == str(file) and len(origin["sha256"]) == 64
        assert model.config.run_config.moe.gate_path == ()
    before = set(sys.modules)
    with restored_registry():
        message = "'from_outside' of .*from_outside.py.* not imported .*import_gate_files"
        with pytest.raises(ValueError, match=message):
            load(folder)
    assert not {name for name in set(sys.modules) - before if "from_outside" in name}
    with restored_registry():
        import_gate_files([str(file)])
        loaded = load(folder)
        assert torch.equal(loaded(TOKENS).logits, expected)
        assert (
            gate_class("from_outside").Config(shift=1) == loaded.model.layers[0].mlp.gate.config
        )
