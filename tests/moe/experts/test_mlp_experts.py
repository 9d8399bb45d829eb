"""The stacked experts as a module: weights, initial values and shards.

The mathematics is tested in test_grouped_mlp.py.
"""

import pytest
import torch

from helpers.reference_mlp import reference_mlp
from helpers.routings import make_routing
from megatron.moe.dispatch.plan import build_dispatch_plan
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.expert_init import ExpertInit, expert_output_std
from megatron.moe.experts.expert_type import ExpertContext, create_experts


def mlp_experts(num_local, hidden, width, activation, **context):
    return create_experts("mlp", ExpertContext(num_local, hidden, width, activation, **context))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_module_passes_weights_to_mlp(activation, backend):
    torch.manual_seed(0)
    init = ExpertInit(init_std=0.5, output_std=0.5)
    experts = mlp_experts(3, 4, 6, activation, init=init, backend=backend).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = torch.rand(4).double()
    assignments = [(0, 2), (1, 0), (1, 2), (4, 0)]
    routing = make_routing([t for t, _ in assignments], [e for _, e in assignments])
    rows = build_dispatch_plan(routing, 5, 3).routed
    y = experts(x, weights[rows.source_index_S], rows)
    stacks = dict(experts.named_parameters())
    assert list(stacks) == (["w1", "w2", "w3"] if is_gated(activation) else ["w1", "w2"])
    torch.testing.assert_close(y, reference_mlp(x, weights, stacks, assignments, activation))


def test_weights_do_not_depend_on_sharding():
    full = mlp_experts(4, 8, 6, "swiglu", init=ExpertInit(seed=3, layer=2))
    shard_init = ExpertInit(seed=3, layer=2, first_expert=2)
    shard = mlp_experts(2, 8, 6, "swiglu", init=shard_init)
    for name in ("w1", "w2", "w3"):
        assert torch.equal(getattr(full, name)[2:], getattr(shard, name))


def test_no_two_experts_start_equal():
    stacks = []
    for seed in (0, 1):
        for layer in (0, 1):
            init = ExpertInit(seed=seed, layer=layer)
            stacks.append(mlp_experts(4, 8, 6, "gelu", init=init).w1)
    flat = torch.cat(stacks).flatten(1)
    assert (torch.pdist(flat) > 1e-3).all()


def test_initial_weights_have_requested_std():
    init = ExpertInit(init_std=0.5, output_std=0.1)
    experts = mlp_experts(8, 64, 64, "gelu", init=init)
    assert experts.w1.std().item() == pytest.approx(0.5, rel=0.05)
    assert experts.w2.std().item() == pytest.approx(0.1, rel=0.05)
    assert expert_output_std(0.02, 8) == pytest.approx(0.005)


def test_meta_device_allocates_nothing():
    with torch.device("meta"):
        assert mlp_experts(64, 1024, 4096, "swiglu").w2.is_meta


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu relu"):
        mlp_experts(2, 4, 6, "tanh")
