"""Query statistics of PEER where fp32 sums would lose them: queries of 30 +- 0.01."""

import torch

from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.model.builder import make_moe_layer
from megatron.moe.gate import create_gate
from megatron.moe.gate_update import GateUpdater
from megatron.parallel.groups import Groups


def make_layer_of_queries(groups):
    """Return a gate and a function that runs one step of a layer whose tokens are queries."""
    gate = create_gate(
        "peer",
        hidden_size=12,
        num_experts=12,
        peer_num_heads=1,
        peer_topk=3,
        peer_query_size=12,
    )
    torch.nn.init.eye_(gate.query.weight)
    model = ModelConfig(num_layers=1, hidden_size=12, num_attention_heads=1)
    moe = MoEConfig(num_experts=12, gate="peer", moe_ffn_hidden_size=1)
    layer = make_moe_layer(gate, model, moe, layer=0, seed=0, groups=groups)
    gate_updater = GateUpdater(layer, groups)

    def step(*batches):
        for x in batches:
            layer(x[None])
        gate_updater.post_optimizer_step()

    return gate, step


def draw(step, rank, micro_batch):
    """Draw means that differ between ranks, micro-batches and steps as much as tokens do."""
    shift = 30 + 0.01 * (step + 2 * rank + micro_batch)
    g = torch.Generator().manual_seed(100 * step + 10 * rank + micro_batch)
    return torch.randn(200 + 10 * rank, 12, generator=g) * 0.01 + shift


def pooled(steps, ranks):
    """Return mean and variance of all tokens of the steps, weighted by age, in fp64."""
    means, squares = [], []
    for step in range(steps):
        q = torch.cat([draw(step, rank, m) for rank in range(ranks) for m in range(2)]).double()
        means.append(q.mean(0))
        squares.append(q.square().mean(0))
    ages = [0.9**age for age in range(steps - 1, -1, -1)]
    mean, square = (
        sum(a * v for a, v in zip(ages, values)) / sum(ages) for values in (means, squares)
    )
    return mean, square - mean**2


def assert_moments(gate, steps, ranks):
    mean, variance = pooled(steps, ranks)
    torch.testing.assert_close(gate.query_mean[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(gate.query_variance[0].double(), variance, rtol=1e-3, atol=0)
    assert gate.query_mean.dtype == gate.query_variance.dtype == torch.float32


def test_variance_far_from_zero():
    """Catches E[q^2] - E[q]^2 in fp32, where 900 hides a variance of 0.0001.

    The error may arise within one step or in the buffers over several steps.
    """
    gate, step = make_layer_of_queries(Groups())
    for i in range(4):
        step(draw(i, 0, 0), draw(i, 0, 1))
        assert_moments(gate, i + 1, ranks=1)
    normal = gate.normalise(draw(4, 0, 0)[:, None])
    assert 0.3 < normal.std() < 1 and normal.abs().max() < 8


def _two_steps():
    groups = groups_for(1)
    gate, step = make_layer_of_queries(groups)
    for i in range(2):
        step(*[draw(i, groups.rank, m) for m in range(2)])
    assert_moments(gate, 2, ranks=2)
    return dict(gate.named_buffers())


def test_statistics_cover_all_ranks(ranks2):
    a, b = ranks2.run(_two_steps)
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) == 3
