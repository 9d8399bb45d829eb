"""The data tools as programs: round trips, and one-line errors that leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from dataset.make_corpus import read_documents
from helpers.programs import BYTES, REPO, SHARED, TEXTS, documents, jsonl, one_line_error, run
from megatron.config.schema import TokenizerConfig
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.ingest.encode import EncodeConfig
from megatron.data.ingest.preprocess import PreprocessConfig, preprocess
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.byte import ByteTokenizer

PREPROCESS = "tools/preprocess_data.py"
TRAIN = "tools/train_tokenizer.py"
MAKE_CORPUS = "dataset/make_corpus.py"


# tools/preprocess_data.py


def test_preprocessing_keeps_the_text(tmp_path):
    """From another folder, into new folders, with a repeated key and blank lines."""
    (tmp_path / "elsewhere").mkdir()
    a = jsonl(tmp_path / "a.jsonl", TEXTS[:2], title="t1")
    b = jsonl(tmp_path / "b.jsonl", TEXTS[2:], title="")
    with open(b, "ab") as file:
        file.write(b"\n  \n")
    outputs = ("--output-prefix", tmp_path / "new/folder/x", "--append-eod")
    keys = ("--json-keys", "text", "title", "text")
    arguments = ("--input", a, b, *outputs, *keys, "--workers", 1, *BYTES)
    done = run(PREPROCESS, *arguments, cwd=tmp_path / "elsewhere")
    prefix = tmp_path / "new/folder/x_text_document"
    expected = [[*t.encode(), 256] if t else [] for t in TEXTS]
    assert documents(prefix) == expected and done.stderr == ""
    titles = documents(tmp_path / "new/folder/x_title_document")
    assert titles == [[*b"t1", 256]] * 2 + [[]] * 2
    files = []
    for key in ("text", "title"):
        files += [f"x_{key}_document.{suffix}" for suffix in ("bin", "idx", "json")]
    assert sorted(os.listdir(prefix.parent)) == sorted(files)
    size = sum(len(t.encode()) for t in TEXTS)
    assert done.stdout.splitlines()[0].startswith(
        f"{prefix}: 4 documents, {size + 3} tokens, {size} bytes, "
        f"{(size + 3) / size:.4f} tokens/byte, "
    )
    recorded = {
        "tokenizer": "ByteTokenizer",
        "vocab_hash": ByteTokenizer().fingerprint,
        "vocab_size": 257,
        "eod": 256,
        "append_eod": True,
        "sources": [str(a), str(b)],
        "documents": 4,
        "tokens": size + 3,
        "key": "text",
        "tool": "preprocess_data",
    }
    assert IndexedDataset(prefix).sidecar.items() >= recorded.items()


def test_append_eod_is_off_by_default(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", TEXTS)
    run(PREPROCESS, "--input", text, "--output-prefix", "x", *BYTES, cwd=tmp_path)
    assert documents(tmp_path / "x_text_document") == [[*t.encode()] for t in TEXTS]


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_wikitext_survives_gpt2_tokenization(tmp_path):
    vocab = SHARED / "gpt2-vocab.json"
    merges = SHARED / "gpt2-merges.txt"
    text = SHARED / "wikitext2-valid.jsonl"
    files = ("--vocab-file", vocab, "--merge-file", merges)
    arguments = ("--input", text, "--output-prefix", "w", "--append-eod", *files)
    run(PREPROCESS, *arguments, cwd=tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig("GPT2BPETokenizer", str(vocab), str(merges)))
    found = documents(tmp_path / "w_text_document")
    with open(text, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == texts
    assert {ids[-1] for ids in found} == {50256}


NOT_JSON = "bad.jsonl:2: not a JSON object in UTF-8"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "a"', NOT_JSON + " (unexpected end of data"),
        (b"text", NOT_JSON),
        (b'{"text": "\xff"}', NOT_JSON),
        (b'{"text": "\\ud800"}', "bad.jsonl:2: 'text' has a lone surrogate; allowed: a string"),
        (b'{"body": "a"}', "bad.jsonl:2: no key 'text'; there are: body. Set --json-keys"),
        (b"{}", "bad.jsonl:2: no key 'text'; there are: none"),
        (b'["text"]', "bad.jsonl:2: the line is a JSON list"),
        (b'{"text": 7}', "bad.jsonl:2: 'text' is a JSON int; allowed: a string"),
        (b'{"text": null}', "bad.jsonl:2: 'text' is a JSON NoneType"),
    ],
)
def test_unusable_lines_are_refused(tmp_path, line, match):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    encoding = EncodeConfig(TokenizerConfig(BYTES[1]))
    config = PreprocessConfig([str(tmp_path / "bad.jsonl")], str(tmp_path / "out/x"), encoding)
    with pytest.raises(ValueError) as info:
        preprocess(config)
    assert match in str(info.value) and "\n" not in str(info.value)
    assert os.listdir(tmp_path / "out") == []


def test_failures_exit_with_code_2(tmp_path):
    """And with an error of one line."""
    good = jsonl(tmp_path / "good.jsonl", TEXTS)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "a"}\n{"text"\n')
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for arguments, match in (
        (("--input", good, bad, *BYTES), f"{bad}:2: not a JSON object"),
        (
            ("--input", tmp_path / "none.jsonl", *BYTES),
            f"--input {tmp_path}/none.jsonl does not exist",
        ),
        (("--input", tmp_path / "empty.jsonl", *BYTES), "has no documents"),
        (("--input", good, "--workers", -1, *BYTES), "--workers is -1"),
        (("--input", good), "--vocab-file is not set; GPT2BPETokenizer needs vocab.json"),
    ):
        arguments = (*arguments, "--output-prefix", "out/x")
        line = one_line_error(run(PREPROCESS, *arguments, cwd=tmp_path, code=2))
        assert line.startswith("preprocess_data.py: error: ") and match in line
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


# All tools


def test_tools_have_a_help_text(tmp_path):
    for script in (PREPROCESS, "tools/merge_datasets.py", TRAIN, MAKE_CORPUS):
        text = run(script, "--help", cwd=tmp_path).stdout
        assert text.startswith(f"usage: {Path(script).name} ") and "--output" in text
        assert len(text.splitlines()) > 8


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with a corpus and a tokenizer trained on it, made twice."""
    folder = tmp_path_factory.mktemp("demo")
    for n in (1, 2):
        corpus = f"new{n}/c.jsonl"
        run(MAKE_CORPUS, "--output", corpus, "--max-bytes", 400000, cwd=folder)
        output = ("--output", f"tok{n}/tokenizer.json")
        done = run(TRAIN, "--input", corpus, "--vocab-size", 600, *output, cwd=folder)
        assert done.stdout.startswith(f"tok{n}/tokenizer.json: 600 tokens, ")
    return folder


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_demo_steps_are_repeatable(demo):
    for name in ("new{}/c.jsonl", "tok{}/tokenizer.json"):
        first, second = (demo / name.format(n) for n in (1, 2))
        assert first.read_bytes() == second.read_bytes()
    assert os.listdir(demo / "tok1") == ["tokenizer.json"]
    assert os.listdir(demo / "new1") == ["c.jsonl"]


