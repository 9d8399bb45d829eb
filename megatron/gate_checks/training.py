"""Checks of a gate in training: updates under ZeRO, saving and resuming, and 60 steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.directory import checkpoint_name
from megatron.gate_checks.cases import GateCase, require_that
from megatron.gate_checks.tiny_run import (
    SMOOTH_EPS,
    Curve,
    run_config,
    saved_tensors,
    train_in_plain_torch,
    train_in_rank,
)
from megatron.parallel.rank_pool import RankPool

TRAINING_STEPS = 60
"""Length of the training whose curves the report shows"""
_TIMEOUT = 300.0


def check_zero_update(case: GateCase, ranks: RankPool, zero_stage: int, folder: Path) -> None:
    """Compare three clipped optimizer steps on two ranks under ZeRO with plain torch.

    Losses, gradient norms, all weights and the state of the gate are compared by name.

    Args:
        folder: where the run may write a checkpoint, from which its weights are read.
    """
    expected_curve, expected = train_in_plain_torch(run_config(case, adam_eps=SMOOTH_EPS), 3)
    config = run_config(
        case, ep_size=2, zero_stage=zero_stage, adam_eps=SMOOTH_EPS, save=str(folder)
    )
    for curve in ranks.run(train_in_rank, config, case.gate_paths, 3, timeout=_TIMEOUT):
        _require_close("the losses", curve.losses, expected_curve.losses, 1e-5, 1e-5)
        # Gates with steep functions amplify the rounding of the steps before.
        _require_close(
            "gradient norms", curve.grad_norms, expected_curve.grad_norms, 1e-5, 1e-3
        )
    got = saved_tensors(folder, 3)
    for name, want in expected.items():
        if name in got:  # buffers that are not persistent are not saved
            _require_close(name, got[name], want, 1e-5, 1e-5)


def check_resume(case: GateCase, ranks: RankPool, folder: Path) -> None:
    """Compare a training that was saved and resumed with an uninterrupted one.

    On the same ranks losses, weights, moments and the gate's state are equal bit for bit; with
    another expert-parallel size losses agree within rounding.
    """
    full_folder = folder / "full"
    config = run_config(case, ep_size=2, save=str(full_folder))
    full, _ = ranks.run(train_in_rank, config, case.gate_paths, 3, 3, timeout=_TIMEOUT)
    expected = saved_tensors(full_folder, 6)
    first = str(full_folder / checkpoint_name(3))
    for ep_size in (2, 1):
        save = str(folder / f"ep{ep_size}")
        config = run_config(case, ep_size=ep_size, load=first, save=save)
        resumed, _ = ranks.run(train_in_rank, config, case.gate_paths, 3, timeout=_TIMEOUT)
        _require_close("losses after a resume", resumed.losses, full.losses[3:], 1e-4, 1e-4)
        if ep_size == 1:
            continue
        require_that(
            resumed.losses == full.losses[3:],
            f"the losses after a resume are {resumed.losses}, without one {full.losses[3:]}",
        )
        got = saved_tensors(Path(save), 6)
        for name, want in expected.items():
            require_that(torch.equal(got[name], want), f"{name} differs after a resume")


def check_training(case: GateCase, ranks: RankPool) -> Curve:
    """Train 60 steps on two ranks: the loss has to fall by half a nat, and stay finite.

    Returns:
        The curves for the report.
    """
    config = run_config(case, ep_size=2)
    results = ranks.run(
        train_in_rank, config, case.gate_paths, TRAINING_STEPS, timeout=_TIMEOUT
    )
    curve = results[0]
    require_learning(curve.losses)
    return curve


def require_learning(losses: Sequence[float]) -> None:
    """Require that a loss falls by half a nat, and that it is never NaN or infinite."""
    finite = all(math.isfinite(loss) for loss in losses)
    require_that(finite, "the loss is NaN or infinite")
    first = sum(losses[:5]) / 5
    last = sum(losses[-5:]) / 5
    require_that(
        first - last > 0.5,
        f"the loss goes from {first:.2f} to {last:.2f} in {len(losses)} steps; expected: it falls "
        "by 0.5 or more",
    )


def _require_close(name: str, got: Any, want: Any, atol: float, rtol: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got),
        torch.as_tensor(want),
        atol=atol,
        rtol=rtol,
        msg=lambda message: f"{name}: {message}",
    )
