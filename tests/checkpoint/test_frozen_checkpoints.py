"""Checkpoints of runs with frozen parameters: resumed, moved, unfrozen, consolidated, shown."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import engines
from megatron.checkpoint import consolidate, inspect
from megatron.checkpoint.inspect_text import format_checkpoint, format_tensors
from megatron.checkpoint.shards import CheckpointReader, ShardRange, make_index
from megatron.config.schema import RunConfig
from megatron.log import get_logger
from megatron.model.builder import build_model
from megatron.model.parameter_count import count_parameters
from megatron.parallel.groups import Groups

DENSE = r"q_proj|down_proj$|embed"
EXPERTS = r"\.experts\.|\.gate\."
NORM_ONLY = r"^(?!norm\.weight$)"


def check_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    "stage, ep_size, precision, pattern",
    [
        (0, 1, "fp32", DENSE),
        (1, 2, "bf16", EXPERTS),
        (2, 2, "fp32", EXPERTS),
        (3, 2, "bf16", DENSE),
    ],
)
def test_frozen_run_resumes_bit_by_bit(stage, ep_size, precision, pattern, ranks2, tmp_path):
    config = engines.config_of(
        "topk" if stage else "",
        ep_size,
        stage,
        precision,
        save=str(tmp_path),
        async_save=stage == 1,
    )
    uninterrupted = ranks2.run(engines.train, config, 2, 2, 7, pattern)
    loading = engines.loading(config, tmp_path)
    resumed = ranks2.run(engines.train, loading, 0, 2, 8, pattern)
    for (_, losses, weights, norm), (_, our_losses, our_weights, our_norm) in zip(
        uninterrupted, resumed, strict=True
    ):
        assert losses == our_losses and norm == our_norm
        check_equal(weights, our_weights)


@pytest.fixture(scope="module")
def saved(ranks2, tmp_path_factory) -> dict:
    """Folders of checkpoints of two ranks with EP 2, by (stage, precision, pattern)."""
    folders = {}
    for key in [
        (1, "bf16", EXPERTS),
        (2, "fp32", NORM_ONLY),
        (3, "bf16", DENSE),
        (3, "bf16", "(?!)"),
    ]:
        stage, precision, pattern = key
        folder = tmp_path_factory.mktemp("saved")
        config = engines.config_of("topk", 2, stage, precision, save=str(folder))
        ranks2.run(engines.train, config, 2, 0, 7, pattern)
        folders[key] = folder
    return folders


@pytest.mark.parametrize(
    "key, stage, ranks, ep_size",
    [
        ((1, "bf16", EXPERTS), 3, 1, 1),
        ((1, "bf16", EXPERTS), 2, 4, 2),
        ((2, "fp32", NORM_ONLY), 3, 2, 2),
        ((2, "fp32", NORM_ONLY), 1, 1, 1),
        ((3, "bf16", DENSE), 2, 1, 1),
        ((3, "bf16", DENSE), 1, 2, 1),
    ],
)
def test_frozen_run_moves_bit_by_bit(key, stage, ranks, ep_size, saved, request, tmp_path):
    """Saved again on another topology, weights and moments are equal, and so is what is frozen."""
    _, precision, pattern = key
    config = engines.loading(
        engines.config_of("topk", ep_size, stage, precision), saved[key], tmp_path
    )
    request.getfixturevalue(f"ranks{ranks}").run(engines.train, config, 0, 1, 8, pattern)
    check_equal(engines.full_tensors(tmp_path), engines.full_tensors(saved[key]))
    assert reader_of(tmp_path).frozen == reader_of(saved[key]).frozen != set()


def reader_of(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder / engines.latest(folder))


def _resume(config: RunConfig, pattern: str) -> tuple[list[str], list[float]]:
    """Load and save in a rank; return log lines about moments and the losses of two steps."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = get_logger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        run = engines.Run(config, 8, pattern)
        run.save()
        losses = run.steps(2)
        run.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [message for message in messages if "moments" in message], losses


@pytest.mark.parametrize("stage, ep_size", [(1, 2), (2, 1), (3, 2)])
def test_unfrozen_parameters_start_without_moments(stage, ep_size, saved, ranks2, tmp_path):
    """Frozen in the saved run, trained now: weights as saved, moments 0, the others' as saved."""
    folder = saved[3, "bf16", DENSE]
    before = engines.full_tensors(folder)
    frozen = reader_of(folder).frozen
    config = engines.config_of("topk", ep_size, stage, "bf16")
    answers = ranks2.run(_resume, engines.loading(config, folder, tmp_path), "(?!)")
    line = (
        f"{len(frozen)} parameters that were frozen in {folder / 'iter_0000002'} are trained, "
        "such as embed_tokens.weight: their moments start at zero"
    )
    assert [messages for messages, _ in answers] == [[line], [line]]
    after = engines.full_tensors(tmp_path)
    assert reader_of(tmp_path).frozen == set()
    zeros = {}
    for name in frozen:
        for key in ("exp_avg", "exp_avg_sq"):
            zeros[f"{key}/{name}"] = torch.zeros_like(before[f"weight/{name}"])
    check_equal(after, before | zeros)
    assert all(torch.isfinite(torch.tensor(losses)).all() for _, losses in answers)


