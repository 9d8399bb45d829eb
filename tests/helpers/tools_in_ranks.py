"""Tools of the repository in ranks of the pool."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

from helpers import runs

REPO = Path(__file__).resolve().parents[2]


def run_tool(name: str, argv: list[str]) -> str:
    """Run a tool in a rank as a launcher would start it; return what it prints to stdout."""
    if str(REPO) not in sys.path:
        sys.path.insert(0, str(REPO))
    tool = importlib.import_module(f"tools.{name}")
    runs.set_rank_variables()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        tool.run(tool.parse(argv))
    return out.getvalue()