def test_demo_corpus_becomes_tokens(demo):
    tokenizer_flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tok1")
    outputs = ("--output-prefix", "c", "--append-eod")
    run(PREPROCESS, "--input", "new1/c.jsonl", *outputs, *tokenizer_flags, cwd=demo)
    tokenizer = build_tokenizer(
        TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(demo / "tok1"))
    )
    assert tokenizer.vocab_size == 600 and tokenizer.eod == 0
    found = documents(demo / "c_text_document")
    texts = [record["text"] for record in read_records(demo / "new1/c.jsonl")]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == texts
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in found)


def test_demo_corpus_is_the_standard_library(demo):
    """Its sources in a shuffled order, up to the first that would exceed the size."""
    records = read_records(demo / "new1/c.jsonl")
    library = Path(sysconfig.get_path("stdlib"))
    for record in records:
        assert (library / record["source"]).read_bytes() == record["text"].encode()
    names = [record["source"] for record in records]
    assert len(set(names)) == len(names) > 10
    assert not any("site-packages" in name for name in names)
    everything = list(read_documents(library, []))
    assert names == [name for name, _ in everything[: len(names)]] and names != sorted(names)
    size = sum(len(record["text"].encode()) for record in records)
    next_size = len(everything[len(names)][1])
    assert size <= 400000 < size + next_size


# dataset/


def test_impossible_corpora_are_refused(tmp_path):
    for max_bytes, match in ((-1, "allowed: 0 (all) or more"), (1, "no Python sources")):
        arguments = ("--output", "c", "--max-bytes", max_bytes)
        done = run(MAKE_CORPUS, *arguments, cwd=tmp_path, code=2)
        assert match in one_line_error(done)
    assert os.listdir(tmp_path) == []


def test_corpus_takes_nonempty_utf8_sources(tmp_path, monkeypatch):
    """Only .py files, and none of installed packages."""
    monkeypatch.syspath_prepend(str(REPO / "dataset"))
    import make_corpus

    library = tmp_path / "lib"
    for name, data in (
        ("a.py", b"x = 1\r\n"),
        ("p/b.py", "é = 2".encode()),
        ("latin.py", b"\xe9"),
        ("empty.py", b""),
        ("site-packages/no.py", b"no"),
        ("p/dist-packages/q/no.py", b"no"),
        ("c.txt", b"no"),
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(data)
    assert make_corpus.write_corpus(library, tmp_path / "c.jsonl", 0) == (2, 13, 1)
    records = read_records(tmp_path / "c.jsonl")
    assert sorted((record["source"], record["text"]) for record in records) == [
        ("a.py", "x = 1\r\n"),
        ("p/b.py", "é = 2"),
    ]


@pytest.mark.skipif(
    not SHARED.exists() or not shutil.which("curl"), reason="no ../shared/data, or no curl"
)
def test_vocabulary_downloads_are_verified(tmp_path):
    def download(code: int = 0, **environment) -> str:
        done = subprocess.run(
            ["bash", str(REPO / "dataset/download_vocab.sh")],
            capture_output=True,
            text=True,
            env={**os.environ, "FOLDER": str(tmp_path / "v"), **environment},
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    shared = SHARED.resolve()
    right = {
        "VOCAB_URL": f"file://{shared}/gpt2-vocab.json",
        "MERGES_URL": f"file://{shared}/gpt2-merges.txt",
    }
    wrong = {"VOCAB_URL": f"file://{shared}/gpt2-merges.txt"}
    assert "its checksum is wrong" in download(2, **{**right, **wrong})
    assert os.listdir(tmp_path / "v") == []
    download(**right)
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        assert (tmp_path / "v" / name).read_bytes() == (shared / name).read_bytes()
    assert download(**wrong) == ""
    (tmp_path / "v" / "gpt2-merges.txt").write_text("x")
    assert "is there, but its checksum is wrong. Remove it" in download(2, **right)
