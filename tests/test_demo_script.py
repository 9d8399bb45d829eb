"""The demo's choice of precision."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU has bf16")
@pytest.mark.parametrize(
    "cpu_flags, env, precision",
    [
        ("fma avx2 bmi2", {}, "fp32"),
        ("avx2 avx512f avx512_bf16", {}, "bf16"),
        ("asimd bf16", {}, "bf16"),
        ("fma avx2 bmi2", {"PRECISION": "bf16"}, "bf16"),
    ],
)
def test_demo_uses_bf16_where_the_cpu_is_fast(cpu_flags, env, precision, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: {cpu_flags}\n")
    variables = {"DRY_RUN": "1", "CPUINFO": str(cpuinfo), "OUTPUT_DIR": str(tmp_path), **env}
    # The table of sizes after the command fails, because there is no tokenizer yet.
    done = subprocess.run(
        ["bash", str(REPO / "examples_deepspeed/MoE/demo.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )
    command = next(line for line in done.stdout.splitlines() if line.startswith("deepspeed"))
    assert ("--bf16" in shlex.split(command)) == (precision == "bf16")
