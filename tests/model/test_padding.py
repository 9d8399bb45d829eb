"""Padding is never routed and counts nowhere, and losses per sequence count documents.

The same documents are given packed into one sample, padded to one length, and one by one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.moe_layers import D, make_carry, make_input, make_layer
from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.data.loader import Batch
from megatron.engine.loss import term_weights
from megatron.model.builder import build_model
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.gate import available_gates, gate_class
from megatron.moe.gate_update import GateUpdater
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups
from megatron.training.task import AUX_LOSS, LM_LOSS, NextTokenLoss

ALL = available_gates()
V = 40
LENGTHS = (3, 5, 1, 4)
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    seq_length=16,
    swiglu=True,
    init_method_std=0.3,
)


def options_of(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(gate_class(name).Config)}


def balance_only(name: str) -> dict[str, float]:
    """Options that turn off all losses but those that `LoadBalancingLoss` computes.

    The others are means over tokens, or do not depend on tokens (dynmoe).
    """
    balance = ("loss_coeff", "device_loss_coeff", "communication_loss_coeff")
    others = [option for option in options_of(name) if option.endswith("_coeff")]
    return {option: 0.0 for option in others if option not in balance}


WITH_SCOPE = [name for name in ALL if "balance_scope" in options_of(name)]


def make(gate: str, recompute: bool = False, capacity: float = 0.0, **options):
    """A model whose balance losses, where the gate has any, are far above rounding."""
    large = {"loss_coeff": 0.5, "z_loss_coeff": 0.01, "lambda_init": 0.5}
    options = {key: large[key] for key in large if key in options_of(gate)} | options
    moe = MoEConfig(
        num_experts=4,
        gate=gate,
        moe_ffn_hidden_size=8,
        moe_train_capacity_factor=capacity,
        moe_min_capacity=1,
    )
    return build_model(
        MODEL, moe, {gate: options}, vocab_size=V, seed=1, groups=Groups(), recompute=recompute
    )


def documents() -> list[Batch]:
    """Documents of LENGTHS tokens, each as a batch of its own."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for length in LENGTHS:
        tokens_BS1 = torch.randint(0, V, (1, length + 1), generator=g)
        mask_BS = torch.ones(1, length)
        batches.append(Batch(tokens_BS1[:, :-1], tokens_BS1[:, 1:], mask_BS))
    return batches


def packed(parts: list[Batch]) -> Batch:
    """The documents one after the other in one sample."""
    positions = [torch.arange(len(part.tokens_BS[0])) for part in parts]
    segments = [torch.full_like(p, n) for n, p in enumerate(positions)]
    return Batch(
        *(
            torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("tokens_BS", "labels_BS", "loss_mask_BS")
        ),
        position_ids_BS=torch.cat(positions)[None],
        segments_BS=torch.cat(segments)[None],
    )


def padded(parts: list[Batch], length: int = 6) -> Batch:
    """One document per sample and one sample of nothing but padding, which has a loss mask of 1
    and token ids that the hash gate would refuse if it saw them."""
    tokens_BS = torch.full((len(parts) + 1, length), V - 1)
    labels_BS = torch.zeros_like(tokens_BS)
    padding_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    for row, part in enumerate(parts):
        size = part.tokens_BS.shape[1]
        tokens_BS[row, :size] = part.tokens_BS[0]
        labels_BS[row, :size] = part.labels_BS[0]
        padding_BS[row, :size] = False
    return Batch(tokens_BS, labels_BS, torch.ones(tokens_BS.shape), padding_BS=padding_BS)


