"""The text for a prompt is the same alone, with other prompts, in any order, on 1 and 2 ranks.

For every gate, with a capacity factor in the run's configuration. Token lists are compared:
the batch's size may change the last bit of a logit, so the models here have logits whose two
largest are far apart compared with rounding.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from helpers.spawn import groups_for
from megatron.config.schema import ModelConfig, MoEConfig
from megatron.inference import generate as generation
from megatron.inference import sampling
from megatron.inference.generate import generate
from megatron.inference.sampling import Sampling
from megatron.model.builder import build_model
from megatron.model.gpt import GPT
from megatron.moe.gate import available_gates, gate_class
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.routing import GateInput, LoadBalancingLoss, Routing
from megatron.moe.sequence_routing import route_each_sequence
from megatron.parallel.groups import Groups

ALL = available_gates()
SHORT = [5, 17]
LONG = [3, 9, 30, 9, 1, 12, 28, 7]
OTHER = [11, 0, 22, 6]
EOD = 40
V = 41
SAMPLED = {"sampling": Sampling(1.5, top_p=0.95), "seed": 3}
GREEDY = {"sampling": sampling.GREEDY}


def make(gate: str, groups: Groups | None = None, **options) -> GPT:
    """A model with two MoE layers, under a capacity of evaluation that drops half of the rows."""
    known = {f.name for f in dataclasses.fields(gate_class(gate).Config)}
    moe = MoEConfig(
        num_experts=4,
        gate=gate,
        moe_ffn_hidden_size=16,
        moe_train_capacity_factor=0.5,
        moe_eval_capacity_factor=0.5,
        moe_min_capacity=1,
    )
    shape = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        seq_length=12,
        init_method_std=0.5,
        untie_embeddings_and_output_weights=True,
        make_vocab_size_divisible_by=1,
    )
    options = {"jitter": 0.5} | options
    return build_model(
        shape,
        moe,
        {gate: {key: value for key, value in options.items() if key in known}},
        vocab_size=V,
        seed=2,
        groups=groups or Groups(),
    )


def texts(model: GPT, prompts: list[list[int]], **options) -> list[list[int]]:
    """Continuations of 10 tokens, which take the longest prompt past the window."""
    return generate(model, prompts, max_new_tokens=10, vocab_size=V, eod=EOD, **options)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_neighbours_do_not_change_text(name, how):
    model = make(name)
    alone = [texts(model, [prompt], **how)[0] for prompt in (SHORT, LONG, OTHER)]
    assert len({tuple(text) for text in alone}) == 3
    assert texts(model, [SHORT, LONG, OTHER], **how) == alone
    assert texts(model, [OTHER, SHORT, LONG], **how) == [alone[2], alone[0], alone[1]]
    assert texts(model, [LONG, SHORT], **how) == [alone[1], alone[0]]


@pytest.mark.parametrize(
    ("name", "how"), [*((name, GREEDY) for name in ALL), ("topk", SAMPLED)]
)
def test_cache_does_not_change_text(name, how):
    """Past the window, too, and after the prompt that is past it has ended."""
    model = make(name)
    widths = []
    hook = model.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    cached = texts(model, [SHORT, LONG, OTHER], **how)
    hook.remove()
    assert cached == texts(model, [SHORT, LONG, OTHER], use_cache=False, **how)
    assert (1 in widths) != gate_class(name).sees_other_tokens


def test_missing_cache_is_logged_once(monkeypatch):
    """With its reason: a gate that looks at other tokens, or a capacity."""
    lines = []
    logger = SimpleNamespace(info=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(generation, "get_logger", lambda: logger)
    generation._log_missing_cache.cache_clear()
    for options in ({}, {}, {"independent_prompts": False}):
        texts(make("expert_choice"), [SHORT], **GREEDY, **options)
    texts(make("topk"), [SHORT], **GREEDY)
    start = "generation without a cache of keys and values: "
    assert lines == [
        f"{start}the gate expert_choice looks at other tokens",
        f"{start}the capacity of experts depends on all tokens",
    ]


@pytest.mark.parametrize("name", ["topk", "threshold", "expert_choice"])
def test_capacity_applies_on_request(name):
    """With it the neighbours do change the text."""
    model = make(name)
    options = {**GREEDY, "independent_prompts": False}
    together = texts(model, [SHORT, LONG, OTHER], **options)
    alone = [texts(model, [prompt], **options)[0] for prompt in (SHORT, LONG, OTHER)]
    assert together != alone
    layer = find_moe_layers(model)[0]
    sums = layer.counters[False]
    if name != "expert_choice":
        assert sums["dispatched_C"].sum() < sums["assigned_C"].sum()


@pytest.mark.parametrize("name", ALL)
def test_generation_counts_no_padding(name):
    """And nothing is dropped: the counters hold each prompt's tokens of each step."""
    model = make(name)
    generate(model, [SHORT, LONG], max_new_tokens=3, vocab_size=V, **GREEDY)
    tokens = len(SHORT) + len(LONG) + 2 * 2
    if gate_class(name).sees_other_tokens:  # without a cache
        tokens = sum(len(SHORT) + len(LONG) + 2 * n for n in range(3))
    for layer in find_moe_layers(model):
        sums = layer.counters[False]
        assert sums["tokens"] == tokens and sums["experts_per_token_histogram"].sum() == tokens
        assert torch.equal(sums["dispatched_C"], sums["assigned_C"])


