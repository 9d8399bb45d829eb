"""Statistics of a dense model on text, against naive references."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from helpers import dense_models
from megatron.interop.upcycle.sample_text import read_sample
from megatron.interop.upcycle.statistics import add_importance, collect_activity
from megatron.model.gpt import GPT
from megatron.moe.experts.activations import activate
from megatron.moe.ffn import FFNOutput
from megatron.tokenizer.build import build_tokenizer

LAYERS = [0, 1]


@pytest.fixture(scope="module")
def model() -> GPT:
    return dense_models.build(dense_models.dense_config()).eval()


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(257, (length,), generator=generator) for length in (20, 20, 9)]


class Recorder(torch.nn.Module):
    """A dense layer that is written out and keeps its x and h."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, context=None) -> FFNOutput:
        self.x_SD = x_BSD.detach()[0]
        mlp = self.mlp
        self.h_BSW = activate("swiglu", mlp.gate_proj(x_BSD), mlp.up_proj(x_BSD))
        self.h_BSW.retain_grad()
        return FFNOutput(mlp.down_proj(self.h_BSW))


def reference(model: GPT, tokens_S: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return x, h and dL/dh of each layer."""
    recorded = copy.deepcopy(model)
    for block in recorded.layers:
        block.mlp = Recorder(block.mlp)
    recorded(tokens_S[None, :-1], tokens_S[None, 1:]).lm_loss_sum.backward()
    recorders = [block.mlp for block in recorded.layers]
    return (
        [r.x_SD for r in recorders],
        [r.h_BSW.detach()[0] for r in recorders],
        [r.h_BSW.grad[0] for r in recorders],
    )


def test_inputs_and_active_neurons_are_recorded(model, sequences):
    found = collect_activity(model, sequences, LAYERS, 0.25)
    per_sequence = [reference(model, tokens) for tokens in sequences]
    for layer in LAYERS:
        x_TD = torch.cat([inputs[layer] for inputs, _, _ in per_sequence])
        h_TW = torch.cat([hidden[layer] for _, hidden, _ in per_sequence])
        torch.testing.assert_close(found[layer].x_TD, x_TD)
        threshold_T = h_TW.abs().sort(dim=1, descending=True).values[:, 11]
        expected_TW = h_TW.abs() >= threshold_T[:, None]
        assert torch.equal(found[layer].active(48), expected_TW)
        assert (expected_TW.sum(1) == 12).all()


def test_importance_is_the_mean_of_h_times_gradient(model, sequences):
    activity = collect_activity(model, sequences, LAYERS, 0.25)
    found = add_importance(model, sequences, activity, 3, seed=0)
    per_sequence = [reference(model, tokens) for tokens in sequences]
    for layer in LAYERS:
        h_TW = torch.cat([hidden[layer] for _, hidden, _ in per_sequence])
        grad_TW = torch.cat([gradients[layer] for _, _, gradients in per_sequence])
        cluster_T = found[layer].cluster_T
        assert torch.bincount(cluster_T).max() == 16
        for e in range(3):
            expected_W = (h_TW * grad_TW).abs()[cluster_T == e].mean(0)
            torch.testing.assert_close(
                found[layer].importance_EW[e], expected_W, rtol=1e-4, atol=1e-7
            )


def test_importance_predicts_the_loss_without_neuron(model, sequences):
    """Removing a neuron for one token changes the loss by h dL/dh to first order."""
    tokens_S = sequences[0]
    _, hidden, gradients = reference(model, tokens_S)
    down = model.layers[1].mlp.down_proj
    fraction = 1e-2
    position = 4
    neuron = int((hidden[1] * gradients[1]).abs()[position].argmax())

    def shrink(module, args):
        h = args[0].clone()
        h[0, position, neuron] *= 1 - fraction
        return (h,)

    with torch.no_grad():
        before = model.double()(tokens_S[None, :-1], tokens_S[None, 1:]).lm_loss_sum
        handle = down.register_forward_pre_hook(shrink)
        after = model(tokens_S[None, :-1], tokens_S[None, 1:]).lm_loss_sum
        handle.remove()
    model.float()
    change = (before - after).item() / fraction
    expected = (hidden[1] * gradients[1])[position, neuron].item()
    assert abs(change - expected) < 0.05 * abs(expected)


def test_model_is_left_as_it_was(model, sequences):
    activity = collect_activity(model, sequences, [1], 0.25)
    add_importance(model, sequences, activity, 2, seed=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    down = model.layers[1].mlp.down_proj
    assert not down._forward_pre_hooks
    assert not model.embed_tokens._forward_hooks


def test_tied_model_has_importance_too(sequences):
    config = dense_models.dense_config(untie_embeddings_and_output_weights=False)
    tied = dense_models.build(config).eval()
    activity = collect_activity(tied, sequences, [0], 0.25)
    found = add_importance(tied, sequences, activity, 2, seed=0)
    assert (found[0].importance_EW.sum(1) > 0).all()


@pytest.fixture
def tokenizer():
    return build_tokenizer(dense_models.dense_config().tokenizer)


def test_sample_of_text_is_cut_into_sequences(tmp_path, tokenizer):
    path = dense_models.write_text(tmp_path / "text.jsonl")
    sequences = read_sample(str(path), tokenizer, 100, 32)
    assert [len(tokens) for tokens in sequences] == [33, 33, 33, 5]
    for first, second in zip(sequences, sequences[1:], strict=False):
        assert first[-1] == second[0]
    text = "Document 0: the quick brown fox"
    assert sequences[0][: len(text)].tolist() == tokenizer.encode(text).tolist()


def test_sample_of_tokens_equals_that_of_text(data, tokenizer):
    sequences = read_sample(data, tokenizer, 50, 64)
    assert len(sequences) == 1
    assert tokenizer.decode(sequences[0].tolist()).startswith("document 0: the quick")


def test_documents_end_with_their_token(tmp_path, tokenizer):
    path = dense_models.write_text(tmp_path / "text.jsonl", 1)
    (tokens,) = read_sample(str(path), tokenizer, 10_000, 10_000)
    assert tokens[-1] == tokenizer.eod


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": ""}\n', "allowed: text of two tokens or more"),
        ('{"content": "abc"}\n', "text.jsonl:1: no key 'text'"),
        ('{"text": "abc"}\n\n{"text": 3}\n', "text.jsonl:3: 'text' is a JSON int"),
    ],
)
def test_unusable_text_is_named(tmp_path, tokenizer, content, message):
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    tokenizer.eod = None  # otherwise an empty document has one token
    with pytest.raises(ValueError, match=message):
        read_sample(str(path), tokenizer, 100, 32)


def test_ids_of_another_tokenizer_are_refused(data, tokenizer):
    tokenizer.vocab_size = 50
    with pytest.raises(ValueError, match="--sample-data is .* allowed: ids below 50"):
        read_sample(data, tokenizer, 100, 32)


def test_missing_text_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        read_sample(str(tmp_path / "nothing.jsonl"), tokenizer, 100, 32)