@pytest.mark.parametrize("stage, ep_size", [(1, 1), (2, 2), (3, 2)])
def test_newly_frozen_parameters_lose_moments(stage, ep_size, saved, ranks2, tmp_path):
    """Trained in the saved run, frozen now: fp32 weights as saved, no moments."""
    folder = saved[3, "bf16", "(?!)"]
    before = engines.full_tensors(folder)
    config = engines.config_of("topk", ep_size, stage, "bf16")
    answers = ranks2.run(_resume, engines.loading(config, folder, tmp_path), EXPERTS)
    frozen = reader_of(tmp_path).frozen
    line = (
        f"{len(frozen)} parameters that were trained in {folder / 'iter_0000002'} are frozen, "
        "such as layers.0.mlp.experts.w1: their moments are not loaded"
    )
    assert [messages for messages, _ in answers] == [[line], [line]]
    expected = {
        key: tensor
        for key, tensor in before.items()
        if key.startswith("weight/") or key.split("/", 1)[1] not in frozen
    }
    check_equal(engines.full_tensors(tmp_path), expected)


def test_equally_frozen_run_logs_nothing(saved, ranks2, tmp_path):
    config = engines.config_of("topk", 2, 1, "bf16")
    config = engines.loading(config, saved[3, "bf16", DENSE], tmp_path)
    assert ranks2.run(_resume, config, DENSE)[0][0] == []


@pytest.mark.parametrize("key", [(1, "bf16", EXPERTS), (3, "bf16", DENSE)])
def test_consolidated_frozen_weights_are_exact(key, saved, tmp_path):
    """Frozen weights have the bits of the initial ones; moments are those of trained parameters."""
    folder = saved[key]
    options = consolidate.ConsolidateOptions(optimizer=True)
    source = consolidate.find_verified_checkpoint(folder)
    consolidate.consolidate(source, tmp_path / "out", options)
    weights = load_file(tmp_path / "out/model.safetensors")
    stored = engines.full_tensors(folder)
    check_equal(
        weights,
        {name.split("/", 1)[1]: t for name, t in stored.items() if name.startswith("weight/")},
    )
    model = fresh_model()
    frozen = set(engines.frozen_names(model, key[2]))
    for name, initial in model.named_parameters():
        assert torch.equal(weights[name], initial) == (name in frozen)
    moments = load_file(tmp_path / "out/optimizer.safetensors")
    trained = weights.keys() - frozen
    assert moments.keys() == {f"{k}/{n}" for k in ("exp_avg", "exp_avg_sq") for n in trained}


def fresh_model() -> torch.nn.Module:
    """Build the model that the saved runs started with."""
    config = engines.config_of("topk", 1, 1)
    return build_model(config.model, config.moe, {}, vocab_size=61, seed=7, groups=Groups())


def test_summary_counts_trainable_parameters(saved):
    folder = saved[1, "bf16", EXPERTS]
    found = inspect.summarize_checkpoint(
        inspect.resolve_checkpoint(folder), verify=True, tensors=True
    )
    model = fresh_model()
    engines.freeze(model, EXPERTS)
    size = count_parameters(model)
    frozen = engines.frozen_names(model, EXPERTS)
    assert found["faults"] == [] and json.loads(json.dumps(found)) == found
    assert found["parameters"] == {
        "total": size.total,
        "trainable": size.trainable,
        "parts": size.parts,
    }
    assert {name for name, entry in found["tensors"].items() if "frozen" in entry} == {*frozen}
    text = [" ".join(line.split()) for line in format_checkpoint(found)]
    assert f"total {size.total:,}" in text and f"trainable {size.trainable:,}" in text
    number = len(found["tensors"])
    start = f"holds weights and moments of {number} parameters, {len(frozen)} of them frozen, "
    assert any(line.startswith(start) for line in text)
    rows = {line.split()[0]: line for line in format_tensors(found)}
    assert {name for name, row in rows.items() if row.endswith("frozen")} == {*frozen}
    unfrozen = inspect.summarize_checkpoint(
        inspect.resolve_checkpoint(saved[3, "bf16", "(?!)"])
    )
    difference = inspect.compare_checkpoints(found, unfrozen)
    assert difference["run"]["trainable parameters"] == [size.trainable, size.total]


def test_index_marks_frozen_parameters_only():
    shards = [[ShardRange("a", 0, 2), ShardRange("b", 0, 3)]]
    index = make_index(shards, {"a": (2,), "b": (3,)}, ["weight", "exp_avg"], [], {"b"})
    assert "frozen" not in index["tensors"]["a"] and index["tensors"]["b"]["frozen"] is True
