"""`make test-gpu` and `make bench-gpu`: what they run, and what they say where they cannot."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks import moe_layer  # noqa: E402
from tools import gpu  # noqa: E402

READY = gpu.Machine("2.13.0", "13.0", 2, ())


@pytest.mark.parametrize(
    "machine, message",
    [
        (gpu.Machine(None, None, 0, ("triton",)), "torch is not installed; run make venv"),
        (gpu.Machine("2.13.0+cpu", None, 0, ()), r"torch 2.13.0\+cpu is a build without CUDA"),
        (gpu.Machine("2.13.0", "13.0", 0, ()), "torch 2.13.0 finds no GPU; check nvidia-smi"),
        (
            gpu.Machine("2.13.0", "13.0", 1, ("triton", "transformers")),
            "not installed: triton transformers; run pip install triton transformers",
        ),
    ],
)
@pytest.mark.parametrize("command", ["test", "bench"])
def test_missing_parts_are_one_line(command, machine, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu.Machine, "inspect", lambda packages: machine)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: pytest.fail("it ran"))
    assert gpu.main([command]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"{command}-gpu: nothing was run: ") and re.search(message, err)


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["test", "-k", "topk"],
            ["-m", "pytest", "-m", "gpu and not slow", "-rs", "-k", "topk"],
        ),
        (["bench", "--quick"], ["benchmarks/moe_layer.py", "--device", "cuda", "--quick"]),
    ],
)
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_command_runs_and_passes_its_code(argv, words, num_gpus, monkeypatch, capsys):
    """Kernels are compiled, and the exit code is that of the command."""
    calls = []
    machine = gpu.Machine("2.13.0", "13.0", num_gpus, ())
    monkeypatch.setattr(gpu.Machine, "inspect", lambda packages: machine)
    monkeypatch.setattr(
        gpu.subprocess,
        "run",
        lambda command, **kwargs: (
            calls.append((command, kwargs)) or SimpleNamespace(returncode=5)
        ),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(argv) == 5
    ((command, kwargs),) = calls
    assert command == [sys.executable, *words]
    assert kwargs["cwd"] == REPO and "TRITON_INTERPRET" not in kwargs["env"]
    out = capsys.readouterr().out
    assert ("NCCL" in out) == (argv[0] == "test" and num_gpus == 1)
    assert out.count("\n") <= 1


def test_machine_is_inspected():
    machine = gpu.Machine.inspect(("torch", "no_such_package"))
    assert machine.torch == torch.__version__ and machine.cuda == torch.version.cuda
    assert machine.num_gpus == torch.cuda.device_count()
    assert machine.missing_packages == ("no_such_package",)
    assert gpu.obstacle(READY) is None and gpu.limitation("test", READY) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_targets_say_what_is_missing_here():
    done = subprocess.run(
        ["make", "-s", "-k", "test-gpu", "bench-gpu", f"VENV={sys.prefix}"],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert [line.split(" torch ")[0] for line in lines] == [
        "test-gpu: nothing was run:",
        "bench-gpu: nothing was run:",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_names_missing_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", "--device", "cuda"])
    assert moe_layer.main() == 2
    assert capsys.readouterr().err == (
        "error: --device is cuda; allowed: cpu, torch finds no GPU\n"
    )


def test_gpu_tests_can_be_collected():
    """`-m gpu` finds the kernels' tests and those of layers, training and document attention."""
    folders = ("tests/gpu", "tests/moe/experts", "tests/moe/peer", "tests/model")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu and not slow", *folders],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stdout
    for file in (
        "tests/gpu/test_layer_on_gpu.py",
        "tests/gpu/test_training_on_gpu.py",
        "tests/moe/experts/test_triton_activation.py",
        "tests/moe/experts/test_triton_grouped_gemm.py",
        "tests/moe/experts/test_triton_mlp.py",
        "tests/moe/peer/test_triton_lookup.py",
        "tests/model/test_document_attention.py::test_varlen_kernel_equals_batches",
    ):
        assert file in done.stdout, file
