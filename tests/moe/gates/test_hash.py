"""Hash gate: a balanced, repeatable table, and no parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.routings import step_totals
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.ffn import FFNContext
from megatron.moe.gate import create_gate, gate_class
from megatron.moe.routing import GateInput
from megatron.parallel.groups import Groups


def make(vocab_size=50, num_experts=4, **where):
    return create_gate(
        "hash", hidden_size=6, num_experts=num_experts, vocab_size=vocab_size, **where
    )


def make_layer(seed=0):
    model = ModelConfig(num_layers=1, hidden_size=6, num_attention_heads=1, ffn_hidden_size=8)
    return make_moe_layer(
        make(),
        model,
        MoEConfig(num_experts=4, gate="hash"),
        layer=0,
        seed=seed,
        groups=Groups(),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 40),
    st.integers(1, 300),
    st.integers(1, 17),
    st.integers(0, 30),
)
def test_gate_matches_formula(seed, layer, vocab, experts, tokens):
    """expert = table[id], weight 1, one per token; counts of ids differ by at most 1."""
    gate = make(vocab, experts, seed=seed, layer=layer)
    table = gate.table_V.tolist()
    sizes = [table.count(e) for e in range(experts)]
    assert len(table) == vocab and max(sizes) - min(sizes) <= 1
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (tokens,), generator=g)
    out = gate(GateInput(torch.randn(tokens, 6, generator=g), ids))
    out.check(tokens, experts)
    assert out.token_A.tolist() == list(range(tokens))
    assert out.expert_A.tolist() == [table[i] for i in ids.tolist()]
    assert out.weight_A.tolist() == [1.0] * tokens and out.aux_loss.item() == 0


def test_table_depends_on_seed_and_layer():
    torch.manual_seed(1)
    a = make(seed=3, layer=2)
    torch.manual_seed(2)
    assert torch.equal(a.table_V, make(seed=3, layer=2).table_V)
    assert not torch.equal(a.table_V, make(seed=3, layer=1).table_V)
    assert not torch.equal(a.table_V, make(seed=4, layer=2).table_V)


def test_hidden_states_do_not_matter():
    """Evaluation equals training."""
    gate, ids = make(), torch.arange(20)
    a, b = (
        gate(GateInput(torch.randn(20, 6), ids)),
        gate.eval()(GateInput(1e4 * torch.randn(20, 6).bfloat16(), ids)),
    )
    assert torch.equal(a.expert_A, b.expert_A) and b.weight_A.dtype == torch.float32


def test_table_is_state_without_parameters():
    a, b = make(seed=1), make(seed=2)
    assert not list(a.parameters()) and a.table_V.dtype == torch.int64
    assert not torch.equal(a.table_V, b.table_V)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.table_V, b.table_V)
    a.post_optimizer_step(step_totals(torch.ones(4), torch.tensor(4.0)))
    assert torch.equal(a.table_V, b.table_V)


def test_experts_and_inputs_get_gradients():
    layer = make_layer()
    x = torch.randn(1, 40, 6, requires_grad=True)
    out = layer(x, FFNContext(torch.arange(40)[None]))
    (out.y.square().sum() + out.aux_loss).backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert (layer.experts.w1.grad.flatten(1).abs().sum(-1) > 0).all()


def test_layer_passes_token_ids():
    layer = make_layer()
    x, ids = torch.randn(2, 8, 6), torch.randint(0, 50, (2, 8))
    layer(x, FFNContext(ids))
    expected = torch.bincount(layer.gate.table_V[ids.flatten()], minlength=4)
    assert layer.counters[True]["assigned_C"].tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [50, 10**6, -1])
def test_id_outside_table_is_an_error(bad):
    """Also -1, which as an index would silently be the last id."""
    with pytest.raises(IndexError, match="out of range"):
        make()(GateInput(torch.zeros(2, 6), torch.tensor([0, bad])))


def test_meta_device_and_experts_per_token():
    with torch.device("meta"):
        assert make().table_V.is_meta
    assert gate_class("hash").experts_per_token(gate_class("hash").Config(), 8) == (1, 1)


def test_missing_vocab_or_ids_are_refused():
    with pytest.raises(
        ValueError, match="--gate is hash and vocab_size is None; allowed: .* pass vocab_size="
    ):
        create_gate("hash", hidden_size=6, num_experts=4)
    with pytest.raises(
        ValueError, match="--gate is hash and the layer received no token ids; .*token_ids_BS"
    ):
        make()(GateInput(torch.zeros(3, 6)))
    with pytest.raises(ValueError, match="no token ids"):
        make_layer()(torch.zeros(1, 3, 6))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 200),
    st.integers(2, 9),
    st.integers(1, 9),
    st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    st.booleans(),
    st.booleans(),
)
def test_several_experts_match_formula(seed, vocab, experts, k, function, learned, norm):
    """k different experts per id, balanced up to k ids; weights 1 / k, or from the scores."""
    k = min(k, experts)
    options = {"topk": k, "learned_weights": learned, "score_function": function}
    options |= {"norm_topk_prob": norm, "routed_scaling_factor": 1.5}
    gate = make(vocab, experts, seed=seed, init_std=0.8, **options)
    table = gate.table_V.view(vocab, k).tolist()
    sizes = [sum(row.count(e) for row in table) for e in range(experts)]
    assert all(len(set(row)) == k for row in table) and max(sizes) - min(sizes) <= k
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (6,), generator=g)
    x = torch.randn(6, 6, generator=g)
    out = gate(GateInput(x, ids))
    out.check(6, experts)
    assert out.expert_A.view(6, k).tolist() == [table[i] for i in ids.tolist()]
    for t in range(6):
        weights = [1 / k] * k
        if learned:
            z = (gate.router.weight.double() @ x[t].double()).tolist()
            s = [math.exp(v) / sum(map(math.exp, z)) for v in z]
            if function != "softmax":
                s = [1 / (1 + math.exp(-v)) for v in z]
            if function == "sqrtsoftplus":
                s = [math.sqrt(math.log1p(math.exp(v))) for v in z]
            chosen = [s[e] for e in table[ids[t]]]
            weights = [1.5 * v / (sum(chosen) if norm and k > 1 else 1) for v in chosen]
        assert out.weight_A.view(6, k)[t].tolist() == pytest.approx(weights, rel=1e-5)


def test_learned_weights_train_the_router():
    gate = make(topk=2, learned_weights=True, norm_topk_prob=True)
    ids = torch.arange(50)
    weight_A = gate(GateInput(torch.randn(50, 6), ids)).weight_A
    torch.testing.assert_close(weight_A.view(50, 2).sum(1), torch.ones(50))
    weight_A[::2].sum().backward()
    assert (gate.router.weight.grad.abs().sum(1) > 0).all()


def test_one_expert_has_the_same_table_with_weights():
    """A stored table does not depend on the other options, and sets of experts differ."""
    plain = make()
    learned = make(learned_weights=True)
    assert torch.equal(plain.table_V, learned.table_V)
    pairs = make(vocab_size=1000, num_experts=16, topk=2).table_V.sort(-1).values
    assert len(pairs.unique(dim=0)) > 60, "of 120 possible ones"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topk": 0}, "--topk is 0; allowed: 1 to the number of experts"),
        ({"topk": 5}, "--topk is 5; allowed: 1 to the number of experts, which is 4"),
        (
            {"score_function": "tanh"},
            "--score-function is 'tanh'; allowed: softmax sigmoid sqrts",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
