"""Optimizer groups of gates: learning rate and weight decay of their own, under ZeRO 1 to 3."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import engines
from helpers.outside_gates import restored_registry
from megatron.config.schema import OptimizerConfig
from megatron.engine.optimizer import AdamW, parameter_groups, set_learning_rate
from megatron.moe import Gate, GateContext, ParameterGroup
from megatron.moe.gate_registry import import_gate_files

GATE = '''\
"""A gate whose router learns slowly, with weight decay, and whose scale learns fast."""

import torch
from torch import nn

from megatron.moe import Gate, ParameterGroup, Routing, linear_fp32


class GroupsGate(Gate, name="outside_groups"):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.scale = nn.Parameter(torch.ones(1))
        self.shift_E = nn.Parameter(torch.zeros(context.num_experts))

    def parameter_groups(self):
        return [
            ParameterGroup([self.router.weight], lr_scale=0.25, weight_decay=0.5),
            ParameterGroup([self.scale], lr_scale=2.0),
        ]

    def forward(self, inp):
        logits_TE = self.scale * linear_fp32(inp.x_TD, self.router) + self.shift_E
        weight_T, expert_T = logits_TE.softmax(-1).max(-1)
        token_T = torch.arange(len(expert_T))
        return Routing(token_T, expert_T, weight_T, logits_TE.square().mean())
'''
LR = 0.02


@pytest.fixture(scope="module")
def gate_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gate") / "outside_groups.py"
    path.write_text(GATE)
    return str(path)


def config_of(stage, ep_size, **checkpoint):
    return engines.config_of("outside_groups", ep_size, stage, **checkpoint)


def options_of(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> dict[str, float]:
    """Return the options of a parameter, by its name."""
    if name.endswith("gate.router.weight"):
        return {"lr": 0.25 * LR, "weight_decay": 0.5}
    if name.endswith("gate.scale"):
        return {"lr": 2 * LR, "weight_decay": 0.0}
    is_matrix = parameter.dim() > 1 and not re.search(r"\.gate\.|embed", name)
    return {"lr": LR, "weight_decay": config.weight_decay if is_matrix else 0.0}


def reference(gate_file: str, steps: int) -> dict[str, torch.Tensor]:
    """Train the full model with one AdamW per parameter."""
    config = config_of(1, 1)
    with restored_registry():
        import_gate_files([gate_file])
        model = engines.build(config)
    settings = config.optimizer
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizers = [
        torch.optim.AdamW(
            [p], betas=betas, eps=settings.adam_eps, **options_of(name, p, settings)
        )
        for name, p in model.named_parameters()
    ]
    for step in range(steps):
        for batch in engines.micro_batches(step, SimpleNamespace(rank=0, world_size=1)):
            (model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS).loss / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train(gate_file, config, steps):
    """Train in a rank, and save at the end."""
    with restored_registry():
        import_gate_files([gate_file])
        return engines.train(config, steps)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_follow_their_options(stage, gate_file, ranks2, tmp_path):
    """Weights equal those of one AdamW per parameter, also after a resume on another topology."""
    first = tmp_path / "first"
    ranks2.run(train, gate_file, config_of(stage, 2, save=str(first)), 2)
    assert_equal(engines.full_tensors(first), reference(gate_file, 2))
    second = tmp_path / "second"
    resumed = config_of(stage % 3 + 1, 1, load=str(first), save=str(second))
    ranks2.run(train, gate_file, resumed, 1)
    assert_equal(engines.full_tensors(second), reference(gate_file, 3))


def assert_equal(tensors, expected):
    for name, weight in expected.items():
        got = tensors[f"weight/{name}"]
        assert torch.allclose(got, weight, rtol=1e-5, atol=1e-5), (
            name,
            (got - weight).abs().max(),
        )


class TwoRouters(Gate):
    """A gate with these groups, of parameters that the test names."""

    name = "two_routers"

    def __init__(self, groups):
        super().__init__(self.Config(), GateContext(4, 2))
        self.a = nn.Parameter(torch.ones(2, 4))
        self.b = nn.Parameter(torch.ones(2))
        self.groups = groups

    def parameter_groups(self):
        return self.groups(self)


def model_with(*gates, monkeypatch):
    layers = [SimpleNamespace(gate=gate, experts=None) for gate in gates]
    monkeypatch.setattr("megatron.engine.optimizer.find_moe_layers", lambda model: layers)
    return nn.ModuleList([*gates, nn.Linear(2, 3)])


def test_equal_options_share_a_group(monkeypatch):
    """Over all layers; frozen parameters are in none."""
    slow = [lambda gate: [ParameterGroup([gate.a], lr_scale=0.5)]] * 2
    gates = [TwoRouters(groups) for groups in slow]
    frozen = TwoRouters(slow[0])
    frozen.a.requires_grad_(False)
    model = model_with(*gates, frozen, monkeypatch=monkeypatch)
    groups = {g["name"]: g for g in parameter_groups(model, 0.1)}
    sizes = {name: len(group["params"]) for name, group in groups.items()}
    assert sizes == {
        "matrices": 1,
        "vectors": 1,
        "gates": 3,
        "gates, lr x0.5, weight decay 0": 2,
    }
    optimizer = AdamW(groups.values())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(
    "groups",
    [
        lambda gate: [ParameterGroup([gate.a, gate.a])],
        lambda gate: [ParameterGroup([gate.a]), ParameterGroup([gate.a], lr_scale=2.0)],
        lambda gate: [ParameterGroup([nn.Parameter(torch.ones(2))])],
    ],
)
def test_foreign_parameter_is_refused(groups, monkeypatch):
    model = model_with(TwoRouters(groups), monkeypatch=monkeypatch)
    with pytest.raises(
        ValueError, match="parameter_groups of gate 'two_routers' has a parameter"
    ):
        parameter_groups(model, 0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr_scale": 0.0}, "lr_scale of a gate's parameter group is 0.0; allowed: a positive"),
        ({"lr_scale": float("nan")}, "lr_scale of a gate's parameter group is nan"),
        ({"lr_scale": float("inf")}, "lr_scale of a gate's parameter group is inf"),
        (
            {"weight_decay": -0.1},
            "weight_decay of a gate's parameter group is -0.1; allowed: 0",
        ),
        ({"weight_decay": float("nan")}, "weight_decay of a gate's parameter group is nan"),
    ],
)
def test_group_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroup([], **options)
