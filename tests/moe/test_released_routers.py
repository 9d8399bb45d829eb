"""The routers of transformers against our gates and options, by value."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from helpers import transformers_routers as theirs
from megatron.moe.gate import Gate, create_gate
from megatron.moe.released_routers import (
    NOT_EXPRESSED,
    RELEASED_ROUTERS,
    ReleasedRouter,
    released_router_table,
)
from megatron.moe.routing import GateInput

pytest.importorskip("transformers", reason="the reference implementations are not installed")
REPO = Path(__file__).resolve().parents[2]
TOKENS = 40


def test_every_router_class_is_listed_once():
    """A new release of transformers adds names here, until each is compared or explained."""
    found = set(theirs.router_classes())
    listed = [*RELEASED_ROUTERS, *NOT_EXPRESSED]
    assert len(listed) == len(set(listed))
    assert found - set(listed) == set(), "add them to megatron/moe/released_routers.py"
    assert set(listed) - found == set(), "these are not in the installed transformers"


def test_at_least_66_families_are_equal():
    families = {name.split("/")[0] for name in RELEASED_ROUTERS}
    partly = {name.split("/")[0] for name in NOT_EXPRESSED} & families
    assert len(families - partly) >= 66


def test_options_follow_the_configuration():
    """None keeps our default, greedy selection has no groups, and a bias may be switched off."""
    config = SimpleNamespace(
        num_experts_per_tok=4,
        n_group=None,
        topk_group=None,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )
    routers = RELEASED_ROUTERS
    common = {"topk": 4, "routed_scaling_factor": 1.5}
    expected = {**common, "norm_topk_prob": True}
    assert routers["axk2/AXK2TopkRouter"].options_of(config) == expected
    config.n_group = 4
    config.topk_group = 2
    grouped = {**common, "n_group": 4, "topk_group": 2}
    assert routers["deepseek_v2/DeepseekV2TopkRouter"].options_of(config) == grouped
    config.topk_method = "greedy"
    assert routers["deepseek_v2/DeepseekV2TopkRouter"].options_of(config) == common
    config.use_expert_bias = False
    expected["bias_rule"] = "none"
    assert routers["lfm2_moe/Lfm2MoeTopKRouter"].options_of(config) == expected
    privacy_filter = routers["openai_privacy_filter/OpenAIPrivacyFilterTopKRouter"]
    assert privacy_filter.options_of(config)["routed_scaling_factor"] == 0.25


def test_documentation_has_the_tables():
    text = (REPO / "docs/gates.md").read_text(encoding="utf-8")
    assert released_router_table() in text


def make_gate(released: ReleasedRouter, config, seed: int) -> Gate:
    """Our gate for a model's configuration, with random weights and biases."""
    gate = create_gate(
        released.gate,
        hidden_size=theirs.HIDDEN,
        num_experts=theirs.EXPERTS,
        vocab_size=theirs.VOCAB,
        init_std=0.5,
        seed=seed,
        **released.options_of(config),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in gate.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name in ("router_norm.weight", "expert_scale_E"):
            tensor.copy_(1 + 0.3 * noise)
        elif name in ("router.bias", "expert_bias"):
            tensor.copy_(0.2 * noise)
    return gate


def copy_tensors(gate: Gate, router: nn.Module, released: ReleasedRouter) -> set[str]:
    """Copy our tensors to their router; return ours that it does not have."""
    ours = gate.state_dict()
    target = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    for name, their_name in released.tensors.items():
        if name in ours:
            size = len(ours[name])
            with torch.no_grad():
                target[their_name][:size].copy_(ours[name])
    return set(ours) - set(released.tensors)


def our_weights(gate: Gate, x_TD: Tensor, ids_T: Tensor) -> Tensor:
    """Our weights [T, choices], NaN where a choice is not selected."""
    out = gate(GateInput(x_TD, ids_T))
    num_choices = theirs.EXPERTS + len(gate.zero_computation_experts)
    out.check(len(x_TD), num_choices)
    empty_TC = torch.full((len(x_TD), num_choices), torch.nan)
    return empty_TC.index_put((out.token_A, out.expert_A), out.weight_A)


def compare(name: str, released: ReleasedRouter, config, seed: int) -> None:
    """Check that choices are equal, and weights to 1e-6."""
    gate = make_gate(released, config, seed).eval()
    router = theirs.build(name, config)
    left = copy_tensors(gate, router, released)
    assert left <= {"expert_bias"}, "the others must be copied"
    bias_E = torch.zeros(theirs.EXPERTS)
    if "expert_bias" in left:
        bias_E = gate.expert_bias
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(TOKENS, theirs.HIDDEN, generator=generator)
    ids_T = torch.randint(0, theirs.VOCAB, (TOKENS,), generator=generator)
    with torch.no_grad():
        ours_TC = our_weights(gate, x_TD, ids_T)
        theirs_TC = theirs.dense_weights(name, router, x_TD.clone(), ids_T, bias_E)
    if released.gate == "longcat":
        theirs_TC = merge_identities(theirs_TC)
    theirs_TC = later_scale(released, config) * theirs_TC
    assert len(theirs_TC.isnan().unique(dim=0)) > 1, "all tokens choose the same experts"
    torch.testing.assert_close(ours_TC, theirs_TC, equal_nan=True, rtol=1e-6, atol=1e-6)


def is_released(name: str, config) -> bool:
    """Whether the note of a router does not exclude this branch of its code."""
    is_softmax = getattr(config, "expert_selection_fn", "") == "softmax"
    return not (is_softmax and not config.norm_topk_prob)


@pytest.mark.parametrize("name", RELEASED_ROUTERS)
def test_routing_equals_transformers(name):
    """In every branch of the router's code that a released model uses."""
    configs = [config for config in theirs.configurations(name) if is_released(name, config)]
    assert configs
    for seed, config in enumerate(configs):
        compare(name, RELEASED_ROUTERS[name], config, seed)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("mixtral/MixtralTopKRouter", "norm_topk_prob", False),
        ("deepseek_v3/DeepseekV3TopkRouter", "group_score_best", 1),
        ("deepseek_v3/DeepseekV3TopkRouter", "bias_on", "logit"),
        ("mistral4/Mistral4TopkRouter", "group_score_best", 1),
        ("ernie4_5_moe/Ernie4_5_MoeTopKRouter", "norm_floor", 0.0),
        ("laguna/LagunaTopKRouter", "logit_softcap", 0.0),
        ("muse_spark/MuseSparkTopkRouter", "logit_scale", 1.0),
        ("kolibri1/Kolibri1TopKRouter", "bias_on", "score"),
        ("gemma4/Gemma4TextRouter", "routed_scaling_factor", 1.01),
        ("inkling2/Inkling2TopKRouter", "score_function", "softmax"),
        ("flint/FlintTopKRouter", "score_function", "sqrtsoftplus"),
    ],
)
def test_comparison_notices_a_wrong_option(name, option, value):
    """The random weights and sizes are such that each of these options matters."""
    released = RELEASED_ROUTERS[name]
    changed = ReleasedRouter(
        released.gate,
        {**released.options, option: value},
        {o: attribute for o, attribute in released.from_config.items() if o != option},
        released.tensors,
        released.note,
    )
    config = theirs.configurations(name)[0]
    compare(name, released, config, 0)
    with pytest.raises(AssertionError, match="not close"):
        compare(name, changed, config, 0)


def later_scale(released: ReleasedRouter, config) -> float:
    """The factor that the MoE block applies after the experts, 1 if the router does it."""
    if "after the experts" not in released.note:
        return 1.0
    return getattr(config, released.from_config["routed_scaling_factor"])


def merge_identities(weight_TC: Tensor) -> Tensor:
    """Add up the weights of LongCat's identity paths, which our gate lists once."""
    ffn_TE, identity_TZ = weight_TC.split(
        [theirs.EXPERTS, weight_TC.shape[1] - theirs.EXPERTS], 1
    )
    sum_T1 = identity_TZ.nansum(1, keepdim=True)
    none_T1 = identity_TZ.isnan().all(1, keepdim=True)
    return torch.cat([ffn_TE, sum_T1.masked_fill(none_T1, torch.nan)], 1)
