"""Run shell scripts in their own mount namespace: small and read-only disks for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def namespace_works() -> bool:
    """Return whether this user may mount a tmpfs in its own namespace."""
    done = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return done.returncode == 0


needs_namespace = pytest.mark.skipif(
    not shutil.which("unshare") or not namespace_works(),
    reason="mounting in a namespace is not allowed",
)


def in_namespace(folder: Path, script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a shell script in its own mount namespace.

    `$DISK` is a directory to mount on, `$P` is Python.
    """
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "-", *map(str, arguments)],
        cwd=REPO,
        timeout=100,
        capture_output=True,
        text=True,
        env={**os.environ, "DISK": str(disk), "P": sys.executable},
    )
