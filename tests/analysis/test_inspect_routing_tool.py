"""tools/inspect_routing.py: recorded routing against transformers, ranks, files and flags."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.hf_folders import save_model
from helpers.tools_in_ranks import run_tool
from megatron.analysis.inspect_routing import InspectionInputs, inspected_texts
from megatron.analysis.record_texts import encode_texts, record_texts
from megatron.config.schema import TokenizerConfig
from megatron.interop.model_identity import hf_identity
from megatron.moe.routing_trace_file import read_routing_trace, write_routing_trace
from megatron.parallel.groups import Groups
from megatron.tokenizer.build import build_tokenizer

WINDOW = 16
TEXTS = ["The quick brown fox jumps over the lazy dog, and 12 more <b>.", "h\u00e9llo"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A folder of a tiny Mixtral with 64 positions and a token for each byte."""
    return save_model(tmp_path_factory.mktemp("mixtral") / "model", "mixtral")


@pytest.fixture(scope="module")
def recorded(mixtral, tmp_path_factory, ranks1, ranks2):
    """The trace files that one and two ranks write, and what they print; windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("recorded")
    files = []
    for number, ranks in enumerate((ranks1, ranks2), 1):
        file = folder / f"{number}.trace"
        argv = ["--load", str(mixtral), "--text", *TEXTS, "--window", str(WINDOW)]
        argv += ["--trace", str(file), "--output", str(folder / f"{number}.html")]
        printed = ranks.run(run_tool, "inspect_routing", argv)
        assert printed[1:] == [""] * (number - 1)
        files.append((file, printed[0]))
    return files


def page_data(path) -> dict:
    (text,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL
    )
    return json.loads(text)


def test_trace_equals_transformers(mixtral, recorded):
    """Experts and weights are those of transformers' own class, window by window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(mixtral).eval()
    tokenizer = AutoTokenizer.from_pretrained(mixtral)
    trace = read_routing_trace(recorded[0][0])
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert trace.token_ids_T.tolist() == [token for tokens in documents for token in tokens]
    assert trace.document_ranges[1][0] == len(documents[0])
    assert trace.model == hf_identity(mixtral) and trace.constant_k == 2
    assert len(trace.layers) == 2
    start = 0
    for tokens in documents:
        for first in range(0, len(tokens), WINDOW):
            window = torch.tensor([tokens[first : first + WINDOW]])
            logits = model(window, output_router_logits=True).router_logits
            for layer, logits_TE in zip(trace.layers, logits, strict=True):
                weight_TK, expert_TK = logits_TE.softmax(-1).topk(2)
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
                rows = slice(2 * start, 2 * (start + window.shape[1]))
                found = dict_rows(layer.expert_A[rows], layer.weight_A[rows])
                expected = dict_rows(expert_TK.flatten(), weight_TK.flatten())
                assert [set(row) for row in found] == [set(row) for row in expected]
                for row, other in zip(found, expected, strict=True):
                    assert row == pytest.approx(other, rel=1e-4)
            start += window.shape[1]
    assert start == trace.num_positions


