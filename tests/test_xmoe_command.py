"""XMoE's command line against XMoE's gate formula: the sets of experts are those of its code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers.scripts import config_of, launch_command, run_script
from megatron.moe.gate import create_gate
from megatron.moe.routing import GateInput

RUN = Path(__file__).resolve().parents[1] / "examples_deepspeed/MoE/run.sh"
COMMAND = {"EP_SIZE": "64", "TOPK": "8", "THRESHOLD": "0.9"}
TOKENS = 150
IGNORED = "--topk is 8 (only with another --gate: see --threshold-max-experts)"


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    done = run_script(RUN, cwd=tmp_path_factory.mktemp("xmoe"), DRY_RUN="1", **COMMAND)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def gate_of(printed: str):
    """Build the gate from the flags that the script prints."""
    config = config_of(launch_command(printed))
    return create_gate(
        config.moe.gate,
        hidden_size=config.model.hidden_size,
        num_experts=config.moe.num_experts,
        init_std=config.model.init_method_std,
        seed=config.train.seed,
        **config.gate_options[config.moe.gate],
    )


def xmoe(logits_TE: list[list[float]], threshold: float):
    """Apply XMoE's formula token by token in fp64, without k.

    Returns:
        Chosen probabilities by (token, expert), their ranks, the auxiliary loss with coefficient
        1, and the smallest distance of a running sum from the threshold.
    """
    num_experts = len(logits_TE[0])
    chosen = {}
    rank_of = {}
    margin = 1.0
    sums = [0.0] * num_experts
    first = [0] * num_experts
    for token, logits in enumerate(logits_TE):
        total = sum(math.exp(z) for z in logits)
        probs = [math.exp(z) / total for z in logits]
        order = sorted(range(num_experts), key=lambda e: -probs[e])
        before = 0.0
        for rank, expert in enumerate(order):
            margin = min(margin, abs(before - threshold))
            if rank == 0 or before < threshold:
                chosen[token, expert] = probs[expert]
                rank_of[token, expert] = rank
            before += probs[expert]
            sums[expert] += probs[expert]
        first[order[0]] += 1
    num_tokens = len(logits_TE)
    product = sum(s * f for s, f in zip(sums, first, strict=True))
    return chosen, rank_of, num_experts * product / num_tokens**2, margin


@pytest.mark.parametrize(
    ("scale", "fewest", "most"),
    [(1.0, 45, 60), (8.0, 2, 20), (40.0, 1, 4)],
    ids=["initialisation", "peaked", "very peaked"],
)
def test_command_routes_as_xmoe(scale, fewest, most, printed):
    """Sets, weights, priorities and loss agree, and no token is capped at 8 experts."""
    gate = gate_of(printed)
    assert len(gate.router.weight) == 64
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(TOKENS, gate.router.weight.shape[1], generator=generator) * scale
    logits_TE = x_TD.double() @ gate.router.weight.detach().double().t()
    chosen, rank_of, balance, margin = xmoe(logits_TE.tolist(), 0.9)
    assert margin > 1e-6, "fp32 cannot decide such a token"

    out = gate(GateInput(x_TD))
    pairs = list(zip(out.token_A.tolist(), out.expert_A.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) and set(pairs) == set(chosen)
    assert out.weight_A.tolist() == pytest.approx([chosen[p] for p in pairs], rel=1e-4)
    assert out.aux_loss.item() == pytest.approx(0.01 * balance, rel=1e-4)
    by_priority = [pairs[a] for a in out.priority_A.argsort(descending=True).tolist()]
    ranks = [rank_of[pair] for pair in by_priority]
    assert ranks == sorted(ranks)
    for rank in set(ranks):
        same = [chosen[pair] for pair in by_priority if rank_of[pair] == rank]
        assert same == pytest.approx(sorted(same, reverse=True), rel=1e-5)
    mean = len(pairs) / TOKENS
    assert fewest <= mean <= most
    if scale == 1.0:
        mass_T = torch.zeros(TOKENS).index_add(0, out.token_A, out.weight_A.detach())
        assert mass_T.min() >= 0.9 - 1e-5


def test_command_is_the_recipe_and_logs_topk(printed, tmp_path):
    """TOPK changes nothing but the name of the run, and one log line says so."""
    assert printed.count(IGNORED) == 1 and printed.count("have no effect") == 1
    config = config_of(launch_command(printed))
    without = run_script(RUN, cwd=tmp_path, DRY_RUN="1", PYTHON="/bin/echo")
    plain = config_of(launch_command(without.stdout))
    assert (config.model, config.moe, config.gate_options) == (
        plain.model,
        plain.moe,
        plain.gate_options,
    )
    assert (config.optimizer, config.train) == (plain.optimizer, plain.train)
    assert config.moe.moe_train_capacity_factor == 8.0


def test_max_experts_is_the_cap(tmp_path):
    done = run_script(RUN, cwd=tmp_path, DRY_RUN="1", PYTHON="/bin/echo", MAX_EXPERTS="8")
    gate = gate_of(done.stdout)
    out = gate(GateInput(torch.randn(20, gate.router.weight.shape[1])))
    assert torch.bincount(out.token_A).tolist() == [8] * 20
    assert "--threshold-max-experts 8" in done.stdout and "-t0.9-m8/" in done.stdout
