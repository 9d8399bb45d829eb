"""Checkpoints of weights alone: what they hold, that runs start from them, and errors."""

from __future__ import annotations

import pytest
import torch

from helpers import runs
from megatron.checkpoint.shards import CheckpointReader
from megatron.checkpoint.weights_only import WeightsSource, write_weights_checkpoint
from megatron.config import cli
from megatron.config.schema import RunConfig, TokenizerConfig
from megatron.interop.model_specs import model_specs
from megatron.io.safetensors_writer import TensorSpec
from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
from megatron.moe.gate import available_gates, gate_config_class
from megatron.tokenizer.build import build_tokenizer

BYTES = TokenizerConfig("ByteTokenizer")
BIAS = torch.tensor([0.5, -0.25])
"""A buffer of the tests' source"""


def tensors_source(tensors, fail_at="") -> WeightsSource:
    """Return a source of tensors in memory; reading `fail_at` fails."""

    def read(name, start, length):
        if name == fail_at:
            raise OSError(f"{name} cannot be read")
        return tensors[name].flatten()[start : start + length]

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    buffers = {"gate.bias": TensorSpec("gate.bias", torch.float32, (2,))}
    return WeightsSource(shapes, buffers, read, lambda name: BIAS)


def write(directory, source, **options):
    tokenizer = build_tokenizer(BYTES)
    return write_weights_checkpoint(
        directory, RunConfig(tokenizer=BYTES), tokenizer, source, **options
    )


def test_checkpoint_has_weights_and_buffers(tmp_path):
    """Values of other dtypes are stored in fp32; there are no moments."""
    tensors = {
        "a.weight": torch.arange(6.0).view(2, 3).bfloat16(),
        "empty": torch.empty(0, 3),
    }
    written = []
    path = write(tmp_path / "out", tensors_source(tensors), progress=written.append)
    reader = CheckpointReader(path)
    assert reader.read("weight", "a.weight").tolist() == [0, 1, 2, 3, 4, 5]
    assert reader.dtype("weight", "a.weight") == torch.float32
    assert reader.read("weight", "empty").numel() == 0
    assert reader.state_keys == ["weight"]
    assert torch.equal(reader.buffer("gate.bias"), BIAS)
    assert sum(written) == 6 * 4 + 2 * 4
    assert path == tmp_path / "out" / "iter_0000000"


def test_failed_write_leaves_nothing(tmp_path):
    source = tensors_source({"a": torch.ones(3), "b": torch.ones(3)}, fail_at="b")
    with pytest.raises(OSError, match="b cannot be read"):
        write(tmp_path / "out", source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("occupied", ["file", "iter_0000007/x"])
def test_occupied_output_is_refused(tmp_path, occupied):
    """A directory with files, and one inside a checkpoint, are left as they are."""
    output = tmp_path / occupied
    output.parent.mkdir(exist_ok=True)
    if occupied == "file":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="the output is"):
        write(output, tensors_source({"a": torch.ones(3)}))
    assert not list(tmp_path.rglob("manifest.json"))


def test_too_small_disk_is_refused(tmp_path):
    source = tensors_source({"a": torch.ones(3)})
    with pytest.raises(OSError, match="MB free"):
        write(tmp_path / "out", source, extra_bytes=1 << 60)
    assert not list(tmp_path.iterdir())


def _flags(data, out, *more):
    return [
        *runs.SHAPE,
        *runs.MOE,
        *("--gate", "topk", "--topk", "2", "--data-path", data, "--split", "100"),
        *("--eval-iters", "0", "--micro-batch-size", "2", "--log-interval", "1"),
        *("--global-batch-size", "4", "--train-iters", "2", "--lr-decay-style", "linear"),
        *("--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")),
        *more,
    ]


def _write_random_model(directory, flags):
    """Write random weights for the model of some flags."""
    config = cli.parse(
        flags, gate_config_class, available_gates, expert_types=KNOWN_EXPERT_TYPES
    )
    specs = model_specs(config, 257)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in specs.shapes.items():
        tensors[name] = torch.randn(shape, generator=generator)

    def read(name, start, length):
        return tensors[name].flatten()[start : start + length]

    source = WeightsSource(specs.shapes, specs.buffers, read, {}.get)
    write_weights_checkpoint(directory, config, build_tokenizer(BYTES), source)


def test_runs_start_from_it(ranks2, data, tmp_path):
    """Another schedule, batch and topology are no contradiction: the checkpoint has none.

    The loss of the first step is that of the weights, whatever else the runs have.
    """
    _write_random_model(tmp_path / "weights", _flags(data, tmp_path, "--lr", "0.1"))
    start = ["--load", str(tmp_path / "weights")]
    losses = []
    for name, more in (
        ("a", ["--zero-stage", "3", *runs.EP2]),
        ("b", ["--lr-decay-style", "cosine"]),
    ):
        out = tmp_path / name
        messages, _ = ranks2.run(
            runs.logged_train, _flags(data, out, *more, *start), timeout=300
        )
        assert not any("instead of" in message for message in messages)
        losses.append(runs.metrics(out)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 6  # random weights, unlike those of the initialization
