"""A step's loss is a sum over the target tokens of the global batch divided by their number.

With uneven loss masks the means of micro-batches must be weighted by their tokens: any split of
the global batch over micro-batches and ranks then gives the same loss and the same update.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import engines, runs
from megatron.data.indexed.writer import IndexedWriter
from megatron.engine.loss import means, term_weights
from megatron.parallel.groups import Groups
from megatron.training.task import AUX_LOSS, LM_LOSS, NextTokenLoss

EOD = 256
TOLERANCE = 1e-6
# (ranks, micro-batch size) of a global batch of 8 samples.
SPLITS = [(1, 8), (1, 2), (1, 1), (2, 4), (2, 1)]


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory) -> str:
    """Write documents of 1 to 12 tokens: the loss masks of samples differ by many tokens."""
    prefix = str(tmp_path_factory.mktemp("short") / "short_text_document")
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for i in range(400):
            length = 1 if i % 40 < 12 else int(generator.integers(4, 13))
            tokens = generator.integers(0, 256, length)
            writer.add_document(np.append(tokens, EOD))
        writer.finish({"eod": EOD})
    return prefix


def flags(data: str, out: Path, micro_batch: int, *more: str) -> list[str]:
    """Flags of two steps in fp32. Adam's epsilon is large, so that rounding is not amplified."""
    return [
        *runs.SHAPE,
        *runs.MOE,
        *[
            "--gate",
            "topk",
            "--topk",
            "2",
            "--moe-loss-coeff",
            "0",
            "--eod-mask-loss",
            "--split",
            "80,15,5",
        ],
        *[
            "--global-batch-size",
            "8",
            "--train-iters",
            "2",
            "--eval-iters",
            "1",
            "--eval-interval",
            "1",
        ],
        *[
            "--lr",
            "1e-2",
            "--adam-eps",
            "1e-2",
            "--log-interval",
            "1",
            "--lr-decay-style",
            "constant",
        ],
        *["--micro-batch-size", str(micro_batch), "--data-path", data],
        *["--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")],
        *more,
    ]


@pytest.fixture(scope="module")
def results(short_documents, tmp_path_factory, ranks1, ranks2) -> dict:
    """Train with every split; (logged rows, final tensors) by split."""
    pools = {1: ranks1, 2: ranks2}
    trained = {}
    for ranks, micro_batch in SPLITS:
        out = tmp_path_factory.mktemp(f"ranks{ranks}_micro{micro_batch}")
        pools[ranks].run(runs.train, flags(short_documents, out, micro_batch), timeout=300)
        rows = {kind: runs.metrics(out, kind) for kind in ("train", "eval")}
        trained[ranks, micro_batch] = (rows, engines.full_tensors(out / "checkpoints"))
    return trained


@pytest.mark.parametrize("split", SPLITS[1:])
def test_training_loss_independent_of_split(results, split):
    rows = results[split][0]["train"]
    expected = results[SPLITS[0]][0]["train"]
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_evaluation_loss_independent_of_split(results, split):
    rows = results[split][0]["eval"]
    expected = results[SPLITS[0]][0]["eval"]
    assert len(rows) == 3
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_updated_weights_independent_of_split(results, split):
    tensors = results[split][1]
    expected = results[SPLITS[0]][1]
    weights = [name for name in expected if name.startswith("weight/")]
    assert len(weights) > 10
    for name in weights:
        torch.testing.assert_close(tensors[name], expected[name], atol=TOLERANCE, rtol=0)


def test_masks_of_the_test_are_uneven(short_documents):
    """The test would show nothing if micro-batches had the same number of targets."""
    from megatron.data.indexed.reader import IndexedDataset

    dataset = IndexedDataset(short_documents)
    tokens = np.concatenate([dataset.read(i) for i in range(dataset.num_documents)])
    samples = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
    targets = (samples != EOD).sum(1)
    assert targets.max() - targets.min() >= 8


def test_term_weights_are_exactly_one_for_equal_normalizers():
    """Multiplying by them changes no bit of a run without uneven masks."""
    batches = [{LM_LOSS: torch.tensor(8191.0), AUX_LOSS: torch.tensor(1.0)}] * 7
    for weight in term_weights(batches, Groups()):
        assert weight[LM_LOSS].item() == 1.0
        assert weight[AUX_LOSS].item() == 1.0


def test_term_weights_give_the_mean_over_all_targets():
    numbers = [3.0, 0.0, 5.0]
    sums = [6.0, 0.0, 25.0]
    normalizers = [{LM_LOSS: torch.tensor(n)} for n in numbers]
    weights = term_weights(normalizers, Groups())
    total = 0.0
    for loss_sum, normalizer, weight in zip(sums, normalizers, weights, strict=True):
        mean = means({LM_LOSS: torch.tensor(loss_sum)}, normalizer)
        total += float(mean[LM_LOSS] * weight[LM_LOSS]) / len(numbers)
    assert total == pytest.approx(31 / 8)


def test_term_without_any_target_is_zero():
    normalizers = [{LM_LOSS: torch.tensor(0.0)}] * 2
    assert [w[LM_LOSS].item() for w in term_weights(normalizers, Groups())] == [0.0, 0.0]
    assert means({LM_LOSS: torch.tensor(0.0)}, normalizers[0])[LM_LOSS] == 0.0


def test_task_sums_match_the_reference_cross_entropy():
    """The language-model term of a micro-batch, against torch's cross-entropy token by token."""
    from megatron.config.schema import ModelConfig
    from megatron.data.loader import Batch
    from megatron.model.gpt import GPT
    from megatron.model.mlp import MLP

    config = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8, ffn_hidden_size=24
    )
    model = GPT(config, 61, make_ffn=lambda i: MLP(16, 24, "gelu"))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (3, 9), generator=generator)
    mask = (torch.rand(3, 8, generator=generator) > 0.4).float()
    batch = Batch(ids[:, :-1], ids[:, 1:], mask)
    task = NextTokenLoss()
    logits = model(batch.tokens_BS).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BS.flatten(), reduction="none"
    )
    sums = task.loss_sums(model, batch, 0.0)
    expected = (losses * mask.flatten()).sum()
    torch.testing.assert_close(sums[LM_LOSS], expected, rtol=1e-5, atol=1e-5)
    assert task.normalizers(batch)[LM_LOSS] == mask.sum()
    assert sums[AUX_LOSS] == 0
    assert task.normalizers(batch)[AUX_LOSS] == 1