def step(model, batch: Batch) -> dict[str, torch.Tensor | None]:
    """Train on one micro-batch.

    Returns:
        Losses, gradients, all counters, and the gates' state after the step, by name.
    """
    task = NextTokenLoss()
    sums = task.loss_sums(model, batch, 0.5)
    normalizers = task.normalizers(batch)
    loss = sum(sums[name] / normalizers[name] for name in (LM_LOSS, AUX_LOSS))
    loss.backward()
    result = {f"loss {name}": value.detach() for name, value in sums.items()}
    result |= {f"normalizer {name}": value for name, value in normalizers.items()}
    result |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    for i, layer in enumerate(find_moe_layers(model)):
        result |= {f"{i} step {name}": t for name, t in layer.step_sums.items()}
        result |= {f"{i} counter {name}": t for name, t in layer.counters[True].items()}
    GateUpdater(model, Groups()).post_optimizer_step()
    return result | {f"buffer {name}": b for name, b in model.named_buffers()}


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            continue
        torch.testing.assert_close(
            got[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("capacity", [0.0, 0.6], ids=["dropless", "capacity"])
def test_packed_equals_padded(name, capacity):
    """Losses, gradients by name, loads, drops, experts per token and the gates' state."""
    parts = documents()
    expected = step(make(name, capacity=capacity), packed(parts))
    got = step(make(name, capacity=capacity), padded(parts))
    assert got["0 counter tokens"] == sum(LENGTHS)
    assert got[f"normalizer {LM_LOSS}"] == sum(LENGTHS)
    assert got["0 counter experts_per_token_histogram"].sum() == sum(LENGTHS)
    assert_equal(got, expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "moepp", "threshold", "peer"])
def test_recompute_of_padded_batch(name):
    parts = documents()
    expected = step(make(name), padded(parts))
    assert_equal(step(make(name, recompute=True), padded(parts)), expected)


@pytest.mark.parametrize("name", WITH_SCOPE)
@pytest.mark.parametrize("form", [packed, padded])
def test_sequence_losses_count_documents(name, form):
    """The balance loss is the mean over the documents, each run by itself, and so are the
    gradients."""
    options = {"balance_scope": "sequence", **balance_only(name)}
    if "n_group" in options_of(name):
        options["n_group"] = 2
    parts = documents()
    together = make(name, **options)
    got = step(together, form(parts))
    apart = make(name, **options)
    aux_losses = []
    for part in parts:
        alone = apart(part.tokens_BS, part.labels_BS)
        (alone.lm_loss_sum / sum(LENGTHS) + alone.aux_loss / len(parts)).backward()
        aux_losses.append(alone.aux_loss.item())
    mean = sum(aux_losses) / len(parts)
    assert got[f"loss {AUX_LOSS}"].item() == pytest.approx(mean, rel=1e-5)
    expected = {f"grad {n}": p.grad for n, p in apart.named_parameters()}
    assert_equal({n: grad for n, grad in got.items() if n.startswith("grad ")}, expected)
    whole_batch = make(name, **options | {"balance_scope": "micro-batch"})
    other = step(whole_batch, form(parts))[f"loss {AUX_LOSS}"].item()
    assert other != pytest.approx(mean, rel=1e-3), "the scopes must differ here"


def test_padding_of_false_changes_nothing():
    batch = packed(documents())
    none = torch.zeros_like(batch.tokens_BS, dtype=torch.bool)
    got = step(make("deepseek_v3"), dataclasses.replace(batch, padding_BS=none))
    expected = step(make("deepseek_v3"), batch)
    for name, value in expected.items():
        assert value is None or torch.equal(got[name], value), name


def test_micro_batch_of_padding_is_no_mean():
    """It has no weight in the mean over micro-batches of either loss term."""
    batch = padded(documents())
    task = NextTokenLoss()
    only_padding = dataclasses.replace(
        batch, padding_BS=torch.ones_like(batch.tokens_BS, dtype=torch.bool)
    )
    normalizers = [task.normalizers(b) for b in (batch, only_padding)]
    assert normalizers[1] == {LM_LOSS: 0, AUX_LOSS: 0}
    weights = term_weights(normalizers, Groups())
    assert weights == [{LM_LOSS: 2, AUX_LOSS: 2}, {LM_LOSS: 0, AUX_LOSS: 0}]
    for name in ALL:
        sums = task.loss_sums(make(name, **balance_only(name)), only_padding, 0.5)
        assert sums == {LM_LOSS: 0, AUX_LOSS: 0}
    model = make("topk", simbal_coeff=0.5)
    assert model(only_padding.tokens_BS, padding_BS=only_padding.padding_BS).aux_loss > 0.1
    assert task.loss_sums(model, only_padding, 0.5) == {LM_LOSS: 0, AUX_LOSS: 0}


class CountNonzero(TorchDispatchMode):
    """Counts calls of `nonzero`, each of which waits for the device."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "nonzero" in function.name()
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_padding_is_located_once():
    """Both MoE layers use the same rows; without padding nothing waits for the device."""
    model = make("topk")
    batch = padded(documents())
    for padding_BS, calls in ((None, 0), (batch.padding_BS, 1)):
        with CountNonzero() as counted:
            model(batch.tokens_BS, padding_BS=padding_BS)
        assert counted.calls == calls


@torch.no_grad()
def test_wrong_padding_is_refused():
    model = make("topk")
    tokens_BS = torch.zeros(2, 3, dtype=torch.int64)
    for padding in (torch.zeros(3, dtype=torch.bool), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"padding_BS is .*; allowed: torch.bool \[2, 3\]"):
            model(tokens_BS, padding_BS=padding)
    gate = find_moe_layers(model)[0].gate
    with pytest.raises(AssertionError, match=r"padding_T has shape \(2,\), x_TD has 3 rows"):
        gate(GateInput(torch.zeros(3, 16), padding_T=torch.zeros(2, dtype=torch.bool)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [9, 1, 0])
def test_gate_never_sees_padding(name, tokens):
    """Its routing is that of the other rows alone, whatever padding holds."""
    gate = make_layer(name, layer=1).gate
    x, ids = make_input(tokens)
    carry = make_carry(gate, tokens)
    sequence = torch.arange(tokens) // 4
    expected = gate(GateInput(x[0], ids[0], sequence, carry, num_sequences=9))
    place_R = torch.arange(tokens) * 2 + 1
    padding = torch.ones(2 * tokens + 2, dtype=torch.bool)
    padding[place_R] = False
    x_TD = torch.full((len(padding), D), float("nan"))
    ids_T = torch.full((len(padding),), -1)
    sequence_T = torch.full((len(padding),), 8)
    for full, part in ((x_TD, x[0]), (ids_T, ids[0]), (sequence_T, sequence)):
        full[place_R] = part
    for unpadded_R in (None, place_R):
        got = gate(GateInput(x_TD, ids_T, sequence_T, carry, 0.0, 9, padding, unpadded_R))
        num_choices = gate.num_experts + len(gate.zero_computation_experts)
        got.check(len(padding), num_choices, num_logits=tokens)
        assert torch.equal(got.token_A, place_R[expected.token_A])
        assert torch.equal(got.expert_A, expected.expert_A)
        assert torch.equal(got.weight_A, expected.weight_A)
        assert torch.equal(got.aux_loss, expected.aux_loss)
        assert got.carry is None or torch.equal(got.carry, expected.carry)
        for means in ("metric_means", "metric_sums"):
            theirs = getattr(got, means)
            assert theirs.keys() == getattr(expected, means).keys()
            assert all(torch.equal(theirs[n], v) for n, v in getattr(expected, means).items())


def _layer_with_padding(name, ep_size, padding_by_rank):
    """Output, input gradient and parameter gradients of this rank's [2, 6, D]."""
    groups = groups_for(ep_size)
    layer = make_layer(name, groups, layer=1, options=balance_only(name))
    x, ids = make_input(12, seed=groups.rank)
    x = x.view(2, 6, D).requires_grad_()
    padding_BS = padding_by_rank[groups.rank]
    carry = make_carry(layer.gate, 12)[padding_BS.flatten().logical_not()]
    context = FFNContext(ids.view(2, 6), carry, layout=TokenLayout(padding_BS))
    out = layer(x, context)
    (out.y.square().sum() + out.aux_loss).backward()
    grads = {}
    for n, p in layer.named_parameters():
        grads[n] = torch.zeros_like(p) if p.grad is None else p.grad
    return out.y.detach(), x.grad, grads, layer.step_sums["tokens"].item()


@pytest.mark.parametrize("name", ALL)
def test_rank_with_only_padding(name, ranks2):
    """Rank 1 has no token at all, and still takes part in the exchange of experts' rows."""
    some = torch.zeros(2, 6, dtype=torch.bool)
    some[0, 2:] = True
    masks = [some, torch.ones_like(some)]
    (y, dx, grads, tokens), (y1, dx1, grads1, tokens1) = ranks2.run(
        _layer_with_padding, name, 2, masks
    )
    assert (tokens, tokens1) == (8, 0)
    assert not y[some].any() and not dx[some].any() and not y1.any() and not dx1.any()
    layer = make_layer(name, layer=1, options=balance_only(name))
    x, ids = make_input(12)
    kept = some.flatten().logical_not()
    rows = x[:, kept].requires_grad_()
    sequences = TokenLayout(None, torch.tensor([[0] * 2 + [1] * 6]), 2)
    context = FFNContext(ids[:, kept], make_carry(layer.gate, 12)[kept], layout=sequences)
    out = layer(rows, context)
    (out.y.square().sum() + out.aux_loss).backward()
    close = {"atol": 5e-5, "rtol": 1e-4}
    torch.testing.assert_close(y[~some], out.y[0].detach(), **close)
    torch.testing.assert_close(dx[~some], rows.grad[0], **close)
    for n, p in layer.named_parameters():
        both = grads[n] + grads1[n]
        if n.startswith("experts."):
            both = torch.cat([grads[n], grads1[n]])
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(both, expected, msg=lambda m, n=n: f"{n}: {m}", **close)
