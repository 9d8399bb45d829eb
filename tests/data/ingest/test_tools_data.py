"""The data tools as programs: round trips, one-line errors that leave nothing behind."""

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


def test_text_survives_preprocessing(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    a, b = (
        jsonl(tmp_path / "a.jsonl", TEXTS[:2], title="t1"),
        jsonl(tmp_path / "b.jsonl", TEXTS[2:], title=""),
    )
    with open(b, "ab") as file:
        file.write(b"\n  \n")
    done = run(
        "tools/preprocess_data.py",
        "--input",
        a,
        b,
        "--output-prefix",
        tmp_path / "new/folder/x",
        "--append-eod",
        "--json-keys",
        "text",
        "title",
        "text",
        "--workers",
        1,
        *BYTES,
        cwd=tmp_path / "elsewhere",
    )
    prefix = tmp_path / "new/folder/x_text_document"
    expected = [[*t.encode(), 256] if t else [] for t in TEXTS]
    assert documents(prefix) == expected and done.stderr == ""
    assert documents(tmp_path / "new/folder/x_title_document") == [[*b"t1", 256]] * 2 + [[]] * 2
    assert sorted(os.listdir(prefix.parent)) == sorted(
        f"x_{key}_document.{suffix}"
        for key in ("text", "title")
        for suffix in ("bin", "idx", "json")
    )
    size = sum(len(t.encode()) for t in TEXTS)
    assert done.stdout.splitlines()[0].startswith(
        f"{prefix}: 4 documents, {size + 3} tokens, {size} bytes, {(size + 3) / size:.4f} tokens/byte, "
    )
    side = IndexedDataset(prefix).sidecar
    assert (
        side.items()
        >= {
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
        }.items()
    )


def test_without_append_eod_there_are_only_the_texts(tmp_path):
    run(
        "tools/preprocess_data.py",
        "--input",
        jsonl(tmp_path / "a.jsonl", TEXTS),
        "--output-prefix",
        "x",
        *BYTES,
        cwd=tmp_path,
    )
    assert documents(tmp_path / "x_text_document") == [[*t.encode()] for t in TEXTS]


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_wikitext_with_gpt2(tmp_path):
    files = (
        "--vocab-file",
        SHARED / "gpt2-vocab.json",
        "--merge-file",
        SHARED / "gpt2-merges.txt",
    )
    run(
        "tools/preprocess_data.py",
        "--input",
        SHARED / "wikitext2-valid.jsonl",
        "--output-prefix",
        "w",
        "--append-eod",
        *files,
        cwd=tmp_path,
    )
    tokenizer = build_tokenizer(
        TokenizerConfig("GPT2BPETokenizer", *map(str, (files[1], files[3])))
    )
    found = documents(tmp_path / "w_text_document")
    with open(SHARED / "wikitext2-valid.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == texts and {
        ids[-1] for ids in found
    } == {50256}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "a"', "bad.jsonl:2: not a JSON object in UTF-8 (unexpected end of data"),
        (b"text", "bad.jsonl:2: not a JSON object in UTF-8"),
        (b'{"text": "\xff"}', "bad.jsonl:2: not a JSON object in UTF-8"),
        (b'{"text": "\\ud800"}', "bad.jsonl:2: not a JSON object in UTF-8"),
        (b'{"body": "a"}', "bad.jsonl:2: no key 'text'; there are: body. Set --json-keys"),
        (b"{}", "bad.jsonl:2: no key 'text'; there are: none"),
        (b'["text"]', "bad.jsonl:2: the line is a JSON list"),
        (b'{"text": 7}', "bad.jsonl:2: 'text' is a JSON int; allowed: a string"),
        (b'{"text": null}', "bad.jsonl:2: 'text' is a JSON NoneType"),
    ],
)
def test_a_line_that_cannot_be_used(tmp_path, line, match):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError) as info:
        preprocess(
            PreprocessConfig(
                [str(tmp_path / "bad.jsonl")],
                str(tmp_path / "out/x"),
                EncodeConfig(TokenizerConfig(BYTES[1])),
            )
        )
    assert match in str(info.value) and "\n" not in str(info.value)
    assert os.listdir(tmp_path / "out") == []


