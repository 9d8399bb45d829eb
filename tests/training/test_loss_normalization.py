"""A step's loss is a sum over the target tokens of the global batch divided by their number.

With uneven loss masks the means of micro-batches must be weighted by their tokens: any split of
the global batch over micro-batches and ranks then gives the same loss and the same update.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import engines, runs
from megatron.config import cli
from megatron.data.indexed.writer import IndexedWriter
from megatron.data.splits import build_splits
from megatron.engine.loss import SumsByTerm, means, term_weights
from megatron.model.builder import build_model
from megatron.moe.gate import available_gates, gate_config_class
from megatron.parallel.groups import Groups
from megatron.training.task import AUX_LOSS, LM_LOSS, NextTokenLoss

EOD = 256
TOLERANCE = 1e-6
# (ranks, micro-batch size) of a global batch of 16 samples.
SPLITS = [(1, 16), (1, 4), (1, 1), (2, 4), (2, 1)]
EVAL_ITERS = 3


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


@pytest.fixture(scope="module")
def uneven_documents(tmp_path_factory) -> str:
    """Write long documents, every second of which holds end-of-document tokens only.

    Samples then have from no to 32 target tokens, and batches very different numbers of them.
    """
    prefix = str(tmp_path_factory.mktemp("uneven") / "uneven_text_document")
    generator = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        for i in range(12):
            tokens = generator.integers(0, 256, 150)
            if i % 2:
                tokens[:] = EOD
            writer.add_document(np.append(tokens, EOD))
        writer.finish({"eod": EOD})
    return prefix


def flags(data: str, valid: str, out: Path, micro_batch: int) -> list[str]:
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
            "1",
        ],
        *[
            "--global-batch-size",
            "16",
            "--train-iters",
            "2",
            "--eval-iters",
            str(EVAL_ITERS),
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
        *["--valid-data-path", valid, "--valid-sets", f"short={data}"],
        *["--save", str(out / "checkpoints"), "--metrics-file", str(out / "metrics.jsonl")],
    ]


@pytest.fixture(scope="module")
def results(short_documents, uneven_documents, tmp_path_factory, ranks1, ranks2) -> dict:
    """Train with every split; (logged rows, final tensors) by split."""
    pools = {1: ranks1, 2: ranks2}
    trained = {}
    for ranks, micro_batch in SPLITS:
        out = tmp_path_factory.mktemp(f"ranks{ranks}_micro{micro_batch}")
        argv = flags(short_documents, uneven_documents, out, micro_batch)
        pools[ranks].run(runs.train, argv, timeout=300)
        rows = {kind: runs.metrics(out, kind) for kind in ("train", "eval", "eval/short")}
        trained[ranks, micro_batch] = (rows, engines.full_tensors(out / "checkpoints"))
    return trained


@pytest.mark.parametrize("split", SPLITS[1:])
def test_training_loss_independent_of_split(results, split):
    rows = results[split][0]["train"]
    expected = results[SPLITS[0]][0]["train"]
    for row, reference in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ["eval", "eval/short"])
@pytest.mark.parametrize("split", SPLITS[1:])
def test_evaluation_figures_independent_of_split(results, split, kind):
    rows = results[split][0][kind]
    expected = results[SPLITS[0]][0][kind]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row, reference in zip(rows, expected, strict=True):
        for name in ("loss", "perplexity"):
            assert row[name] == pytest.approx(reference[name], rel=TOLERANCE), name


def test_evaluation_counts_every_target_once(results, short_documents, uneven_documents):
    """The figures of the untrained model, against its log-probabilities token by token."""
    argv = flags(short_documents, uneven_documents, Path(), 16)
    config = cli.parse(argv, gate_config_class, available_gates)
    model = build_model(
        config.model,
        config.moe,
        config.gate_options,
        vocab_size=257,
        seed=config.train.seed,
        groups=Groups(),
    ).eval()
    samples = build_splits(
        config.data,
        seq_length=32,
        train_samples=0,
        valid_samples=16 * EVAL_ITERS,
        test_samples=0,
        seed=config.train.seed,
    )
    for kind, split in (("eval", "valid"), ("eval/short", "valid/short")):
        losses = []
        targets = []
        for i in range(16 * EVAL_ITERS):
            sample = torch.from_numpy(samples[split][i])
            with torch.no_grad():
                logits_SV = model(tokens_BS=sample[None, :-1]).logits[0].double()
            log_probabilities_SV = logits_SV.log_softmax(-1)
            for position in range(32):
                if sample[position] != EOD:
                    losses.append(-log_probabilities_SV[position, sample[position + 1]].item())
            targets.append(int((sample[:-1] != EOD).sum()))
        mean = math.fsum(losses) / len(losses)
        for split_results, _ in results.values():
            row = split_results[kind][0]
            assert row["loss"] == pytest.approx(mean, rel=TOLERANCE)
            assert row["perplexity"] == pytest.approx(math.exp(mean), rel=10 * TOLERANCE)
        if kind == "eval":
            per_batch = np.sum(np.reshape(targets, (EVAL_ITERS, 16)), 1)
            assert min(targets) == 0 and max(targets) == 32
            assert per_batch.max() - per_batch.min() > 30, "batches with different numbers"


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


def test_sums_by_term_give_the_mean():
    """Evaluated micro-batches count by their normalizers; without any target the mean is NaN."""
    totals = SumsByTerm(Groups())
    for loss_sum, number in ((6.0, 3.0), (0.0, 0.0), (25.0, 5.0)):
        sums = {LM_LOSS: torch.tensor(loss_sum), AUX_LOSS: torch.tensor(0.0)}
        totals.add(sums, {LM_LOSS: torch.tensor(number), AUX_LOSS: torch.tensor(0.0)})
    results = totals.means_over_ranks()
    assert results[LM_LOSS] == 31 / 8
    assert math.isnan(results[AUX_LOSS])
    with pytest.raises(ValueError, match="no micro-batch of an evaluation; allowed: one or"):
        SumsByTerm(Groups()).means_over_ranks()


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
