"""Training on GPUs against training on the CPU: all gates, precisions, NCCL and checkpoints.

Without a GPU both are on the CPU, with one gate, which tests the tests.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers import engines
from megatron.moe.gate import available_gates

CUDA = torch.cuda.is_available()
GATES = available_gates() if CUDA else ["topk"]

pytestmark = pytest.mark.gpu


def _losses(config, steps):
    """Train in a rank; return the losses. Tensors of a GPU stay in their process."""
    return engines.train(config, steps)[0]


@pytest.mark.parametrize("name", GATES)
def test_gate_trains_as_on_cpu(name, ranks1, gpu_ranks1):
    """In fp32: the first loss, before any update, is equal up to rounding; later ones up to its
    growth over the steps."""
    config = engines.config_of(name, 1, 1)
    (expected,) = ranks1.run(_losses, config, 6)
    (losses,) = gpu_ranks1.run(_losses, config, 6)
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert losses == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("stage", [1, 3])
def test_sharded_training_equals_one_rank(name, stage, gpu_ranks1, gpu_ranks2):
    """Two ranks that share the experts, over NCCL on GPUs."""
    (expected,) = gpu_ranks1.run(_losses, engines.config_of(name, 1, stage), 4)
    both = gpu_ranks2.run(_losses, engines.config_of(name, 2, stage), 4)
    # expert_choice and base route the tokens of each rank by themselves.
    bound = 0.2 if name in ("expert_choice", "base") else 1e-2
    for losses in both:
        assert losses == pytest.approx(expected, rel=bound)


def _precision_facts(config, steps):
    """Train in a rank; return losses and the dtypes of gates and experts."""
    run = engines.Run(config)
    try:
        losses = run.steps(steps)
        dtypes = {name: p.dtype for name, p in run.engine.model.named_parameters()}
        return losses, dtypes
    finally:
        run.close()


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_train(name, precision, gpu_ranks1):
    """The losses are those of fp32 up to rounding; experts are 16-bit, gates fp32."""
    if precision == "fp16" and not CUDA:
        pytest.skip("fp16 needs a GPU")
    (expected,) = gpu_ranks1.run(_losses, engines.config_of(name, 1, 1), 3)
    config = engines.config_of(name, 1, 1, precision)
    ((losses, dtypes),) = gpu_ranks1.run(_precision_facts, config, 12)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(expected[0], rel=0.03)
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for parameter, dtype in dtypes.items():
        if ".gate." in parameter:
            assert dtype == torch.float32, parameter
        if ".experts." in parameter:
            assert dtype == narrow, parameter


def _save_while_training(config):
    """Save in the background and train on.

    Returns:
        The losses after the save, whether the host memory of the copy is page-locked, and the
        weights at the save.
    """
    run = engines.Run(config)
    try:
        run.steps(2)
        weights = {n: p.detach().cpu().clone() for n, p in run.engine.model.named_parameters()}
        run.checkpoints.save(run.progress)
        losses = run.steps(2)
        run.checkpoints.finish()
        return losses, run.checkpoints._staging_buffer._bytes.is_pinned(), weights
    finally:
        run.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_background_save_is_page_locked(precision, gpu_ranks1, tmp_path):
    """The file has the weights of the save, not those of the steps after it, and a run that
    resumes from it repeats these steps."""
    config = engines.config_of(
        "deepseek_v3", 1, 1, precision, save=str(tmp_path), async_save=True
    )
    ((losses, is_pinned, weights),) = gpu_ranks1.run(_save_while_training, config)
    assert is_pinned == CUDA
    saved = engines.full_tensors(tmp_path)
    for name, weight in weights.items():
        assert torch.equal(saved[f"weight/{name}"].to(weight.dtype), weight), name
    (resumed,) = gpu_ranks1.run(_losses, engines.loading(config, tmp_path), 2)
    assert resumed == losses