def dict_rows(experts: torch.Tensor, weights: torch.Tensor) -> list[dict[int, float]]:
    pairs = list(zip(experts.tolist(), weights.tolist(), strict=True))
    return [dict(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]


def test_two_ranks_record_what_one_does(recorded):
    """They share the experts and take turns with an odd number of windows."""
    one, two = (read_routing_trace(file) for file, _ in recorded)
    windows = sum(-(-(end - start) // WINDOW) for start, end in one.document_ranges)
    assert windows % 2 and one.texts == two.texts
    for layer, other in zip(one.layers, two.layers, strict=True):
        assert torch.equal(layer.expert_A, other.expert_A)
        assert torch.allclose(layer.weight_A, other.weight_A, rtol=1e-5)
    for _, printed in recorded:
        assert "tokens 67, texts 2, MoE layers 2" in printed
        assert "Texts are cut into windows of 16 tokens" in printed
        assert re.search(r"wrote \S+\.trace: \d+ bytes", printed)
        assert re.search(r"wrote \S+\.html: \d+ bytes", printed)


def test_page_shows_the_recorded_texts(recorded):
    file, _ = recorded[1]
    data = page_data(file.with_suffix(".html"))
    trace = read_routing_trace(file)
    assert "".join(data["tokens"]["texts"]).replace("\u00b7", "") == "".join(TEXTS)
    assert data["tokens"]["documents"] == [0, trace.document_ranges[1][0]]
    for layer, found in zip(trace.layers, data["layers"], strict=True):
        experts = base64.b64decode(found["assignments"]["experts"])
        assert list(experts) == layer.expert_A.tolist()
    assert data["notes"][0].startswith("Texts are cut into windows of 16 tokens")


def test_page_of_trace_equals_page_of_model(recorded, ranks1, tmp_path):
    """Reading a trace needs no model; a copy of it is written as well."""
    file, _ = recorded[0]
    argv = ["--from-trace", str(file), "--output", str(tmp_path / "page.html")]
    argv += ["--trace", str(tmp_path / "copy")]
    (printed,) = ranks1.run(run_tool, "inspect_routing", argv)
    assert f"read {file}: tokens 67, texts 2" in printed
    expected = page_data(file.with_suffix(".html"))
    found = page_data(tmp_path / "page.html")
    assert found["title"] == "Routing of 1.trace"
    assert {**found, "title": "", "notes": []} == {**expected, "title": "", "notes": []}
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_one_rank_writes_page_of_trace(recorded, ranks2, tmp_path):
    file, _ = recorded[0]
    argv = ["--from-trace", str(file), "--output", str(tmp_path / "page.html")]
    printed = ranks2.run(run_tool, "inspect_routing", argv)
    assert "wrote" in printed[0] and printed[1] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_model_decodes_trace_without_texts(recorded, mixtral, ranks1, tmp_path):
    """With --load, ids are decoded and traces of other models are refused."""
    trace = read_routing_trace(recorded[0][0])
    bare = tmp_path / "bare"
    write_routing_trace(bare, replace(trace, texts=None))
    page = tmp_path / "page.html"
    argv = ["--from-trace", str(bare), "--output", str(page)]
    with pytest.raises(RuntimeError, match="the text of the trace is 'not recorded'"):
        ranks1.run(run_tool, "inspect_routing", argv)
    assert not page.exists()
    ranks1.run(run_tool, "inspect_routing", [*argv, "--load", str(mixtral)])
    expected = page_data(recorded[0][0].with_suffix(".html"))
    assert page_data(page)["tokens"] == expected["tokens"]
    write_routing_trace(bare, replace(trace, model="hf:other"))
    with pytest.raises(RuntimeError, match="the model of .*bare is 'hf:other'; allowed: hf:"):
        ranks1.run(run_tool, "inspect_routing", [*argv, "--load", str(mixtral)])


def test_checkpoint_with_variable_k_is_inspected(finished, ranks2, tmp_path):
    """The file of a text, cut by --max-tokens; the gate chooses by a threshold, in bf16."""
    (tmp_path / "text").write_text("the quick brown fox " * 20)
    page = tmp_path / "page.html"
    argv = ["--load", str(finished / "checkpoints"), "--file", str(tmp_path / "text")]
    argv += ["--max-tokens", "40", "--page-tokens", "10", "--output", str(page)]
    printed, _ = ranks2.run(run_tool, "inspect_routing", argv)
    assert "The model ran on the first 40 of 400 tokens (--max-tokens)." in printed
    data = page_data(page)
    assert data["num_tokens"] == 40 and len(data["tokens"]["texts"]) == 10
    assert data["notes"][-1].startswith("The first 10 of 40 tokens are shown")
    assert data["layers"][0]["gate"] == "threshold"
    assert len(set(data["tokens"]["experts"])) > 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--window", "65"], "--window is 65; allowed: 1 to 64, the positions of the model"),
        (["--window", "-1"], "--window is -1"),
        (["--max-tokens", "0"], "--max-tokens is 0; allowed: a positive integer"),
        (["--page-tokens", "0"], "--page-tokens is 0; allowed: a positive integer"),
        (["--output", "/none/a.html"], "--output is '/none/a.html'; allowed: the path of a fi"),
        (["--trace", "/"], "--trace is '/'; allowed: the path of a file in a folder"),
        (["--file", "/none/text"], "No such file"),
        (["--from-trace", "x"], "--from-trace is 'x'; allowed: only without --text and --file"),
    ],
)
def test_bad_flags_are_refused(mixtral, ranks1, tmp_path, more, message):
    argv = ["--load", str(mixtral), "--text", "a b", "--output", str(tmp_path / "a.html")]
    with pytest.raises(RuntimeError, match=message):
        ranks1.run(run_tool, "inspect_routing", [*argv, *more])
    assert not list(tmp_path.iterdir())


def test_dense_model_is_refused():
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
    with pytest.raises(ValueError, match="the number of MoE layers of the model is 0; allowed"):
        record_texts(torch.nn.Linear(2, 2), Groups(), tokenizer, [np.arange(2)], 4, "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--load", "x", "--output", "y"], "--text is 'not set'"),
        (["--text", "x", "--output", "y"], "--load is 'not set'"),
        (
            ["--load", "x", "--text", "y"],
            "--output is 'not set'; allowed: --output, --trace or",
        ),
        (
            ["--from-trace", "x", "--output", "y", "--window", "4"],
            "--window is 4; allowed: only",
        ),
        (
            ["--from-trace", "x", "--trace", "y", "--max-tokens", "9"],
            "--max-tokens is 9; allowed",
        ),
        (
            ["--from-trace", "x", "--trace", "y", "--load-step", "3"],
            "--load-step is 3; allowed",
        ),
        (
            ["--from-trace", "x", "--trace", "y", "--page-tokens", "7"],
            "--page-tokens is 7; allo",
        ),
    ],
)
def test_missing_flags_are_refused(repo, monkeypatch, caplog, capfd, argv, message):
    monkeypatch.syspath_prepend(str(repo))
    from tools import inspect_routing

    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_routing.run(inspect_routing.parse(argv))
    assert inspect_routing.main(argv) == 2
    assert message in capfd.readouterr().err


def test_texts_come_from_flags_and_files(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("file \u00e9", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"input")))
    inputs = InspectionInputs("m", texts=("flag",), files=(str(tmp_path / "a"), "-"))
    assert inspected_texts(inputs) == ["flag", "file \u00e9", "input"]
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"--file .*/b cannot be read as text in UTF-8"):
        inspected_texts(replace(inputs, files=(str(tmp_path / "b"),)))


def test_texts_are_cut_together():
    """The limit is one of all texts; empty ones are no documents."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
    cut = encode_texts(tokenizer, ["abc", "", "def", "gh"], 5)
    assert [bytes(tokens.astype(np.uint8)) for tokens in cut.documents] == [b"abc", b"de"]
    assert cut.num_tokens == 8
    with pytest.raises(ValueError, match="the number of tokens of the texts is 0"):
        encode_texts(tokenizer, [""], 5)
