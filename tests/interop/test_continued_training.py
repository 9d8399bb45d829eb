"""Training from a Hugging Face folder does what training in transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import runs
from helpers.hf_folders import EXPERTS, SIZES, save_tokenizer
from helpers.hf_models import new_hf_model
from megatron.checkpoint.consolidate import find_verified_checkpoint
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.model.gpt import GPT

pytest.importorskip("transformers", reason="the reference implementations are not installed")

STEPS = 3
LEARNING_RATE = 1e-3
EPSILON = 1e-3
"""Large, so that rounding of a small gradient does not become a step of full size"""


def recorded_train(argv: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Train in a rank of the pool; return the tokens and labels of each batch."""
    batches = []
    forward = GPT.forward

    def recording_forward(model, tokens_BS, labels_BS=None, *args, **options):
        batches.append((tokens_BS.clone(), labels_BS.clone()))
        return forward(model, tokens_BS, labels_BS, *args, **options)

    GPT.forward = recording_forward
    try:
        runs.train(argv)
    finally:
        GPT.forward = forward
    return batches


def flags(folder: Path, out: Path) -> list[str]:
    return [
        *("--init-from-hf", str(folder), "--mock-data", "--seq-length", "16"),
        *("--micro-batch-size", "4", "--global-batch-size", "4"),
        *("--train-iters", str(STEPS), "--lr", str(LEARNING_RATE)),
        *("--lr-decay-style", "constant", "--adam-eps", str(EPSILON)),
        *("--adam-beta1", "0.9", "--adam-beta2", "0.95"),
        *("--weight-decay", "0", "--clip-grad", "0", "--eval-iters", "0"),
        *("--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")),
    ]


def train_theirs(model: nn.Module, batches, coefficient: float) -> None:
    """Train a model of transformers by torch's AdamW, with its own balance loss."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0
    )
    for tokens_BS, labels_BS in batches:
        output = model(tokens_BS, output_router_logits=True)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels_BS.flatten())
        loss = loss + coefficient * output.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "model_type, layers, coefficient",
    [("mixtral", 1, 0.5), ("qwen2_moe", 1, 0.5), ("olmoe", 2, 0.0)],
)
def test_steps_equal_transformers(ranks1, tmp_path, model_type, layers, coefficient):
    """At one layer the balance loss is the same, with the coefficient of config.json."""
    keys = {"num_hidden_layers": layers, "router_aux_loss_coef": coefficient}
    keys["pad_token_id"] = None  # transformers does not train this token's embedding
    model = new_hf_model(model_type, **{**SIZES, **EXPERTS[model_type], **keys})
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    before = load_file(folder / "model.safetensors")
    (batches,) = ranks1.run(recorded_train, flags(folder, tmp_path))
    assert len(batches) == STEPS
    train_theirs(model, batches, coefficient)
    model.save_pretrained(tmp_path / "theirs")
    source = find_verified_checkpoint(tmp_path / "checkpoints")
    convert_to_hf(source, tmp_path / "ours", ExportOptions())
    ours = load_file(tmp_path / "ours/model.safetensors")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor - before[name]).abs().max() > 1e-4, name
        assert (ours[name] - tensor).abs().max() < 1e-5, name
