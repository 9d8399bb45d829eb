"""Quick runs of benchmarks in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run_quickly(name: str, folder: Path) -> tuple[str, list[dict], Path]:
    """Return (output of a benchmark, its rows, the folder of its temporary files)."""
    temp, rows = folder / "temp", folder / "rows.json"
    temp.mkdir()
    done = subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / name), "--quick", "--json", str(rows)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TMPDIR": str(temp)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(rows.read_text()), temp
