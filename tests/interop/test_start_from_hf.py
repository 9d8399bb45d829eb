"""--init-from-hf: training from the weights of a Hugging Face folder, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import runs
from helpers.hf_folders import save_model
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.checkpoint.shards import CheckpointReader
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.interop.hf.initial_weights import read_hf_settings, write_origin


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """A Mixtral in several files."""
    return save_model(tmp_path_factory.mktemp("hf") / "mixtral", "mixtral")


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    """Return the flags of a run that starts from a folder, on random tokens."""
    return [
        *("--init-from-hf", str(folder), "--mock-data", "--seq-length", "16"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "3"),
        *("--lr", "1e-3", "--adam-eps", "1e-3", "--eval-iters", "0", "--log-interval", "1"),
        *("--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")),
        *more,
    ]


def export(out: Path, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Export a run's newest checkpoint; return its tensors by file."""
    source = find_verified_checkpoint(out / "checkpoints")
    convert_to_hf(source, out / "hf", ExportOptions(**options))
    return tensors_of(out / "hf")


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def require_close(got: dict, expected: dict, **tolerances: float) -> None:
    """Compare two folders: files, names, and values."""
    assert {file: list(tensors) for file, tensors in got.items()} == {
        file: list(tensors) for file, tensors in expected.items()
    }
    for file, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(got[file][name], tensor, **tolerances, msg=name)


SHARDED = ("--moe-expert-parallel-size", "2", "--zero-stage", "3")


def test_weights_return_unchanged(ranks2, mixtral, tmp_path):
    """With a learning rate that changes nothing the export equals the origin, to the bit."""
    frozen = ("--lr", "1e-30", "--weight-decay", "0", "--train-iters", "1")
    ranks2.run(runs.train, flags(mixtral, tmp_path, *SHARDED, *frozen))
    got = export(tmp_path)
    require_close(got, tensors_of(mixtral), rtol=0, atol=0)
    assert len(got) > 3
    for name in ("config.json", "generation_config.json"):
        ours = json.loads((tmp_path / "hf" / name).read_text())
        assert ours == json.loads((mixtral / name).read_text())
    tokenizer = (tmp_path / "hf/tokenizer.json").read_bytes()
    assert tokenizer == (mixtral / "tokenizer.json").read_bytes()


def test_sharded_training_exports_the_same_weights(ranks1, ranks2, mixtral, tmp_path):
    """Experts on two ranks under ZeRO 3 give the tensors of one rank."""
    ranks1.run(runs.train, flags(mixtral, tmp_path / "one"))
    ranks2.run(runs.train, flags(mixtral, tmp_path / "two", *SHARDED))
    one = export(tmp_path / "one")
    two = export(tmp_path / "two")
    # Three steps of size lr; sums over ranks are in another order.
    require_close(two, one, rtol=1e-5, atol=1e-6)
    before = tensors_of(mixtral)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    (file,) = [file for file, tensors in before.items() if name in tensors]
    assert (one[file][name] - before[file][name]).abs().max() > 1e-4


def test_resumed_run_keeps_the_origin(ranks1, mixtral, tmp_path):
    """Checkpoints of a resumed run have the folder of the origin, which may be gone by then."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in mixtral.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    resume = ("--load", str(tmp_path / "checkpoints"), "--load-or-init", "--save-interval", "1")
    ranks1.run(runs.train, flags(folder, tmp_path, *resume, "--exit-interval", "2"))
    weights = sorted(folder.glob("model*"))
    assert len(weights) > 3
    for path in weights:
        path.unlink()
    ranks1.run(runs.train, flags(folder, tmp_path, *resume))
    rows = runs.metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    got = export(tmp_path)
    assert list(got) == list(tensors_of(mixtral))


def test_another_gate_takes_the_router(ranks1, mixtral, tmp_path):
    """The threshold gate starts from the router of the folder's top-k gate."""
    gate = ("--gate", "threshold", "--threshold", "0.6", "--lr", "1e-30", "--train-iters", "1")
    ranks1.run(runs.train, flags(mixtral, tmp_path, *gate, "--weight-decay", "0"))
    (checkpoint,) = (tmp_path / "checkpoints").glob("iter_*")
    name = "block_sparse_moe.gate.weight"
    theirs = [t for file in tensors_of(mixtral).values() for n, t in file.items() if name in n]
    reader = CheckpointReader(checkpoint)
    for layer in range(2):
        router = reader.read("weight", f"layers.{layer}.mlp.gate.router.weight")
        assert any(torch.equal(router, tensor.flatten()) for tensor in theirs)


