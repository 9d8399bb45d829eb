"""Checkpoints of any pieces, written by hand without any engine."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron.checkpoint import directory
from megatron.checkpoint.metadata import RunMetadata
from megatron.checkpoint.reader import make_index, shard_name, write_tensors
from megatron.config.schema import MoEConfig, RunConfig
from megatron.io import sha256
from megatron.io.safetensors_writer import TensorSpec

REPO = Path(__file__).resolve().parents[2]
CONFIG = RunConfig(
    moe=MoEConfig(num_experts=4, gate="threshold"), gate_options={"threshold": 0.8}
)
IDENTITY = {
    "tokenizer_name": "ByteTokenizer",
    "tokenizer_vocab_size": 257,
    "tokenizer_fingerprint": "f00d",
}
Pieces = list[list[tuple[str, int, int]]]


def evenly(tensors: dict[str, Tensor], ranks: int) -> Pieces:
    """By rank, (tensor, start, length): every tensor cut into as many ranges as there are ranks."""
    cuts = {
        name: [t.numel() * r // ranks for r in range(ranks + 1)] for name, t in tensors.items()
    }
    return [
        [
            (name, cut[r], cut[r + 1] - cut[r])
            for name, cut in cuts.items()
            if cut[r] < cut[r + 1]
        ]
        for r in range(ranks)
    ]


def write_pieces(
    folder: Path,
    tensors: dict[str, Tensor],
    pieces: Pieces,
    kinds: dict[str, float],
    buffers: dict[str, Tensor],
) -> dict[str, tuple[int, str]]:
    """The ranks' files and index.json. Each kind is the tensors times a factor."""
    files = {}
    for rank, owned in enumerate(pieces):
        stored = {
            f"{kind}/{name}": tensors[name].flatten()[start : start + length] * factor
            for kind, factor in kinds.items()
            for name, start, length in owned
        }
        if rank == 0:
            stored |= {f"buffer/{name}": tensor for name, tensor in buffers.items()}
        entries = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in stored.items()]
        files[shard_name(rank)] = write_tensors(
            folder / shard_name(rank), entries, stored.__getitem__
        )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    (folder / "index.json").write_text(
        json.dumps(make_index(pieces, shapes, list(kinds), list(buffers)))
    )
    return files


def checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    ranks: int = 2,
    *,
    iteration: int = 3,
    moments: bool = True,
    buffers: dict[str, Tensor] | None = None,
    config: RunConfig = CONFIG,
    pieces: Pieces | None = None,
    **state,
) -> Path:
    """A checkpoint in a folder of checkpoints; the moments are the weights times 10 and 100."""
    partial = folder / "partial"
    partial.mkdir(parents=True)
    kinds = {"weight": 1.0, **({"exp_avg": 10.0, "exp_avg_sq": 100.0} if moments else {})}
    files = write_pieces(
        partial, tensors, pieces or evenly(tensors, ranks), kinds, buffers or {}
    )
    record = RunMetadata(
        config,
        IDENTITY,
        {"ranks": ranks, "expert_parallel_size": 1, "zero_stage": 2, "precision": "bf16"},
        8,
        100,
        {"corpus": {"bin_bytes": 10, "idx_bytes": 20}},
    )
    progress = {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "consumed_tokens": 2048 * iteration,
    }
    content = {
        **record.state(),
        "progress": progress,
        "optimizer": {"steps": iteration * moments, "counters": {}, "scaler": {}},
        **state,
    }
    (partial / "run.json").write_text(json.dumps(config.to_dict()))
    (partial / "state.json").write_text(json.dumps(content))
    for name in ("run.json", "state.json", "index.json"):
        files[name] = ((partial / name).stat().st_size, sha256.file_sha256(partial / name))
    return directory.commit_checkpoint(partial, folder, iteration, files)


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random fp32 tensors of these shapes; `__` in a name stands for a point."""
    g = torch.Generator().manual_seed(len(shapes))
    return {
        name.replace("__", "."): torch.randn(shape, generator=g)
        for name, shape in shapes.items()
    }


def run(script: str, *arguments, code: int = 0, cwd: Path | None = None) -> SimpleNamespace:
    """A tool with its arguments, in this process: its stdout and stderr."""
    tool = importlib.import_module(f"tools.{script.removesuffix('.py')}")
    out, err, argv, here = io.StringIO(), io.StringIO(), sys.argv, os.getcwd()
    sys.argv = [script, *map(str, arguments)]
    os.chdir(cwd or here)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            returned = tool.main()
    finally:
        sys.argv = argv
        os.chdir(here)
    assert returned == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def program(script: str, *arguments, before: str, cwd: Path) -> subprocess.CompletedProcess:
    """A tool as a program in which some Python ran before."""
    code = f"import runpy, sys; {before}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(REPO / "tools" / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )


def damage(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
