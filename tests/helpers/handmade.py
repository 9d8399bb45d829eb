"""Checkpoints with chosen tensors and shards, written without an engine; tools run in-process."""

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
from megatron.checkpoint.manifest import write_with_digest
from megatron.checkpoint.metadata import RunMetadata, TrainingProgress
from megatron.checkpoint.shards import (
    ShardRange,
    make_index,
    rank_file_name,
    write_tensors,
)
from megatron.config.format_version import with_version
from megatron.config.run_json import run_json_text
from megatron.config.schema import MoEConfig, RunConfig
from megatron.io.safetensors_writer import TensorSpec
from megatron.io.sha256 import FileDigest

REPO = Path(__file__).resolve().parents[2]
CONFIG = RunConfig(
    moe=MoEConfig(num_experts=4, gate="threshold"),
    gate_options={"threshold": {"threshold": 0.8}},
)
IDENTITY = {
    "tokenizer_name": "ByteTokenizer",
    "tokenizer_vocab_size": 257,
    "tokenizer_fingerprint": "f00d",
}
COUNTERS = {"global_steps": 3, "skipped_steps": 0, "global_samples": 24}
STATE_FACTORS = {"weight": 1.0, "exp_avg": 10.0, "exp_avg_sq": 100.0}
"""What is stored of a tensor: the tensor times a factor, by state key"""


def split_evenly(tensors: dict[str, Tensor], ranks: int) -> list[list[ShardRange]]:
    """Return the shards of every rank when each tensor is cut into as many ranges as ranks."""
    shards = []
    for rank in range(ranks):
        owned = []
        for name, tensor in tensors.items():
            start = tensor.numel() * rank // ranks
            stop = tensor.numel() * (rank + 1) // ranks
            if start < stop:
                owned.append(ShardRange(name, start, stop - start))
        shards.append(owned)
    return shards


def write_rank_files(
    folder: Path,
    tensors: dict[str, Tensor],
    shards: list[list[ShardRange]],
    state_keys: list[str],
    buffers: dict[str, Tensor],
) -> dict[str, FileDigest]:
    """Write the ranks' files and index.json. Returns their digests."""
    files = {}
    for rank, owned in enumerate(shards):
        stored = {}
        for key in state_keys:
            for name, start, length in owned:
                values = tensors[name].flatten()[start : start + length]
                stored[f"{key}/{name}"] = values * STATE_FACTORS[key]
        if rank == 0:
            stored |= {f"buffer/{name}": tensor for name, tensor in buffers.items()}
        specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in stored.items()]
        file_name = rank_file_name(rank)
        files[file_name] = write_tensors(folder / file_name, specs, stored.__getitem__)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    index = make_index(shards, shapes, state_keys, list(buffers))
    files["index.json"] = write_with_digest(
        folder / "index.json", json.dumps(with_version(index))
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
    shards: list[list[ShardRange]] | None = None,
    **state,
) -> Path:
    """Commit a checkpoint to a directory of checkpoints.

    Args:
        moments: Whether it has moments, which are the weights times 10 and 100.
        shards: The shards of every rank; by default every tensor is cut evenly.
        state: Other content for state.json.
    """
    partial = folder / "partial"
    partial.mkdir(parents=True)
    state_keys = list(STATE_FACTORS) if moments else ["weight"]
    shards = shards or split_evenly(tensors, ranks)
    files = write_rank_files(partial, tensors, shards, state_keys, buffers or {})
    metadata = RunMetadata(
        config,
        IDENTITY,
        {"ranks": ranks, "expert_parallel_size": 1, "zero_stage": 2, "precision": "bf16"},
        8,
        100,
        {"corpus": {"bin_bytes": 10, "idx_bytes": 20}},
    )
    content = {
        **metadata.to_state(),
        "progress": TrainingProgress(iteration, 8 * iteration, 2048 * iteration).to_state(),
        "optimizer": {"steps": iteration * moments, "counters": COUNTERS, "scaler": {}},
        **state,
    }
    files["run.json"] = write_with_digest(partial / "run.json", run_json_text(config))
    files["state.json"] = write_with_digest(
        partial / "state.json", json.dumps(with_version(content))
    )
    return directory.commit_checkpoint(partial, folder, iteration, files)


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return random fp32 tensors of these shapes; `__` in a name stands for a point."""
    g = torch.Generator().manual_seed(len(shapes))
    return {
        name.replace("__", "."): torch.randn(shape, generator=g)
        for name, shape in shapes.items()
    }


def main(tool: str, *arguments) -> int:
    """Run a tool in this process and return its exit code."""
    argv = sys.argv
    sys.argv = [f"{tool}.py", *map(str, arguments)]
    try:
        return importlib.import_module(f"tools.{tool}").main()
    finally:
        sys.argv = argv


def run(script: str, *arguments, code: int = 0, cwd: Path | None = None) -> SimpleNamespace:
    """Run a tool in this process. Returns its stdout and stderr."""
    out = io.StringIO()
    err = io.StringIO()
    here = os.getcwd()
    os.chdir(cwd or here)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            returned = main(script.removesuffix(".py"), *arguments)
    finally:
        os.chdir(here)
    assert returned == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def program(script: str, *arguments, before: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a tool as a program, after some Python code."""
    code = (
        f"import runpy, sys; {before}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(REPO / "tools" / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )


def damage(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