def test_tensors_of_another_gate_keep_initial_values(ranks1, mixtral, tmp_path):
    gate = ("--gate", "cosine", "--lr", "1e-30", "--train-iters", "1")
    (lines,) = ranks1.run(runs.logged_train, flags(mixtral, tmp_path, *gate))
    text = "\n".join(lines)
    assert "tensors of the gate are not in" in text
    assert "tensors of the gate in" in text and "are not used" in text


def test_folder_is_evaluated_without_training(ranks1, mixtral, tmp_path):
    """--skip-train on --init-from-hf gives the figures of iteration 0, and writes no checkpoint."""
    evaluation = ("--eval-iters", "2", "--eval-interval", "3")
    ranks1.run(runs.train, flags(mixtral, tmp_path / "run", *evaluation))
    (lines,) = ranks1.run(
        runs.logged_train, flags(mixtral, tmp_path, *evaluation, "--skip-train")
    )
    assert f"--skip-train: evaluating {mixtral} on" in "\n".join(lines)
    first = runs.metrics(tmp_path / "run", "eval")[0]
    (row,) = runs.metrics(tmp_path, "eval")
    assert first["iteration"] == row["iteration"] == 0
    assert row["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (("--num-layers", "1"), r"layers\.1\..* in the model of this run it does not exist"),
        (("--num-layers", "3"), r"layers\.2\..* does not exist; in the model of this run"),
        (("--moe-ffn-hidden-size", "40"), "experts.w1. has the shape"),
        (("--num-experts", "8"), "experts.w1. has the shape"),
    ],
)
def test_flags_that_change_the_model_are_refused(ranks1, mixtral, tmp_path, more, message):
    with pytest.raises(RuntimeError, match=f"(?s)--init-from-hf is.*{message}"):
        ranks1.run(runs.train, flags(mixtral, tmp_path, *more))
    assert not list(tmp_path.glob("checkpoints/iter_*"))


def test_unknown_family_is_refused_before_training(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type is 'bert'; allowed: .*mixtral"):
        read_hf_settings(str(folder))
    with pytest.raises(ValueError, match="has no config.json"):
        read_hf_settings(str(tmp_path))


def test_changed_folder_fails_the_save(mixtral, tmp_path):
    """An OSError, for which --on-save-error has a rule; nothing is left in the checkpoint."""
    folder = shutil.copytree(mixtral, tmp_path / "model")
    (folder / "config.json").unlink()
    checkpoint = tmp_path / "iter_0000003"
    checkpoint.mkdir()
    with pytest.raises(OSError, match="was changed during the run: .* has no config.json"):
        write_origin(str(folder), checkpoint)
    assert not list(checkpoint.iterdir())


def greedy(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """Continue prompts in a rank of the pool with the model of a folder."""
    from megatron.inference.generate import generate
    from megatron.inference.sampling import Sampling
    from megatron.initialize import build_inference_model, initialize_inference

    runs.set_rank_variables()
    run = initialize_inference(folder)
    model = build_inference_model(run)
    assert run.groups.ep_size == run.groups.world_size
    sizes = {"max_new_tokens": 8, "vocab_size": run.tokenizer.vocab_size}
    return generate(model, prompts, sampling=Sampling(temperature=0), **sizes)


def test_inference_programs_take_a_folder(ranks1, ranks2, mixtral):
    """Text generated from the folder is transformers', also with the experts on two ranks."""
    from transformers import AutoModelForCausalLM

    prompt = [72, 101, 108, 111, 9]
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    bounded = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    banned = [[token] for token in range(257, 300)]  # beyond the tokenizer's ids
    output = model.generate(torch.tensor([prompt]), bad_words_ids=banned, **bounded)
    expected = output[0, len(prompt) :].tolist()
    assert ranks1.run(greedy, str(mixtral), [prompt]) == [[expected]]
    assert ranks2.run(greedy, str(mixtral), [prompt]) == [[expected]] * 2