def test_equal_prompts_are_sampled_apart():
    model = make("topk")
    first, second, third = texts(model, [SHORT, LONG, SHORT], **SAMPLED)
    assert first != third
    assert texts(model, [SHORT, SHORT], **SAMPLED) == [first, third]
    assert texts(model, [LONG, SHORT, SHORT], **SAMPLED) == [second, first, third]


@pytest.mark.parametrize("name", ["threshold", "topk", "deepseek_v3", "expert_choice"])
def test_ties_do_not_change_text(name):
    """All experts are equally likely for all tokens."""
    model = make(name, threshold=0.5)
    for layer in find_moe_layers(model):
        layer.gate.router.weight.data.zero_()
    alone = [texts(model, [prompt], **GREEDY)[0] for prompt in (SHORT, LONG)]
    assert texts(model, [SHORT, LONG], **GREEDY) == alone


def _texts_on_rank(name, prompts_by_rank, how):
    groups = groups_for(2)
    return texts(make(name, groups), prompts_by_rank[groups.rank], **how)


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_generate_same_text(name, ranks2):
    """Sharded experts, with equal prompts on both ranks, and with other prompts on each; the
    rank whose rows have ended runs the model for the other one without a token of its own."""
    model = make(name)
    expected = texts(model, [SHORT, LONG, OTHER], **SAMPLED)
    prompts = [SHORT, LONG, OTHER]
    assert ranks2.run(_texts_on_rank, name, [prompts, prompts], SAMPLED) == [expected] * 2
    assert ranks2.run(_texts_on_rank, name, [[LONG], [OTHER, SHORT]], SAMPLED) == [
        [expected[1]],
        [expected[2], expected[0]],
    ]


def test_rank_without_rows_sends_no_token():
    """All rows end with the first token; with a fixed number of steps the model runs on padding."""
    model = make("topk")
    eod = texts(model, [SHORT], **GREEDY)[0][0]
    for layer in find_moe_layers(model):
        layer.counters[False].clear()
    calls = []
    model.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    options = {"max_new_tokens": 4, "vocab_size": V, "eod": eod, **GREEDY}
    assert generate(model, [SHORT], fixed_steps=True, **options) == [[eod]]
    assert calls == [(1, 2)] + [(1, 1)] * 3
    for layer in find_moe_layers(model):
        assert layer.counters[False]["tokens"] == len(SHORT)


class TokenCount(torch.nn.Module):
    """A gate that sends each token to expert 0, weighted by the number of tokens it sees."""

    def forward(self, inp: GateInput) -> Routing:
        size = len(inp.x_TD)
        token_A = torch.arange(size).flip(0)
        carried = 0 if inp.carry is None else inp.carry[token_A]
        balance = LoadBalancingLoss.of(
            inp, torch.ones(size, 1), token_A, torch.zeros_like(token_A), coeff=float(size)
        )
        return Routing(
            token_A,
            torch.zeros_like(token_A),
            torch.full((size,), float(size)) + carried,
            torch.tensor(1.0),
            priority_A=token_A.float(),
            carry=inp.token_ids_T.float(),
            metric_means={"size": torch.tensor(float(size))},
            balance=(balance,),
            metric_sums={"tokens": torch.tensor(float(size))},
        )


def test_parts_of_sequences_are_combined():
    """Interleaved sequences of 1 and 3 tokens: every field of the combined routing."""
    ids_T = torch.tensor([10, 11, 12, 13])
    sequence_T = torch.tensor([2, 0, 2, 2])
    carry = torch.tensor([0.25, 0.5, 0.75, 0.125])
    inp = GateInput(torch.zeros(4, 2), ids_T, sequence_T, carry, num_sequences=5)
    out = route_each_sequence(TokenCount(), inp)
    assert out.token_A.tolist() == [1, 3, 2, 0]
    assert out.weight_A.tolist() == [1.5, 3.125, 3.75, 3.25]
    assert out.priority_A.tolist() == [0.0, 2.0, 1.0, 0.0]
    assert out.carry.tolist() == ids_T.tolist()
    assert out.aux_loss.item() == ((1 + 1) + (1 + 3)) / 2
    assert out.metric_means["size"].item() == (1 * 1 + 3 * 3) / 4
    assert out.metric_sums["tokens"].item() == 4 and out.balance == ()
