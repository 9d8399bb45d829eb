"""Perplexity of text files and token datasets against a token by token computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tools_in_ranks import run_tool
from megatron.config.tokenizer import TokenizerConfig
from megatron.data.indexed.writer import IndexedWriter
from megatron.evaluation.documents import DocumentSet
from megatron.evaluation.perplexity import PerplexityTotals, WindowOptions, measure_perplexity
from megatron.evaluation.scoring import TokenScore
from megatron.tokenizer.build import build_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "",
    "a 日本 b",
    "x" * 33,
    "document 7",
]
WINDOW = 20


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_dataset(prefix: Path) -> str:
    """Write the texts as tokens; two of them share an entry of the index."""
    tokenizer = build_tokenizer(TokenizerConfig("ByteTokenizer"))
    encoded = [np.append(tokenizer.encode(text), tokenizer.eod) for text in TEXTS]
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for tokens in (encoded[0], encoded[1], encoded[2], np.concatenate(encoded[3:])):
            writer.add_document(tokens)
        writer.finish({"tokenizer": tokenizer.name, "vocab_hash": tokenizer.fingerprint})
    return str(prefix)


def token_losses(load: str, texts: list[str], before: int, with_eod: bool) -> list[float]:
    """In a rank: the loss of every token, each with a forward pass of its own.

    Args:
        before: tokens that a prediction sees at least, once there are as many; the stride is
            WINDOW + 1 - before.
    """
    from megatron.initialize import build_inference_model, initialize_inference

    model = build_inference_model(initialize_inference(load))
    losses = []
    for text in texts:
        tokens = [256, *text.encode(), *([256] if with_eod else [])]
        for i in range(1, len(tokens)):
            # Windows end after WINDOW + 1 tokens, and then every `stride` tokens.
            stride = WINDOW + 1 - before
            ends = WINDOW + 1 + stride * max(0, math.ceil((i - WINDOW) / stride))
            start = max(0, min(ends, len(tokens)) - WINDOW - 1)
            with torch.no_grad():
                logits = model(torch.tensor([tokens[start:i]])).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(-1)[tokens[i]]))
    return losses


@pytest.mark.parametrize("stride, with_eod", [(0, False), (7, True)])
def test_figures_equal_direct_computation(
    small_checkpoint, ranks1, ranks2, tmp_path, stride, with_eod
):
    """JSON lines and tokens, on one and two ranks, with and without overlapping windows."""
    paths = [write_jsonl(tmp_path / "a.jsonl"), write_dataset(tmp_path / "b")]
    argv = ["--load", str(small_checkpoint), "--data", *paths, "--window", str(WINDOW)]
    argv += ["--batch-size", "3", "--output", str(tmp_path / "out.json")]
    argv += ["--stride", str(stride)] if stride else []
    argv += ["--score-eod"] if with_eod else []
    found = []
    for ranks in (ranks1, ranks2):
        printed = ranks.run(run_tool, "evaluate_perplexity", argv)
        assert printed[1:] == [""] * (len(printed) - 1)
        found.append(json.loads((tmp_path / "out.json").read_text()))
    before = WINDOW + 1 - stride if stride else 1
    arguments = (str(small_checkpoint), TEXTS, before, with_eod)
    (losses,) = ranks1.run(token_losses, *arguments)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_words = sum(len(text.split()) for text in TEXTS)
    nll = sum(losses)
    for content in found:
        assert content["window"] == WINDOW and content["iteration"] == 10
        for result in content["results"]:
            assert (result["documents"], result["tokens"]) == (5, len(losses))
            assert (result["bytes"], result["words"]) == (num_bytes, num_words)
            assert result["nll"] == pytest.approx(nll, rel=1e-5)
            assert result["loss"] == pytest.approx(nll / len(losses), rel=1e-5)
            expected = math.exp(nll / num_bytes)
            assert result["byte_perplexity"] == pytest.approx(expected, rel=1e-5)
            assert result["word_perplexity"] == pytest.approx(math.exp(nll / num_words), 1e-4)
            bits = nll / num_bytes / math.log(2)
            assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    kinds = [result["text"] for result in found[0]["results"]]
    assert kinds == ["original", "decoded"]


def test_figures_of_nothing_are_none():
    totals = measure_perplexity([], lambda requests: [], WindowOptions(0, 8))
    assert totals == PerplexityTotals()
    assert set(totals.figures().values()) == {None}


def test_perplexity_of_diverged_model_is_finite():
    totals = PerplexityTotals(1, tokens=1, bytes=1, words=1, nll=1e6)
    assert math.isfinite(totals.figures()["word_perplexity"])


def test_many_tokens_are_scored_in_parts(monkeypatch, tmp_path):
    """What waits to be scored is bounded, and every token is scored once."""
    monkeypatch.setattr("megatron.evaluation.perplexity._TOKENS_AT_A_TIME", 50)
    sizes = []

    def score(requests):
        sizes.append(len(requests))
        return [TokenScore(-1.0 * request.num_scored, False) for request in requests]

    tokenizer = build_tokenizer(TokenizerConfig("ByteTokenizer"))
    documents = DocumentSet(write_jsonl(tmp_path / "a.jsonl"), tokenizer).documents()
    totals = measure_perplexity(documents, score, WindowOptions(256, WINDOW))
    assert totals.nll == totals.tokens == sum(len(text.encode()) for text in TEXTS)
    assert len(sizes) == 3


def test_unusable_data_is_refused(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig("ByteTokenizer"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*leave it out of the file"):
        list(DocumentSet(str(path), tokenizer).documents())
    with pytest.raises(FileNotFoundError, match="--data .*none does not exist"):
        list(DocumentSet(str(tmp_path / "none"), tokenizer).documents())
    with IndexedWriter(str(tmp_path / "b"), np.uint16) as writer:
        writer.add_document(np.array([1, 300]))
        writer.finish({})
    with pytest.raises(ValueError, match="of document 0 of .* is 300; allowed: below the 257"):
        list(DocumentSet(str(tmp_path / "b"), tokenizer).documents())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--window", "33"], "--window is 33; allowed: 1 to 32, the positions of the model"),
        (["--window", "8", "--stride", "9"], "--stride is 9; allowed: 1 to 8"),
        (["--limit", "-1"], "--limit is -1; allowed: 0 or more"),
        (["--batch-size", "0"], "--batch-size is 0; allowed: a positive integer"),
        (["--output", "/none/out.json"], "--output is '/none/out.json'; allowed: the path of"),
        (["--output", "/"], "--output is '/'; allowed: the path of a file"),
    ],
)
def test_bad_flags_are_refused(small_checkpoint, ranks1, tmp_path, flags, message):
    data = write_jsonl(tmp_path / "a.jsonl")
    argv = ["--load", str(small_checkpoint), "--data", data, *flags]
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(run_tool, "evaluate_perplexity", argv)
