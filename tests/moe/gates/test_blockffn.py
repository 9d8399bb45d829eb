"""BlockFFN: weights after the RMSNorm, losses over neighbours, and the adaptive lambda."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.routings import step_totals
from megatron.moe.gate import create_gate
from megatron.moe.neighbour_losses import chunk_loss, continues_sequence, locality_loss
from megatron.moe.routing import GateInput


def make_gate(**options):
    defaults = {"hidden_size": 4, "num_experts": 4, "init_std": 0.8}
    return create_gate("blockffn", **{**defaults, **options})


def reference_losses(z, sequences, alpha, chunk_length):
    """The two losses by their definitions: a pair and a chunk at a time."""
    E = z.shape[1]
    pairs, chunks = [], []
    for mine in sequences:
        for t, u in zip(mine, mine[1:]):
            for e in range(E):
                target = 1 / (1 + torch.exp(-alpha * z[u, e]))
                prediction = 1 / (1 + torch.exp(-alpha * z[t, e]))
                pairs.append(
                    -target * torch.log(prediction) - (1 - target) * torch.log(1 - prediction)
                )
        for start in range(0, len(mine), chunk_length):
            for e in range(E):
                unused = 1.0
                for t in mine[start : start + chunk_length]:
                    a = [torch.relu(z[t, i]) for i in range(E)]
                    if sum(v.item() for v in a) > 0:
                        unused = unused * (1 - a[e] / sum(a))
                chunks.append(1 - unused)
    locality = sum(pairs) / len(pairs) if pairs else z.sum() * 0
    return locality, sum(chunks) / len(chunks)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 4))
def test_gate_matches_formula(seed, experts, chunk_length):
    """Experts, weights, the losses of two sequences, and all gradients."""
    gate = make_gate(
        seed=seed,
        num_experts=experts,
        chunk_length=chunk_length,
        chunk_coeff=0.7,
        locality_coeff=0.4,
        locality_sharpness=2.0,
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.norm_weight_E.copy_(torch.randn(experts, generator=g))
    x = torch.randn(7, 4, generator=g).requires_grad_()
    leaves = (x, gate.router.weight, gate.norm_weight_E)
    x64, W64, g64 = wide = [t.detach().double().requires_grad_() for t in leaves]
    z = x64 @ W64.t()
    if z.abs().min() < 1e-4:
        return
    locality, chunk = reference_losses(z, [[0, 1, 2, 3, 4], [5, 6]], 2.0, chunk_length)
    aux = 0.4 * locality + 0.7 * chunk
    expected = {}
    for t in range(7):
        a = [torch.relu(z[t, e]) for e in range(experts)]
        rms = torch.sqrt(sum(v * v for v in a) / experts + 1e-6)
        for e in range(experts):
            if a[e].item() > 0:
                expected[t, e] = g64[e] * a[e] / rms
    sequence_T = torch.tensor([0] * 5 + [1] * 2)
    out = gate(GateInput(x, sequence_T=sequence_T, num_sequences=2))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist()))
    assert sorted(pairs) == sorted(expected)
    assert out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-4, abs=1e-6)
    num_chunks = -(-5 // chunk_length) + -(-2 // chunk_length)
    assert out.metric_sums["chunks"] == num_chunks
    want_A = torch.stack([expected[pair] for pair in pairs]) if pairs else z[:0, 0]
    torch.testing.assert_close(out.weight_A.double(), want_A, rtol=1e-4, atol=1e-5)
    pull_A = torch.randn(len(pairs), generator=g)
    got = torch.autograd.grad((out.weight_A * pull_A).sum() + out.aux_loss, leaves)
    want = torch.autograd.grad((want_A * pull_A).sum() + aux, wide, allow_unused=True)
    for a, b in zip(got, want):
        b = torch.zeros_like(a).double() if b is None else b
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_losses_at_their_extremes():
    """One expert for all tokens: 1 / E used per chunk and no locality loss; neighbours
    that share nothing use L experts and pay the full cross-entropy."""
    same = torch.full((8, 4), -1.0)
    same[:, 0] = 1.0
    follows_T = continues_sequence(GateInput(torch.zeros(8, 2)))
    assert follows_T.tolist() == [False] + [True] * 7
    assert locality_loss(same, follows_T, 100.0).item() == pytest.approx(0, abs=1e-6)
    total, num_chunks = chunk_loss(same.relu(), follows_T, 4)
    assert num_chunks == 2 and total.item() / 2 == pytest.approx(1 / 4, abs=1e-4)
    apart = torch.full((8, 4), -1.0)
    apart[torch.arange(8), torch.arange(8) % 4] = 1.0
    total, num_chunks = chunk_loss(apart.relu(), follows_T, 4)
    assert total.item() / 2 == pytest.approx(1, abs=1e-4)
    assert locality_loss(apart, follows_T, 100.0).item() == pytest.approx(50)
    alone = torch.zeros(8, dtype=torch.bool)
    assert locality_loss(apart, alone, 100.0) == 0 and chunk_loss(apart, alone, 4)[1] == 8


def test_losses_without_tokens():
    empty = torch.zeros(0, 4, requires_grad=True)
    follows_T = continues_sequence(GateInput(torch.zeros(0, 2)))
    total, num_chunks = chunk_loss(empty, follows_T, 4)
    assert total == 0 and num_chunks == 0 and locality_loss(empty, follows_T, 1.0) == 0


def test_losses_survive_huge_logits():
    """Shares of exactly 1 and sharp sigmoids give finite losses and gradients."""
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    z.requires_grad_()
    follows_T = continues_sequence(GateInput(torch.zeros(9, 2)))
    loss = chunk_loss(z.relu(), follows_T, 4)[0] + locality_loss(z, follows_T, 100.0)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def steps_of(gate, losses):
    """Optimizer steps with these chunk losses, over two chunks each; lambda after each."""
    history = []
    for loss in losses:
        sums = {"chunk_loss": torch.tensor(2 * loss).double(), "chunks": torch.tensor(2.0)}
        gate.post_optimizer_step(step_totals(torch.zeros(4), torch.tensor(8.0), **sums))
        history.append(gate.chunk_lambda.item())
    return history


def test_lambda_follows_the_chunk_loss():
    """Constant in the warm-up; then it falls with the loss, and grows at least by 2.5 %
    and at most four times when the loss grows, once per interval."""
    gate = make_gate(chunk_coeff=1.0, chunk_interval=2, chunk_warmup_steps=4)
    means = [0.4, 0.5, 0.4, 0.4, 0.404, 4.0]
    losses = [value for mean in means for value in (mean - 0.1, mean + 0.1)]
    expected, value = [], 1.0
    for i, mean in enumerate(means):
        expected.append(value)
        if i >= 2:
            ratio = mean / means[i - 1]
            value *= min(4.0, max(1.025, ratio)) if ratio > 1.001 else ratio
        expected.append(value)
    assert steps_of(gate, losses) == pytest.approx(expected, rel=1e-4)
    names = ("chunk_lambda", "num_steps", "window_sum", "previous_mean")
    buffers = dict(gate.named_buffers())
    assert sorted(buffers) == sorted(names)
    assert all(b.dtype == torch.float32 and b.dim() == 0 for b in buffers.values())


def test_lambda_constant_without_interval():
    gate = make_gate(chunk_interval=0, chunk_warmup_steps=0)
    assert steps_of(gate, [0.5, 0.1, 0.9]) == pytest.approx([0.05] * 3)
    never_used = make_gate(chunk_interval=1, chunk_warmup_steps=0)
    assert steps_of(never_used, [0.0, 0.0, 0.3]) == pytest.approx([0.05] * 3)


def test_losses_make_routing_sparse():
    """Trained with the losses alone, fewer experts are used in a chunk than without."""
    used = {}
    for coeff in (0.0, 1.0):
        gate = make_gate(num_experts=8, chunk_coeff=coeff, chunk_length=4, locality_coeff=coeff)
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 1
        optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
        for _ in range(50):
            out = gate(GateInput(x))
            optimizer.zero_grad()
            (out.aux_loss + 0 * out.weight_A.sum()).backward()
            optimizer.step()
        used[coeff] = gate.summarise(gate(GateInput(x)).metric_sums)["used_per_chunk_fraction"]
    assert used[1.0] < 0.8 * used[0.0]


def test_normalisation_separates_magnitude():
    """The weights do not depend on the scale of x: their mean square is g^2."""
    gate = make_gate()
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    a, b = gate(GateInput(x)), gate(GateInput(100 * x))
    torch.testing.assert_close(a.weight_A, b.weight_A, rtol=1e-3, atol=1e-3)
    dense = torch.zeros(30, 4).index_put((b.token_A, b.expert_A), b.weight_A)
    used_T = dense.any(-1)
    torch.testing.assert_close(
        dense.square().mean(-1)[used_T], torch.ones(int(used_T.sum())), rtol=1e-3, atol=1e-3
    )
    assert gate.experts_per_token(gate.config, 4) == (0, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"locality_coeff": -1.0}, "--locality-coeff is -1.0; allowed: 0 or more"),
        ({"chunk_coeff": -1.0}, "--chunk-coeff is -1.0; allowed: 0 or more"),
        ({"locality_sharpness": 0.0}, "--locality-sharpness is 0.0; allowed: above 0"),
        ({"chunk_length": 0}, "--chunk-length is 0; allowed: 1 or more"),
        ({"chunk_interval": -1}, "--chunk-interval is -1; allowed: 0 .constant. or more"),
        ({"chunk_warmup_steps": -1}, "--chunk-warmup-steps is -1; allowed: 0 or more"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_gate(**options)
