"""What the engine refuses, its optimizer, and what its start-up does not import.

What it computes is tested in test_moe_adapter.py.
"""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import runs
from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig
from megatron.exit_codes import peer_exited_error
from megatron.parallel.groups import Groups


def test_fp16_needs_a_gpu():
    from megatron.engine.engine import Engine

    with pytest.raises(
        ValueError, match="--fp16 is True; allowed: only with a GPU. Use --bf16"
    ):
        Engine(
            nn.Linear(1, 1),
            OptimizerConfig(fp16=True),
            DeepSpeedConfig(),
            TrainConfig(),
            Groups(),
        )


def test_deepspeed_config_error_is_one_line(tmp_path):
    from megatron.engine.engine import Engine

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"no_such_key": 1}}))
    with pytest.raises(
        ValueError, match="DeepSpeed refuses .*ds.json: .*no_such_key"
    ) as caught:
        Engine(
            nn.Linear(1, 1),
            OptimizerConfig(),
            DeepSpeedConfig(deepspeed_config=str(path)),
            TrainConfig(),
            Groups(),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"nonsense": 1}, "DeepSpeed has no key 'nonsense'; remove it from the file"),
        ({"zero_optimisation": {}}, "no key 'zero_optimisation'; did you mean 'zero_optimiz"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param has an effect only with --zero-stage 3, not 1;",
        ),
        ({"activation_checkpointing": {}}, "by --recompute-activations; remove it"),
    ],
)
def test_keys_without_effect_are_refused(content, message, tmp_path):
    from megatron.engine.engine import Engine

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    options = DeepSpeedConfig(deepspeed_config=str(path))
    with pytest.raises(ValueError, match=message):
        Engine(nn.Linear(1, 1), OptimizerConfig(), options, TrainConfig(), Groups())


def test_known_keys_of_deepspeed_are_accepted(tmp_path):
    from megatron.engine.ds_config import check_deepspeed_config, deepspeed_config

    path = tmp_path / "ds.json"
    content = {
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": False},
        "aio": {},
        "tensorboard": {"enabled": False},
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    }
    path.write_text(json.dumps(content))
    options = DeepSpeedConfig(deepspeed_config=str(path))
    config = deepspeed_config(OptimizerConfig(), options, TrainConfig(), 1)
    check_deepspeed_config(config, str(path))
    # Without it, DeepSpeed refuses our optimizer when its state is offloaded.
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_peer_exit_differs_from_other_errors():
    assert "another rank ended" in str(
        peer_exited_error(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3"))
    )
    assert peer_exited_error(RuntimeError("size mismatch")) is None


def test_adamw_equals_torch():
    """Equal bit for bit, with groups and a changing learning rate; states can be exchanged."""
    from megatron.engine.optimizer import AdamW

    def train(cls, steps, state=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = cls(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
        if state is not None:
            optimizer.load_state_dict(
                copy.deepcopy(state)
            )  # or it would train on those very tensors
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
            optimizer.zero_grad()
            model(torch.ones(4, 7) * (i + 1)).square().sum().backward()
            optimizer.step()
        assert torch.is_grad_enabled() and all(p.is_leaf for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        return [p.detach() for p in model.parameters()], optimizer.state_dict()

    for state in (None, train(torch.optim.AdamW, 3)[1], train(AdamW, 3)[1]):
        (ours, our_state), (theirs, their_state) = (
            train(AdamW, 5, state),
            train(torch.optim.AdamW, 5, state),
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert our_state["param_groups"] == their_state["param_groups"]
        for a, b in zip(
            our_state["state"].values(), their_state["state"].values(), strict=True
        ):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_freeze_gc_hides_existing_objects():
    from megatron.engine.startup_patches import freeze_gc

    before = gc.get_freeze_count()
    with pytest.raises(KeyError), freeze_gc():
        assert gc.get_freeze_count() > before + 10_000
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_cpu_run_imports_no_compiler(data, tmp_path):
    """Importing them takes 3 s and more, and neither a step nor saving uses them."""
    program = """
import sys
from megatron.pretrain import main
assert main(sys.argv[1:]) == 0
slow = ("torch._dynamo", "torch._inductor", "triton")
print("imported:", [name for name in slow if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *runs.flags(data, tmp_path, 2, "--eval-iters", "0")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported: []" in done.stdout and (tmp_path / "checkpoints/latest").exists()
