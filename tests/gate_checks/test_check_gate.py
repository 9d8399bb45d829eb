"""tools/check_gate.py: a correct gate of a file passes, and planted faults fail by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.gate_checks import contract
from megatron.gate_checks import layer as layer_checks
from megatron.gate_checks.card import (
    Check,
    CheckResult,
    checks_alone,
    checks_on_ranks,
    run_check,
)
from megatron.gate_checks.cases import GateCase
from megatron.gate_checks.report import bars, html_page, summary_line
from megatron.gate_checks.tiny_run import Curve
from megatron.gate_checks.training import check_training, check_zero_update, require_learning
from megatron.moe.gate import available_gates
from megatron.moe.gate_registry import REGISTRY
from tools import check_gate

GATE = '''
"""Above the mean: every expert whose probability is at least `margin` times the mean."""

from dataclasses import dataclass, replace

import torch

from megatron.moe import Gate, GateInput, LoadBalancingLoss, LossConfig, Routing
from megatron.moe import aux_losses, linear_fp32


class AboveMeanGate(Gate, name="{name}"):
    @dataclass(frozen=True)
    class Config(LossConfig):
        margin: float = 0.8
        """share of the mean that a probability must reach"""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.router = self.make_router()
        self.calls = 0

    def forward(self, inp: GateInput) -> Routing:
        c = self.config
        probs_TE = linear_fp32(inp.x_TD, self.router).softmax(-1)
        chosen_TE = probs_TE >= c.margin / self.num_experts
        token_A, expert_A = chosen_TE.nonzero(as_tuple=True)
        balance = LoadBalancingLoss.of(
            inp, probs_TE, token_A, expert_A, coeff=c.loss_coeff, scope=c.balance_scope
        )
        weight_A = probs_TE[token_A, expert_A]
        {fault}
        return Routing(token_A, expert_A, weight_A, **aux_losses(balance))
'''
FAULTS = {
    "no state change in forward": "self.calls += 1",
    "tokens are independent": "weight_A = weight_A * (1 + probs_TE[:, 0].mean())",
    "differentiable weights": "weight_A = weight_A.detach()",
    "experts in range": "expert_A = expert_A + 1",
}
"""By the name of the check that has to find it, a line of forward"""


@pytest.fixture
def gate_file(tmp_path):
    """Write a gate with a fault and import it; its name is free again after the test."""
    names = []

    def write(name: str, fault: str = "pass") -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(GATE.format(name=name, fault=fault), encoding="utf-8")
        names.append(name)
        return path

    yield write
    for name in names:
        if name in REGISTRY.classes:
            REGISTRY.remove(name)


def test_outside_gate_passes(gate_file, tmp_path, capsys):
    path = gate_file("above_mean_ok")
    page = tmp_path / "card.html"
    code = check_gate.main([str(path), "--margin", "0.9", "--html", str(page)])
    out = capsys.readouterr().out
    assert code == 0, out
    assert re.search(r"^Gate above_mean_ok with 4 experts$", out, re.MULTILINE)
    assert re.search(r"^60 training steps +pass .*loss \d", out, re.MULTILINE), out
    assert re.search(r"^router overhead +pass .*\d+% of the layer's time$", out, re.MULTILINE)
    assert re.search(r"^loss +[▁-█]{60}  ", out, re.MULTILINE)
    assert re.search(r"^\d\d checks passed$", out, re.MULTILINE)
    html = page.read_text(encoding="utf-8")
    assert html.count("<polyline") == 3 and "save and resume" in html
    assert "http" not in html, "the page has no external files"


@pytest.mark.parametrize("check", FAULTS)
def test_planted_fault_fails_by_name(check, gate_file, capsys):
    """Checks on ranks are skipped, because a faulty gate may make them wait."""
    path = gate_file(f"faulty_{check.split()[0]}", FAULTS[check])
    code = check_gate.main([str(path)])
    out = capsys.readouterr().out
    assert code == 1, out
    (failed,) = re.findall(r"^\d+ of \d+ checks failed: (.*)$", out, re.MULTILINE)
    assert check in failed.split(", ")
    assert re.search(rf"^{check} +fail ", out, re.MULTILINE)
    assert re.search(r"^save and resume +skip +a check before it failed$", out, re.MULTILINE)


def test_undeclared_random_numbers_fail(gate_file):
    path = gate_file("noisy", "weight_A = weight_A * torch.rand_like(weight_A)")
    REGISTRY.import_file(str(path))
    with pytest.raises(AssertionError, match="declare it with `stochastic = True`"):
        contract.check_forward_keeps_state(GateCase("noisy"))


def test_state_outside_buffers_fails(gate_file):
    """Weights drawn from the global generator, and state that a state dict misses."""
    path = gate_file("hidden", "weight_A = weight_A * self.factor")
    source = path.read_text(encoding="utf-8")
    source = source.replace("self.calls = 0", "self.factor = float(torch.rand(()))")
    path.write_text(source, encoding="utf-8")
    REGISTRY.import_file(str(path))
    with pytest.raises(AssertionError, match="neither a parameter nor a buffer"):
        contract.check_state_dict(GateCase("hidden"))
    source = source.replace("hidden", "globally_drawn").replace(
        "self.make_router()", "torch.nn.Linear(8, 4, bias=False)"
    )
    other = path.with_name("globally_drawn.py")
    other.write_text(source, encoding="utf-8")
    REGISTRY.import_file(str(other))
    with pytest.raises(AssertionError, match="draw it from `context.generator"):
        contract.check_initial_weights(GateCase("globally_drawn"))
    REGISTRY.remove("globally_drawn")


def test_parameter_without_gradient_fails(gate_file):
    path = gate_file("unused")
    source = path.read_text(encoding="utf-8")
    unused = "self.unused = torch.nn.Parameter(torch.ones(3))"
    path.write_text(source.replace("self.calls = 0", unused), encoding="utf-8")
    REGISTRY.import_file(str(path))
    with pytest.raises(AssertionError, match="gate.unused gets no gradient"):
        layer_checks.check_layer_equals_reference(GateCase("unused"))


def test_rank_dependent_gate_fails(gate_file, ranks2):
    """A gate whose weights depend on the rank trains other weights than one rank."""
    rank = "torch.distributed.is_initialized() and torch.distributed.get_rank()"
    path = gate_file("per_rank", f"weight_A = weight_A * (1 + 0.1 * int({rank}))")
    REGISTRY.import_file(str(path))
    case = GateCase("per_rank", gate_paths=(str(path),))
    result = run_check(Check("update", lambda: check_zero_update(case, ranks2, 1, path.parent)))
    assert result.outcome == "fail" and result.detail.startswith("the losses: "), result


def test_model_that_does_not_learn_fails(gate_file, ranks2):
    path = gate_file("nan", "weight_A = weight_A * float('nan')")
    REGISTRY.import_file(str(path))
    with pytest.raises(AssertionError, match="the loss is NaN or infinite"):
        check_training(GateCase("nan", gate_paths=(str(path),)), ranks2)
    with pytest.raises(AssertionError, match="the loss goes from 4.00 to 3.80 in 10 steps"):
        require_learning([4.0] * 5 + [3.8] * 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", available_gates())
def test_built_in_gates_pass(name, ranks2, tmp_path):
    """The checks on two ranks; those in one process are in tests/moe/test_gates.py."""
    case = GateCase(name)
    for check in [*checks_alone(case), *checks_on_ranks(case, ranks2, tmp_path)]:
        result = run_check(check)
        assert result.outcome in ("pass", "skip"), result


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_gate"], "--gate is 'no_such_gate'; allowed: "),
        (["missing.py"], "--gate-path is 'missing.py'"),
        (
            ["topk", "--topk", "9"],
            "--topk is 9; allowed: 1 to the number of experts, which is 4",
        ),
        (["topk", "--margin", "1"], "--margin is no flag"),
        (
            ["topk", "--lr", "0.1"],
            "--lr is 0.1; allowed: left out, because it has no effect on the checks",
        ),
        (["topk", "--gate", "hash"], "--gate is 'hash'; allowed: left out, because"),
        (
            ["topk", "--expert-type", "swiglu_clamped"],
            "--expert-type is 'swiglu_clamped'; allowed: ",
        ),
        (
            ["topk", "--html", "no_folder/card.html"],
            "--html is 'no_folder/card.html'; allowed: ",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert check_gate.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert message in line


def test_help_and_no_arguments(capsys):
    assert check_gate.main(["--help"]) == 0 and check_gate.main([]) == 2
    assert capsys.readouterr().out.count("Checks a gate in about a minute") == 2


def test_errors_of_a_gate_say_where():
    def broken():
        raise KeyError("margin")

    result = run_check(Check("a check", broken))
    assert result.outcome == "fail"
    assert re.fullmatch(r"KeyError: 'margin' \(test_check_gate.py:\d+\)", result.detail)


def test_report_lines():
    results = [CheckResult("a", "pass"), CheckResult("b", "skip"), CheckResult("c", "pass")]
    assert summary_line(results) == "2 checks passed, 1 skipped"
    failed = CheckResult(
        "<d>", "fail", "x < y", curve=Curve([2.0, 1.0], [1, 1], [1, 1], [1, 1])
    )
    assert summary_line([*results, failed]) == "1 of 4 checks failed: <d>"
    page = html_page("t", [failed])
    assert "&lt;d&gt;" in page and "x &lt; y" in page and "<d>" not in page
    assert bars([0.0, 0.5, 1.0]) == "▁▄█" and bars([3.0, 3.0]) == "▁▁"
