"""The public names of megatron.moe: what they are, and that importing the package is cheap."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron.moe
from megatron.config import needs
from megatron.moe import gate, gate_functional, gate_options, losses, routing
from megatron.moe.dispatch import plan
from megatron.moe.experts import expert_type
from megatron.moe.experts.expert_init import ExpertInit

REPO = Path(__file__).resolve().parents[2]
HOMES = {
    gate: ("Gate", "GateContext", "ParameterGroup", "available_gates", "create_gate"),
    plan: ("PermutedTokens",),
    expert_type: ("ExpertContext", "ExpertType", "available_expert_types", "create_experts"),
    routing: ("GateInput", "LoadBalancingLoss", "Routing", "RoutingScores", "StepTotals"),
    gate_options: ("LossConfig", "ScopeConfig"),
    losses: ("aux_losses", "z_loss"),
    gate_functional: ("linear_fp32",),
    needs: ("setting",),
}
REQUIRED = dataclasses.MISSING
# Fields of the public records in their order, with their defaults. Gates outside the tree rely on
# them: none may be removed, renamed or moved, and a new one comes last and has a default.
RECORDS = {
    "GateContext": {
        "hidden_size": REQUIRED,
        "num_experts": REQUIRED,
        "layer": 0,
        "num_moe_layers": 1,
        "vocab_size": None,
        "seed": 0,
        "init_std": 0.02,
    },
    "GateInput": {
        "x_TD": REQUIRED,
        "token_ids_T": None,
        "sequence_T": None,
        "carry": None,
        "progress": 0.0,
        "num_sequences": None,
    },
    "Routing": {
        "token_A": REQUIRED,
        "expert_A": REQUIRED,
        "weight_A": REQUIRED,
        "aux_loss": REQUIRED,
        "priority_A": None,
        "carry": None,
        "token_major": False,
        "metric_means": {},
        "balance": (),
        "metric_sums": {},
    },
    "ParameterGroup": {"params": REQUIRED, "lr_scale": 1.0, "weight_decay": 0.0},
    "StepTotals": {
        "load_E": REQUIRED,
        "num_tokens": REQUIRED,
        "metric_sums": REQUIRED,
        "load_LE": REQUIRED,
    },
    "ExpertContext": {
        "num_local": REQUIRED,
        "hidden_size": REQUIRED,
        "ffn_size": REQUIRED,
        "activation": "gelu",
        "init": ExpertInit(),
        "backend": "auto",
        "weight_on_input": False,
    },
    "LossConfig": {"balance_scope": "micro-batch", "loss_coeff": 0.01, "z_loss_coeff": 0.0},
    "ScopeConfig": {"balance_scope": "micro-batch"},
}
# Likewise their arguments; `*` marks those that follow as keyword-only.
SIGNATURES = {
    "create_gate": (
        "name * hidden_size num_experts layer=0 num_moe_layers=1 vocab_size=None seed=0 "
        "init_std=0.02 gate_layer=None **options"
    ),
    "available_gates": "",
    "LoadBalancingLoss.of": (
        "inp score_TG token_A choice_A * coeff scope='micro-batch' per_token=False"
    ),
    "aux_losses": "*terms extra=0.0",
    "z_loss": "logits_TE",
    "linear_fp32": "x_TD linear",
    "create_experts": "name context **options",
    "available_expert_types": "",
    "ExpertType.__init__": "self config context",
    "ExpertType.add_matrix": "self name outputs inputs * is_output=False",
    "ExpertType.add_vector": "self name size * exists=True",
    "ExpertType.init_expert": "self local generator",
    "ExpertType.apply_experts": "self x_TD weight_S rows",
    "ExpertType.gather": "self x_TD rows",
    "ExpertType.linear": "self x_SD weight_EHD rows bias_EH=None",
    "ExpertType.combine": "self y_SD weight_S rows",
    "setting": "name *values above=0",
    "Gate.__init__": "self config context",
    "Gate.forward": "self inp",
    "Gate.parameter_groups": "self",
    "Gate.post_optimizer_step": "self step",
    "Gate.summarise": "self sums",
    "Gate.capacities": "self num_tokens factor minimum",
    "Gate.warn_once": "self message",
    "Gate.experts_per_token": "config num_experts",
    "Gate.make_router": "self rows=None generator=None * bias=False",
}
# Attributes that a gate may set.
GATE_ATTRIBUTES = {
    "initialises_itself": True,
    "sees_other_tokens": False,
    "surrogate_gradients": False,
    "stochastic": False,
    "expert_kind": "grouped",
}


def run_python(code):
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    return result.stdout.strip()


def test_importing_package_leaves_torch_out():
    code = "import sys, megatron.moe; dir(megatron.moe); print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_public_names_import_on_use():
    code = (
        "from megatron.moe import Gate, GateInput, Routing, LoadBalancingLoss, create_gate, "
        "StepTotals, LossConfig, aux_losses, available_gates; "
        "gate = create_gate('topk', hidden_size=4, num_experts=2); "
        "print(isinstance(gate, Gate), 'topk' in available_gates())"
    )
    assert run_python(code) == "True True"


def test_public_names_are_the_originals():
    names = []
    for module, members in HOMES.items():
        names += members
        for name in members:
            assert getattr(megatron.moe, name) is getattr(module, name)
    assert sorted(megatron.moe.__all__) == sorted(names)
    assert set(names) <= set(dir(megatron.moe))


@pytest.mark.parametrize("name", RECORDS)
def test_fields_of_records_are_stable(name):
    known = RECORDS[name]
    fields = {}
    for field in dataclasses.fields(getattr(megatron.moe, name)):
        fields[field.name] = field.default
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = field.default_factory()
    assert list(fields.items())[: len(known)] == list(known.items())
    added = list(fields)[len(known) :]
    assert not [field for field in added if fields[field] is REQUIRED]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_stable(name):
    owner, _, attribute = name.partition(".")
    function = getattr(megatron.moe, owner)
    if attribute:
        function = getattr(function, attribute)
    signature = inspect.signature(function).replace(return_annotation=inspect.Signature.empty)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=plain)).strip("()").replace(",", "")
    assert text == SIGNATURES[name]


def test_gate_attributes_are_stable():
    for name, value in GATE_ATTRIBUTES.items():
        assert getattr(megatron.moe.Gate, name) == value


def test_gate_page_lists_public_names():
    """The page has a line for every public name, and its examples import no other of ours."""
    page = (REPO / "docs/gates.md").read_text(encoding="utf-8")
    section = page.partition("### Public names")[2].partition("\n## ")[0].partition("\n### ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [
        re.match(r"\w+", name)[0] for row in rows for name in re.findall(r"`([^`]+)`", row)
    ]
    assert sorted(named) == sorted(megatron.moe.__all__)
    assert set(re.findall(r"^(?:from|import) (megatron[\w.]*)", page, re.MULTILINE)) <= {
        "megatron.moe",
        "megatron.exit_codes",
        "megatron.pretrain",
    }


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'megatron.moe' has no attribute 'Router'"):
        _ = megatron.moe.Router
