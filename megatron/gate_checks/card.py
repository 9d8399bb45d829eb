"""The report card of a gate: every check in order, with its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.gate_checks import contract, layer, sharded, training
from megatron.gate_checks.cases import GateCase
from megatron.gate_checks.overhead import router_share
from megatron.gate_checks.tiny_run import Curve
from megatron.parallel.rank_pool import RankPool

CAPACITY_1 = {"moe_train_capacity_factor": 1.0, "moe_min_capacity": 1}
_LONGEST_DETAIL = 400


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    name: str
    outcome: str
    """"pass", "fail" or "skip" """
    detail: str = ""
    """why it failed or was skipped, or the figure that it measured"""
    seconds: float = 0.0
    curve: Curve | None = None
    """of the training"""


@dataclass(frozen=True)
class Check:
    """A check by name; `run` raises AssertionError, or returns a figure or a curve to show."""

    name: str
    run: Callable[[], str | Curve | None]
    not_for: str = ""
    """why the check does not apply to this gate; empty if it does"""


def checks_alone(case: GateCase) -> list[Check]:
    """Return the checks in one process, in order."""
    looks = "it declares that it looks at other tokens" if case.sees_other_tokens else ""
    draws = "it declares that it draws random numbers" if case.is_stochastic else ""
    return [
        Check("experts in range", partial(contract.check_experts_in_range, case)),
        Check("contract on extreme inputs", partial(_check_extreme_inputs, case)),
        Check("no state change in forward", partial(contract.check_forward_keeps_state, case)),
        Check(
            "tokens are independent",
            partial(contract.check_tokens_are_independent, case),
            looks,
        ),
        Check(
            "differentiable weights", partial(contract.check_weights_are_differentiable, case)
        ),
        Check("initial weights by seed", partial(contract.check_initial_weights, case)),
        Check("state dict", partial(contract.check_state_dict, case)),
        Check("gradient of every parameter", partial(layer.check_layer_equals_reference, case)),
        Check("capacity", partial(layer.check_capacity, case)),
        Check("activation recomputation", partial(layer.check_recompute, case)),
        Check("micro-batches", partial(layer.check_micro_batches, case), looks or draws),
        Check("router overhead", partial(_router_overhead, case)),
    ]


def checks_on_ranks(case: GateCase, ranks: RankPool, folder: Path) -> list[Check]:
    """Return the checks on two ranks and those that train, in order.

    Args:
        ranks: two ranks.
        folder: for checkpoints.
    """
    draws = "it declares that it draws random numbers" if case.is_stochastic else ""
    checks = [
        Check(
            "two ranks equal one", partial(sharded.check_sharded, case, ranks, [6, 5]), draws
        ),
        Check(
            "two ranks, one without tokens",
            partial(sharded.check_sharded, case, ranks, [11, 0]),
            draws,
        ),
        Check(
            "two ranks under capacity",
            partial(sharded.check_sharded, case, ranks, [6, 5], moe=CAPACITY_1),
            draws,
        ),
    ]
    looks = "it looks at the other tokens of its rank" if case.sees_other_tokens else ""
    for stage in (1, 2, 3):
        run = partial(training.check_zero_update, case, ranks, stage, folder / f"zero{stage}")
        checks.append(Check(f"update under ZeRO {stage}", run, looks or draws))
    checks += [
        Check(
            "save and resume", partial(training.check_resume, case, ranks, folder / "resume")
        ),
        Check(
            f"{training.TRAINING_STEPS} training steps",
            partial(training.check_training, case, ranks),
        ),
    ]
    return checks


def run_card(case: GateCase, folder: Path) -> Iterator[CheckResult]:
    """Run all checks and yield each result when it is known.

    After a failure in one process the checks on ranks are skipped: the same mistake would fail
    them, too, or make them wait for each other.

    Args:
        folder: an empty folder for checkpoints.
    """
    failed = False
    for check in checks_alone(case):
        result = run_check(check)
        failed = failed or result.outcome == "fail"
        yield result
    ranks = RankPool(2)
    try:
        for check in checks_on_ranks(case, ranks, folder):
            if failed:
                yield CheckResult(check.name, "skip", "a check before it failed")
            else:
                yield run_check(check)
    finally:
        ranks.stop()


def run_check(check: Check) -> CheckResult:
    """Run one check; whatever it raises is its failure."""
    if check.not_for:
        return CheckResult(check.name, "skip", check.not_for)
    start = time.monotonic()
    try:
        found = check.run()
    except Exception as error:
        detail = describe_error(error)
        return CheckResult(check.name, "fail", detail, time.monotonic() - start)
    seconds = time.monotonic() - start
    if isinstance(found, Curve):
        detail = f"loss {found.losses[0]:.2f} -> {found.losses[-1]:.2f}"
        return CheckResult(check.name, "pass", detail, seconds, found)
    return CheckResult(check.name, "pass", found or "", seconds)


def describe_error(error: Exception) -> str:
    """Return an error on one line: what a check says, or an exception with where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, AssertionError):
        text = " ".join(lines) or "an assertion without a message"
    elif isinstance(error, RuntimeError) and lines and lines[0].startswith("rank "):
        text = f"{lines[0]} {lines[-1]}"  # a traceback of a rank ends with its error
    else:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = ""
        if frame is not None:
            place = f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})"
        text = f"{type(error).__name__}: {' '.join(lines)}{place}"
    return text[:_LONGEST_DETAIL]


def _check_extreme_inputs(case: GateCase) -> None:
    for tokens, num_experts, scale in contract.EXTREME_INPUTS:
        contract.check_extreme_input(case, tokens, num_experts, scale)


def _router_overhead(case: GateCase) -> str:
    return f"{router_share(case):.0%} of the layer's time"
