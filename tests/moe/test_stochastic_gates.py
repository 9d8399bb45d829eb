"""Gates that draw random numbers in training: recomputation, evaluation, and ranks."""

from __future__ import annotations

import pytest
import torch

from helpers import engines
from helpers.outside_gates import restored_registry
from helpers.spawn import groups_for
from megatron.config.schema import MoEConfig
from megatron.model.builder import build_model
from megatron.moe import Gate, GateInput, Routing, create_gate, linear_fp32
from megatron.moe.gate import available_gates, gate_class
from megatron.parallel import rng
from megatron.parallel.groups import Groups


def noisy_gate():
    """Register a gate that adds Gumbel noise to its logits in training."""

    class NoisyGate(Gate, name="outside_noisy"):
        stochastic = True

        def __init__(self, config, context):
            super().__init__(config, context)
            self.router = self.make_router()

        def forward(self, inp: GateInput) -> Routing:
            logits_TE = linear_fp32(inp.x_TD, self.router)
            if self.training:
                logits_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
            weight_T, expert_T = logits_TE.softmax(-1).max(-1)
            token_T = torch.arange(len(expert_T))
            return Routing(token_T, expert_T, weight_T, logits_TE.square().mean())


@pytest.fixture
def noisy():
    with restored_registry():
        noisy_gate()
        yield


def test_recomputation_repeats_random_numbers(noisy):
    """Gradients with and without recomputation are equal, with the same seed."""
    moe = MoEConfig(num_experts=4, gate="outside_noisy", moe_ffn_hidden_size=8)
    gradients = []
    losses = set()
    for recompute in (False, True):
        model = build_model(
            engines.MODEL, moe, {}, vocab_size=61, seed=7, groups=Groups(), recompute=recompute
        )
        tokens_BS = torch.arange(16).view(2, 8)
        torch.manual_seed(5)
        loss = model(tokens_BS, tokens_BS).loss
        loss.backward()
        losses.add(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(losses) == 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_evaluation_is_deterministic(noisy):
    """It draws no random numbers; training does, and follows the seed."""
    gate = create_gate("outside_noisy", hidden_size=8, num_experts=4)
    inp = GateInput(torch.randn(50, 8))
    first = gate(inp).expert_A
    assert not torch.equal(gate(inp).expert_A, first)
    gate.eval()
    state = torch.get_rng_state()
    assert torch.equal(gate(inp).expert_A, gate(inp).expert_A)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", available_gates())
def test_other_gates_draw_no_numbers(name):
    """Built-in gates with their default options draw none, and say so."""
    gate = create_gate(name, hidden_size=8, num_experts=4, vocab_size=50, num_moe_layers=1)
    inp = GateInput(torch.randn(6, 8), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    state = torch.get_rng_state()
    gate(inp)
    assert torch.equal(torch.get_rng_state(), state) or gate_class(name).stochastic


def choices_of_rank():
    """Return the experts that the noisy gate chooses in a rank for fixed tokens."""
    with restored_registry():
        noisy_gate()
        gate = create_gate("outside_noisy", hidden_size=8, num_experts=4)
        rng.seed_rank(3, groups_for(1).rank)
        x_TD = torch.ones(50, 8)
        return gate(GateInput(x_TD)).expert_A.tolist()


def test_ranks_draw_different_numbers(ranks2):
    first, second = ranks2.run(choices_of_rank)
    assert first != second
    assert ranks2.run(choices_of_rank) == [first, second]
