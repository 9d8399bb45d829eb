"""The model of a checkpoint for inference: the dtypes and logits of the training engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import engines
from megatron.checkpoint import loader
from megatron.checkpoint.manifest import CorruptCheckpointError
from megatron.config.checkpoint import CheckpointConfig
from megatron.inference.model import cast_for_inference
from megatron.model.builder import build_model
from megatron.parallel.groups import Groups

CPU = torch.device("cpu")


def model_of(config, groups):
    return build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=engines.MODEL.vocab_size,
        seed=7,
        groups=groups,
    )


def _logits(config):
    """Run on a rank: logits and dtypes of the engine's model, and of one for inference."""
    run = engines.Run(config)
    run.close()
    precision = config.optimizer.precision
    model = model_of(config, run.groups)
    tokens_BS = torch.arange(8).view(1, 8)
    answers = []
    for candidate in (
        run.engine.model.eval(),
        cast_for_inference(model, precision, CPU),
    ):
        with torch.no_grad():
            logits = candidate(tokens_BS).logits
        dtypes = {name: p.dtype for name, p in candidate.named_parameters()}
        answers.append((logits, dtypes, candidate.training))
    return answers


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["deepseek_v3", "peer"])
def test_inference_equals_evaluation_of_engine(gate, precision, stage, ranks2):
    config = engines.config_of(gate, 2, stage, precision)
    for (expected, engine_dtypes, _), (logits, dtypes, training) in ranks2.run(_logits, config):
        assert torch.equal(logits, expected) and logits.dtype == expected.dtype
        assert dtypes == engine_dtypes and not training


def test_fp16_computes_in_fp32_on_cpu():
    model = cast_for_inference(model_of(engines.config_of("topk", 1, 1), Groups()), "fp16", CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_impossible_sizes_are_refused(ranks1, tmp_path):
    """Before any memory is allocated for what a foreign run.json describes."""
    config = engines.config_of("topk", 1, 1, save=str(tmp_path))
    ranks1.run(engines.train, config, 1)
    loaded = loader.find_checkpoint(CheckpointConfig(load=str(tmp_path)), Groups())
    loaded.check_sizes()
    loaded.check_model(model_of(config, Groups()), Groups())
    saved = loaded.metadata
    for changes, message in (
        (
            {"num_layers": 10**9},
            "has 1000000000 layers; allowed: up to the 2. tensors in index",
        ),
        ({"seq_length": 2**40}, "has 1099511627776 positions; allowed: up to 134217728"),
    ):
        model = replace(config.model, **changes)
        loaded.metadata = replace(saved, config=replace(config, model=model))
        with pytest.raises(CorruptCheckpointError, match=message):
            loaded.check_sizes()
    other = replace(config, model=replace(config.model, hidden_size=32))
    with pytest.raises(CorruptCheckpointError, match="index.json does not fit the model"):
        loaded.check_model(model_of(other, Groups()), Groups())
