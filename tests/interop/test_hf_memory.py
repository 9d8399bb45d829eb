"""Memory of conversions: they read and write slices, whatever the size of a tensor."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.shards import SLICE_ELEMENTS
from megatron.interop.hf.config_map import run_config_of
from megatron.interop.hf.convert import convert_from_hf
from megatron.interop.hf.registry import find_family
from megatron.interop.hf.source import FileTensor
from megatron.interop.hf.tensor_map import map_tensors
from megatron.interop.model_specs import model_specs
from megatron.io.safetensors_writer import SafetensorsWriter, TensorSpec

REPO = Path(__file__).resolve().parents[2]
CHUNK = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("peak", status["VmHWM"].split()[0], file=sys.stderr)
"""


def write_mixtral(folder: Path, files: int, fused: bool = False, **keys) -> int:
    """Write a random Mixtral in bf16 to some files, a chunk at a time.

    Returns:
        The size of the largest file in bytes.
    """
    content = {
        "model_type": "mixtral",
        "vocab_size": 1000,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
        "dtype": "bfloat16",
        **keys,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    family = find_family("mixtral")
    specs = model_specs(run_config_of(family, content), 1000)
    shapes = map_tensors(family, family.layouts[int(fused)], specs.all_shapes).shapes
    names = list(shapes)
    weight_map = {}
    for number in range(files):
        file = f"model-{number}.safetensors"
        part = [TensorSpec(name, torch.bfloat16, shapes[name]) for name in names[number::files]]
        with SafetensorsWriter(folder / file, part, {"format": "pt"}) as writer:
            for spec in part:
                writer.write_parts(chunks(math.prod(spec.shape)))
            writer.finish()
        weight_map |= {spec.name: file for spec in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def chunks(numel: int):
    for start in range(0, numel, len(CHUNK)):
        yield CHUNK[: min(len(CHUNK), numel - start)]


def peak_bytes(tool: str, *arguments) -> int:
    """Run a tool and return its peak resident memory."""
    command = [sys.executable, "-c", PEAK, str(REPO / "tools" / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rsplit("peak", 1)[1].split()[0]) * 1024


def test_reads_are_slices_of_tensors(tmp_path, monkeypatch):
    """No read is larger than a slice, though tensors are."""
    source = tmp_path / "hf"
    keys = {"hidden_size": 64, "num_hidden_layers": 1, "num_local_experts": 3}
    write_mixtral(source, 1, fused=True, **keys, intermediate_size=10_000)
    read = []
    unpatched = FileTensor.read

    def recorded(self, start, length):
        read.append(length)
        return unpatched(self, start, length)

    monkeypatch.setattr(FileTensor, "read", recorded)
    convert_from_hf(source, tmp_path / "ours")
    assert max(read) <= SLICE_ELEMENTS < 3 * 64 * 10_000
    assert sum(read) > 3 * 3 * 64 * 10_000


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_peak_memory_does_not_follow_the_model(tmp_path, fused):
    """2 GB in both directions: below 1.5 x the largest file + 1 GB, program included."""
    largest = write_mixtral(
        tmp_path / "hf",
        4,
        fused,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=10,
        num_local_experts=8,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 2e9
    limit = 1.5 * largest + 1e9
    reading = peak_bytes("convert_from_hf.py", tmp_path / "hf", tmp_path / "ours")
    writing = peak_bytes("convert_to_hf.py", tmp_path / "ours", tmp_path / "back")
    print(
        f"{size / 1e9:.2f} GB, files up to {largest / 1e9:.2f} GB; peak reading "
        f"{reading / 1e9:.2f} GB, writing {writing / 1e9:.2f} GB"
    )
    assert reading < limit and writing < limit
    for path in (tmp_path / "hf").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
