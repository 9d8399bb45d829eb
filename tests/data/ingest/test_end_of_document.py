"""The end-of-document token and the record of the tokenizer, from preprocessing to training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from helpers.programs import documents, run
from helpers.streams import open_stream
from megatron.config.schema import DataConfig, TokenizerConfig
from megatron.data.indexed.inspect import summarize
from megatron.data.indexed.opened import open_dataset
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.validation import check_eod, check_sidecar
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, PreprocessRun, preprocess
from megatron.tokenizer.build import build_tokenizer

INSPECT = "tools/inspect_dataset.py"
PREPROCESS = "tools/preprocess_data.py"


@pytest.fixture
def tokenizer(tmp_path) -> TokenizerConfig:
    """A tokenizer whose names of special tokens are unknown here."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "<stop>": 3, "<end>": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<stop>", "<end>"])
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{"text": "a <stop>"}\n')
    return TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))


def config_of(folder: Path, tokenizer: TokenizerConfig, append_eod: bool) -> PreprocessConfig:
    encoding = EncodeConfig(tokenizer, append_eod=append_eod)
    return PreprocessConfig([str(folder / "a.jsonl")], str(folder / "d"), encoding)


def test_eod_is_required_by_append_only(tmp_path, tokenizer):
    flags = ("--input", "a.jsonl", "--output-prefix", "d")
    flags += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "t.json")
    done = run(PREPROCESS, *flags, "--append-eod", cwd=tmp_path, code=2)
    message = "--append-eod needs an end-of-document token, and the vocabulary of this"
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"t.json", "a.jsonl"}
    prefix = tmp_path / "d_text_document"
    run(PREPROCESS, *flags, cwd=tmp_path)
    assert documents(prefix) == [[1, 2], [1, 0]]
    assert json.loads(Path(f"{prefix}.json").read_text())["eod"] is None
    run(PREPROCESS, *flags, "--append-eod", "--eod-token", "<stop>", cwd=tmp_path)
    assert documents(prefix) == [[1, 2, 3], [1, 0, 3]]


def test_data_and_run_share_the_eod(tmp_path, tokenizer):
    stop = replace(tokenizer, eod_token="<stop>")
    end = build_tokenizer(replace(tokenizer, eod_token="<end>"))
    [stats] = preprocess(config_of(tmp_path, stop, append_eod=True))
    dataset = IndexedDataset(stats.prefix)
    check_sidecar(dataset, build_tokenizer(stop))
    message = "records eod 3 of HuggingFaceTokenizer, this run's HuggingFaceTokenizer has {}: "
    for other, eod in ((end, 4), (build_tokenizer(tokenizer), None)):
        with pytest.raises(ValueError, match=message.format(eod)):
            check_sidecar(dataset, other)
    data = DataConfig(data_path=(stats.prefix,), eod_mask_loss=True)
    check_eod(dataset, data, build_tokenizer(stop))
    with pytest.raises(ValueError, match="--eod-mask-loss needs an end-of-document token"):
        check_eod(dataset, data, build_tokenizer(tokenizer))
    [stats] = preprocess(config_of(tmp_path, stop, append_eod=False))
    check_sidecar(IndexedDataset(stats.prefix), end)


def test_another_eod_starts_again(tmp_path, tokenizer, caplog):
    """Neither an unfinished run nor cached tokens are continued with another token."""
    paths = []
    for name in ("<stop>", "<end>"):
        named = replace(tokenizer, eod_token=name)
        with PreprocessRun(config_of(tmp_path, named, append_eod=True)) as work:
            assert not work.resumed
            next(iter(work))
            work.commit()
        paths.append(open_stream(tmp_path / "a.jsonl", tmp_path, config=named).prefix)
    assert "differs in: tokenizer. Starting again" in caplog.text and len(set(paths)) == 2
    with pytest.raises(ValueError, match="--streaming-data-path needs an end-of-document tok"):
        open_stream(tmp_path / "a.jsonl", tmp_path, config=tokenizer)


def test_inspection_decodes_with_recorded_tokenizer(tmp_path, tokenizer):
    """The record has absolute paths, so that the program may run in another folder."""
    named = replace(tokenizer, eod_token="<stop>")
    [stats] = preprocess(config_of(tmp_path, named, append_eod=True))
    sidecar = IndexedDataset(stats.prefix).sidecar
    assert sidecar["tokenizer_flags"] == {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tmp_path / "t.json"),
        "eod_token": "<stop>",
    }
    shown = f"tokenizer_flags: tokenizer_type HuggingFaceTokenizer, tokenizer_model {tmp_path}"
    done = run(INSPECT, stats.prefix, "--full", cwd="/")
    assert "document 0    3 tokens: 'a b <stop>'" in done.stdout and shown in done.stdout
    merge = ("--input", stats.prefix, "--output-prefix", "m")
    run("tools/merge_datasets.py", *merge, cwd=tmp_path)
    assert "document 0    3 tokens: 'a b <stop>'" in run(INSPECT, "m", cwd=tmp_path).stdout
    changed = (tmp_path / "t.json").read_text().replace('"b"', '"c"')
    for content, reason in ((changed, "the tokenizer's files have changed"), ("{", "is not a")):
        (tmp_path / "t.json").write_text(content)
        shown = run(INSPECT, stats.prefix, cwd="/").stdout
        line = next(line for line in shown.splitlines() if "not decoded" in line)
        assert reason in line and line.endswith(". Give the tokenizer's flags")
        assert "document 0    3 tokens: 1 2 3\n" in shown
    (tmp_path / "t.json").unlink()
    found = summarize(open_dataset(stats.prefix))
    assert "t.json does not exist" in found["not_decoded"]
    assert found["first_documents"][0]["text"] is None


@pytest.mark.parametrize("flags", [7, {"x": 1}, {"tokenizer_type": "No"}, {}, [], "a"])
def test_unusable_record_decodes_nothing(tmp_path, tokenizer, flags):
    [stats] = preprocess(config_of(tmp_path, tokenizer, append_eod=False))
    sidecar = Path(f"{stats.prefix}.json")
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**content, "tokenizer_flags": flags}))
    found = summarize(open_dataset(stats.prefix))
    assert found["first_documents"][0]["text"] is None and found["not_decoded"]
    del content["tokenizer_flags"]  # of an earlier version
    sidecar.write_text(json.dumps(content))
    assert summarize(open_dataset(stats.prefix))["not_decoded"] == ""
