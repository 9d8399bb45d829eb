"""Tiny studies for tests, run with a stand-in for pretrain_gpt.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron.analysis.compare.cell_folders import CellFolders
from megatron.analysis.compare.devices import parse_devices
from megatron.analysis.compare.output import prepare_output
from megatron.analysis.compare.plan import StudyPlan, plan_study
from megatron.analysis.compare.results import StudyResults
from megatron.analysis.compare.runner import RunnerOptions, RunSummary, StudyRunner
from megatron.analysis.compare.study_file import read_study
from megatron.pretrain import parse_flags

REPO = Path(__file__).resolve().parents[2]
FAKE_PROGRAM = Path(__file__).resolve().with_name("fake_pretrain.py")

BASE = {
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 2,
    "seq-length": 32,
    "ffn-hidden-size": 64,
    "tokenizer-type": "ByteTokenizer",
    "make-vocab-size-divisible-by": 1,
    "num-experts": 4,
    "moe-ffn-hidden-size": 32,
    "expert-interval": 2,
    "mock-data": True,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "train-iters": 20,
    "lr": "5e-3",
    "log-interval": 1,
    "eval-interval": 10,
    "eval-iters": 1,
}
TOPK = {"gate": "topk", "topk": 2}
THRESHOLD = {"gate": "threshold", "threshold": 0.8, "experts-per-token": 2}
STUDY = {
    "name": "tiny",
    "base": BASE,
    "axes": {"gate": {"topk": TOPK, "xmoe": THRESHOLD}},
    "seeds": [1, 2],
}


def write_study(folder: Path, **more: Any) -> Path:
    """Write the file of a tiny study; `more` replaces its keys."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **more}, sort_keys=False))
    return path


def tiny_plan(folder: Path, **more: Any) -> StudyPlan:
    return plan_study(read_study(write_study(folder, **more)), parse_flags)


def run_study(
    folder: Path,
    *,
    devices: str = "cpu",
    rerun: list[str] | None = None,
    program: Path = FAKE_PROGRAM,
    remove_checkpoints: bool = False,
    **more: Any,
) -> tuple[RunSummary, StudyResults]:
    """Run a tiny study in `folder`/out, and return what became of its cells."""
    plan = tiny_plan(folder, **more)
    folders = CellFolders(folder / "out")
    prepare_output(plan, folders, rerun)
    chosen = parse_devices(devices, plan.study.ranks)
    options = RunnerOptions(program, chosen, remove_checkpoints)
    summary = StudyRunner(plan, folders, options).run()
    return summary, StudyResults.read(folders.root)
