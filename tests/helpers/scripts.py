"""Running the shipped shell scripts, and reading the command that they would start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron.config import cli
from megatron.config.schema import RunConfig
from megatron.moe.gate import available_gates, gate_config_class


def run_script(
    path: Path, *arguments: str, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a bash script with this Python; PYTHON=/bin/echo leaves out what Python would do."""
    return subprocess.run(
        ["bash", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **env},
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    """Write a program that is found before the real one."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / name
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


def launch_command(printed: str) -> list[str]:
    """Return the words of the launcher's command that a script prints under DRY_RUN=1."""
    return shlex.split(
        next(line for line in printed.splitlines() if line.startswith("deepspeed"))
    )


def config_of(words: list[str]) -> RunConfig:
    """Return the configuration that pretrain_gpt.py would parse from a launcher's command."""
    start = next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
    return cli.parse(words[start + 1 :], gate_config_class, available_gates)
