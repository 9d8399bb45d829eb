"""Peak memory of upcycling: a few feed-forward layers, whatever the number of layers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import dense_models
from megatron.checkpoint.weights_only import WeightsSource, write_weights_checkpoint
from megatron.interop.model_specs import model_specs
from megatron.tokenizer.build import build_tokenizer

HIDDEN = 512
WIDTH = 8192
FFN_BYTES = 3 * HIDDEN * WIDTH * 4
PROGRAM = """
import resource, sys
from megatron.interop.upcycle.convert import upcycle
from megatron.interop.upcycle.dense_source import open_dense_source
from megatron.interop.upcycle.flags import parse_request

source = open_dense_source(sys.argv[1])
upcycle(source, parse_request(source.config, sys.argv[3:]), sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def random_checkpoint(folder: Path, layers: int) -> Path:
    """Write a dense checkpoint with random weights, without building the model."""
    sizes = {"num_layers": layers, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH}
    config = dense_models.dense_config(**sizes)
    specs = model_specs(config, dense_models.VOCAB_SIZE)

    def read(name: str, start: int, length: int) -> torch.Tensor:
        return torch.randn(length)

    source = WeightsSource(specs.shapes, specs.buffers, read, torch.zeros)
    tokenizer = build_tokenizer(config.tokenizer)
    write_weights_checkpoint(folder, config, tokenizer, source)
    assert sum(map(math.prod, specs.shapes.values())) * 4 > layers * FFN_BYTES
    return folder


def peak_bytes(source: Path, output: Path, *flags: str) -> int:
    argv = [sys.executable, "-c", PROGRAM, str(source), str(output), *flags]
    # Otherwise freed matrices of less than 32 MB stay in the heap, some more in each layer.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=900, env=env, check=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--topk", "2", "--num-experts", "2", "--noise-std", "0.1", "--drop-ratio", "0.5"),
        (
            "--topk",
            "2",
            "--num-experts",
            "16",
            "--strategy",
            "random",
            "--shared-neurons",
            "512",
        ),
    ],
)
def test_memory_does_not_grow_with_layers(tmp_path, flags):
    """From 2 to 8 layers, 300 MB more, the peak grows by less than a layer of 50 MB."""
    few = peak_bytes(random_checkpoint(tmp_path / "2", 2), tmp_path / "a", *flags)
    many = peak_bytes(random_checkpoint(tmp_path / "8", 8), tmp_path / "b", *flags)
    assert many - few < FFN_BYTES
    tiny = tmp_path / "tiny"
    config = dense_models.dense_config()
    dense_models.save(dense_models.build(config), config, tiny)
    base = peak_bytes(tiny, tmp_path / "c", "--num-experts", "2", "--topk", "2")
    assert many - base < 5 * FFN_BYTES
