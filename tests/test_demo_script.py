"""The demo's choice of precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.scripts import config_of, launch_command, run_script

DEMO = Path(__file__).resolve().parents[1] / "examples_deepspeed/MoE/demo.sh"


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
    fixed = {"PYTHON": "/bin/echo", "DRY_RUN": "1", "CPUINFO": str(cpuinfo)}
    done = run_script(DEMO, OUTPUT_DIR=str(tmp_path), **fixed, **env)
    assert done.returncode == 0, done.stderr
    assert config_of(launch_command(done.stdout)).optimizer.precision == precision