def test_failures_of_the_program_are_one_line_and_exit_code_2(tmp_path):
    good, bad = jsonl(tmp_path / "good.jsonl", TEXTS), tmp_path / "bad.jsonl"
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
        line = one_line_error(
            run(
                "tools/preprocess_data.py",
                *arguments,
                "--output-prefix",
                "out/x",
                cwd=tmp_path,
                code=2,
            )
        )
        assert line.startswith("preprocess_data.py: error: ") and match in line
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_help_of_the_tools(tmp_path):
    for script in (
        "tools/preprocess_data.py",
        "tools/merge_datasets.py",
        "tools/train_tokenizer.py",
        "dataset/make_corpus.py",
    ):
        text = run(script, "--help", cwd=tmp_path).stdout
        assert (
            text.startswith(f"usage: {Path(script).name} ")
            and "--output" in text
            and len(text.splitlines()) > 8
        )


def test_from_corpus_to_tokens(tmp_path):
    """Corpus, tokenizer, shards: the offline demo's first three steps, twice, with the same result."""
    for n in (1, 2):
        run(
            "dataset/make_corpus.py",
            "--output",
            f"new{n}/c.jsonl",
            "--max-bytes",
            400000,
            cwd=tmp_path,
        )
        done = run(
            "tools/train_tokenizer.py",
            "--input",
            f"new{n}/c.jsonl",
            "--vocab-size",
            600,
            "--output",
            f"tok{n}/tokenizer.json",
            cwd=tmp_path,
        )
    assert done.stdout.startswith("tok2/tokenizer.json: 600 tokens, ")
    for name in ("new{}/c.jsonl", "tok{}/tokenizer.json"):
        assert (tmp_path / name.format(1)).read_bytes() == (
            tmp_path / name.format(2)
        ).read_bytes()
    assert os.listdir(tmp_path / "tok1") == ["tokenizer.json"] and os.listdir(
        tmp_path / "new1"
    ) == ["c.jsonl"]
    run(
        "tools/preprocess_data.py",
        "--input",
        "new1/c.jsonl",
        "--output-prefix",
        "c",
        "--append-eod",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        "tok1",
        cwd=tmp_path,
    )
    tokenizer = build_tokenizer(
        TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tok1"))
    )
    assert tokenizer.vocab_size == 600 and tokenizer.eod == 0
    lines = [
        json.loads(line)
        for line in (tmp_path / "new1/c.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = documents(tmp_path / "c_text_document")
    assert [tokenizer.decode(ids[:-1]) for ids in found] == [line["text"] for line in lines]
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in found)
    library = Path(sysconfig.get_path("stdlib"))
    assert all(
        (library / line["source"]).read_bytes() == line["text"].encode() for line in lines
    )
    names = [line["source"] for line in lines]
    assert len(set(names)) == len(names) > 10 and not any(
        "site-packages" in name for name in names
    )
    everything = list(read_documents(library, []))
    assert names == [name for name, _ in everything[: len(names)]] and names != sorted(names)
    size = sum(len(line["text"].encode()) for line in lines)
    assert size <= 400000 < size + len(everything[len(names)][1]), (
        "it ends where the next file does not fit"
    )


def test_corpora_that_cannot_be_made(tmp_path, monkeypatch):
    assert "allowed: 0 (all) or more" in one_line_error(
        run("dataset/make_corpus.py", "--output", "c", "--max-bytes", -1, cwd=tmp_path, code=2)
    )
    assert "no Python sources" in one_line_error(
        run("dataset/make_corpus.py", "--output", "c", "--max-bytes", 1, cwd=tmp_path, code=2)
    )
    assert os.listdir(tmp_path) == []


def test_files_of_the_corpus(tmp_path, monkeypatch):
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
    lines = [
        json.loads(line)
        for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted((line["source"], line["text"]) for line in lines) == [
        ("a.py", "x = 1\r\n"),
        ("p/b.py", "é = 2"),
    ]


@pytest.mark.skipif(
    not SHARED.exists() or not shutil.which("curl"), reason="no ../shared/data, or no curl"
)
def test_downloading_the_vocabulary_checks_it(tmp_path):
    def download(code: int = 0, **environment) -> str:
        done = subprocess.run(
            ["bash", str(REPO / "dataset/download_vocab.sh")],
            capture_output=True,
            text=True,
            env={**os.environ, "FOLDER": str(tmp_path / "v"), **environment},
            timeout=60,
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
