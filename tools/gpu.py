"""Runs the tests, or the benchmark, that need a GPU, or says in one line what is missing for it.

    python tools/gpu.py test [arguments of pytest]
    python tools/gpu.py bench [arguments of benchmarks/moe_layer.py]

`make test-gpu` and `make bench-gpu` call it. The exit code is 2 if nothing can run here, and
otherwise that of pytest or of the benchmark.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
COMMANDS = {
    "test": ("-m", "pytest", "-m", "gpu and not slow", "-rs"),
    "bench": ("benchmarks/moe_layer.py", "--device", "cuda"),
}
PACKAGES = {"test": ("triton",), "bench": ("triton", "transformers")}
"""Packages that the command needs, and which no other check names"""


@dataclass(frozen=True)
class Machine:
    """What matters of this machine and environment."""

    torch: str | None
    """version of torch; None: not installed"""
    cuda: str | None
    """version of CUDA that torch was built with; None: a build without CUDA"""
    num_gpus: int
    missing_packages: tuple[str, ...]

    @staticmethod
    def inspect(packages: Sequence[str]) -> Machine:
        """Inspect this machine; which of the packages are missing is looked up, too."""
        missing = tuple(name for name in packages if importlib.util.find_spec(name) is None)
        if importlib.util.find_spec("torch") is None:
            return Machine(None, None, 0, missing)
        import torch

        return Machine(
            torch.__version__, torch.version.cuda, torch.cuda.device_count(), missing
        )


def obstacle(machine: Machine) -> str | None:
    """Return why nothing can run here and what to do, in one line; None if it can."""
    if machine.torch is None:
        return "torch is not installed; run make venv first"
    if machine.cuda is None:
        return (
            f"torch {machine.torch} is a build without CUDA; install one with CUDA on a machine "
            "with a GPU"
        )
    if machine.num_gpus == 0:
        return (
            f"torch {machine.torch} finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or "
            "use a machine with one"
        )
    if machine.missing_packages:
        names = " ".join(machine.missing_packages)
        return f"these packages are not installed: {names}; run pip install {names}"
    return None


def limitation(command: str, machine: Machine) -> str | None:
    """Return what will not run here, in one line; None if everything does."""
    if command == "test" and machine.num_gpus == 1:
        return "1 GPU: exchanges between GPUs (NCCL) are skipped, they need 2 or more"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    args, rest = parser.parse_known_args(argv)
    machine = Machine.inspect(PACKAGES[args.command])
    missing = obstacle(machine)
    if missing is not None:
        print(f"{args.command}-gpu: nothing was run: {missing}", file=sys.stderr)
        return 2
    partly = limitation(args.command, machine)
    if partly is not None:
        print(f"{args.command}-gpu: {partly}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    # Kernels are to be compiled, not interpreted.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *COMMANDS[args.command], *rest]
    return subprocess.run(command, cwd=REPO, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
