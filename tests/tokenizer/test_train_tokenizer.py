"""The tokenizer trainer: reproducible files, round trips of extreme text, samples, errors."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.programs import REPO, jsonl, one_line_error, run
from megatron.config.schema import TokenizerConfig
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from tools import train_tokenizer

TOOL = "tools/train_tokenizer.py"
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café\n\n",
    "日本語のテキスト。",
    "\ttabs\tand   blanks ",
    "▁▂▁",
] * 40
EXTREME_TEXTS = [
    "",
    " ",
    "   ",
    " a",
    "a ",
    "\n",
    "a\n\n b\t\tc\r\n",
    "\r",
    "\x00",
    "a\x00b",
    "▁",
    " ▁ ▁▁ a▁b",
    "▅",
    "⁇",
    " ⁇ ",
    "\ue000",
    "\ue000\ue001",
    "\ue000▁\ue002 \ue001",
    "<s></s><unk>",
    "<0x0A>",
    "<|endoftext|>",
    "\ufeff",
    "\ufffd",
    "e\u0301 \u00a0\u3000\u2028\u200b",
    "\ufb01 Å ①",
    "\x7f\x80",
    "\U0010ffff\uffff",
    "\U0001f468\u200d\U0001f469",
    "x" * 9999,
]


def train(folder: Path, *arguments, output: str = "t.json") -> str:
    """Run the tool and return its line on stdout."""
    done = run(TOOL, *arguments, "--output", output, cwd=folder)
    assert done.stderr == ""
    return done.stdout


def vocabulary(path: Path) -> dict[str, int]:
    return json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Tokenizer]:
    """SentencePiece models of both types, each as both kinds of tokenizer.

    Each is trained twice, with the same result.
    """
    found = []
    for model_type in ("unigram", "bpe"):
        contents = []
        for _ in range(2):
            folder = tmp_path_factory.mktemp("model")
            line = train(
                folder,
                "--input",
                jsonl(folder / "a.jsonl", TEXTS),
                "--kind",
                "sentencepiece",
                "--model-type",
                model_type,
                "--vocab-size",
                400,
                output="new/t.model",
            )
            contents.append((folder / "new/t.model").read_bytes())
            assert (
                line.startswith("new/t.model: ")
                and "trained on 200 of 200 documents, 0 skipped, " in line
            )
            assert os.listdir(folder / "new") == ["t.model"]
        assert contents[0] == contents[1] and b"tsv" not in contents[0]
        found += [
            build_tokenizer(TokenizerConfig(kind, tokenizer_model=str(folder / "new/t.model")))
            for kind in ("SentencePieceTokenizer", "Llama2Tokenizer")
        ]
    return found


def test_sentencepiece_models_are_usable(models):
    for tokenizer in models:
        assert tokenizer.eod == 2 and tokenizer.bos == (
            1 if tokenizer.name == "Llama2Tokenizer" else None
        )
        assert 280 < tokenizer.vocab_size <= 400
        assert sum(len(tokenizer.encode(text)) for text in TEXTS) < sum(
            len(text.encode()) for text in TEXTS
        )


def test_extreme_text_survives_sentencepiece(models):
    for tokenizer in models:
        for text in EXTREME_TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.eod not in tokenizer.encode(text)


@given(st.text() | st.text(alphabet=" \n\t▁\ue000\ue001\ue002aé"))
def test_any_text_survives_sentencepiece(models, text):
    for tokenizer in models:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_spaces_survive_model_without_spaces(tmp_path):
    size = train(
        tmp_path,
        "--input",
        jsonl(tmp_path / "a.jsonl", ["ab" * 500]),
        "--vocab-size",
        500,
        "--kind",
        "sentencepiece",
        output="t.model",
    )
    tokenizer = build_tokenizer(
        TokenizerConfig("SentencePieceTokenizer", tokenizer_model=str(tmp_path / "t.model"))
    )
    assert tokenizer.decode(tokenizer.encode(" c d ")) == " c d "
    assert (
        size.startswith(f"t.model: {tokenizer.vocab_size} tokens, ")
        and tokenizer.vocab_size < 300
    )


def test_sentencepiece_learns_from_all_text(tmp_path):
    """Also from long lines and lines with its reserved symbol, which the library would drop."""
    path = jsonl(tmp_path / "a.jsonl", ["x" * 9000 + "Ж" * 9000, "▅ЮЮЮЮ ЮЮ▅Ю\nЯЯЯЯ\r\n" * 9])
    train(
        tmp_path,
        "--input",
        path,
        "--vocab-size",
        300,
        "--kind",
        "sentencepiece",
        output="t.model",
    )
    tokenizer = build_tokenizer(
        TokenizerConfig("SentencePieceTokenizer", tokenizer_model=str(tmp_path / "t.model"))
    )
    for text in ("ЖЖ", "ЮЮ", "ЯЯ"):
        assert len(tokenizer.encode(text)) <= 2


@given(st.lists(st.text(alphabet="aЖ\n▅ \U0001f600", max_size=60), max_size=5))
def test_sentences_omit_no_text(texts):
    with mock.patch.object(train_tokenizer, "MAX_SENTENCE", 7):
        parts = list(train_tokenizer.sentences(texts))
    assert "".join(parts) == "".join(texts).replace("\n", "").replace("▅", "")
    assert all(0 < len(part) <= 7 for part in parts)


@given(
    st.lists(st.tuples(st.text(max_size=9), st.text(max_size=3)), min_size=1, max_size=40),
    st.integers(1, 80),
    st.integers(-5, 5),
)
def test_sample_equals_sorting_by_priority(documents, max_bytes, seed):
    ranked = sorted(range(len(documents)), key=lambda n: (train_tokenizer.priority(seed, n), n))
    expected, left = {}, max_bytes
    for number in ranked:
        if left:
            first, second = (text.encode() for text in documents[number])
            expected[number] = (
                first[:left].decode(errors="ignore"),
                second[: max(0, left - len(first))].decode(errors="ignore"),
            )
            left = max(0, left - len(first) - len(second))
    assert train_tokenizer.sample(iter(documents), max_bytes, seed) == [
        expected[n] for n in sorted(expected)
    ]


def test_sample_covers_the_input():
    documents = [(f"{n:04}",) for n in range(10**4)]
    found = train_tokenizer.sample(iter(documents), 4000, 1)
    assert (
        found == sorted(found) == train_tokenizer.sample(documents, 4000, 1)
        and len(found) == 1000
    )
    assert all(
        60 < sum(text.startswith(str(digit)) for (text,) in found) < 140 for digit in range(10)
    )
    assert (
        found != train_tokenizer.sample(documents, 4000, 2)
        and train_tokenizer.sample([], 4000, 1) == []
    )


def test_result_ignores_input_format(tmp_path):
    texts = [f"document {i} " + "abc "[i % 4] * 20 for i in range(300)]
    jsonl(tmp_path / "all.jsonl", texts)
    jsonl(tmp_path / "1.jsonl", texts[:100])
    jsonl(tmp_path / "2.jsonl", texts[100:])
    (tmp_path / "2.gz").write_bytes(gzip.compress((tmp_path / "2.jsonl").read_bytes()))
    arguments = ("--vocab-size", 300, "--max-bytes", 3000)
    line = train(tmp_path, "--input", "all.jsonl", *arguments, output="a.json")
    assert (
        line.startswith("a.json: 300 tokens, trained on ")
        and " of 300 documents, 0 skipped, " in line
    )
    train(tmp_path, "--input", "1.jsonl", "2.gz", *arguments, output="b.json")
    with open(tmp_path / "all.jsonl", "rb") as file:
        subprocess.run(
            [
                sys.executable,
                str(REPO / TOOL),
                "--input",
                "-",
                *map(str, arguments),
                "--output",
                "c.json",
            ],
            cwd=tmp_path,
            stdin=file,
            check=True,
            capture_output=True,
            timeout=100,
        )
    train(tmp_path, "--input", "all.jsonl", *arguments, "--seed", 7, output="d.json")
    contents = [(tmp_path / f"{name}.json").read_bytes() for name in "abcd"]
    assert contents[0] == contents[1] == contents[2] != contents[3]


def test_json_keys_select_the_texts(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["aaaa bbbb"] * 9, title="qqqq", other="zzzz")
    train(
        tmp_path, "--input", path, "--vocab-size", 300, "--json-keys", "text", "title", "text"
    )
    found = vocabulary(tmp_path / "t.json")
    assert "qqqq" in found and "aaaa" in found and "zzzz" not in found
    train(
        tmp_path, "--input", path, "--vocab-size", 300, "--json-key", "other", "--max-bytes", 20
    )
    assert "zzzz" in vocabulary(tmp_path / "t.json") and "qqqq" not in vocabulary(
        tmp_path / "t.json"
    )


def test_long_document_is_cut_to_sample(tmp_path):
    line = train(
        tmp_path,
        "--input",
        jsonl(tmp_path / "a.jsonl", ["a" * 9 + "z" * 99]),
        "--vocab-size",
        300,
        "--max-bytes",
        10,
    )
    assert "trained on 1 of 1 documents" in line
    assert "aaaa" in vocabulary(tmp_path / "t.json") and "zz" not in vocabulary(
        tmp_path / "t.json"
    )


def test_unusable_records_stop_or_skip(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "aaaa"}\n\n{"text": 5}\n{"text": "aaaa"}\nx\n'
    )
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "a"}\n')
    arguments = ("--input", "a.jsonl", "b.jsonl", "--vocab-size", 300, "--output", "t.json")
    for kind in ("bpe", "sentencepiece"):
        line = one_line_error(run(TOOL, *arguments, "--kind", kind, cwd=tmp_path, code=2))
        assert line == (
            "train_tokenizer.py: error: a.jsonl:3: 'text' is a JSON int; allowed: a string. "
            "Correct or remove it, or leave such records out: --on-error skip"
        )
        done = run(TOOL, *arguments, "--kind", kind, "--on-error", "skip", cwd=tmp_path)
        assert "trained on 2 of 2 documents, 3 skipped, " in done.stdout
        os.remove(tmp_path / "t.json")


GOOD = ("--input", "a.jsonl")
SENTENCEPIECE = ("--kind", "sentencepiece")
# Arguments, and a part of the error message.
IMPOSSIBLE = (
    (
        (*GOOD, "--vocab-size", 256),
        "--vocab-size is 256; allowed: 257 or more with --kind bpe",
    ),
    (
        (*GOOD, "--vocab-size", 259, *SENTENCEPIECE),
        "is 259; allowed: 260 or more with --kind sentencepiece",
    ),
    (
        (*GOOD, "--vocab-size", 260, *SENTENCEPIECE),
        "is 260; allowed: 267 or more for this text (its char",
    ),
    (
        ("--input", "blank.jsonl", "--vocab-size", 300, *SENTENCEPIECE),
        "has documents, but no text in them to train on",
    ),
    (
        ("--input", "nul.jsonl", "--vocab-size", 300, *SENTENCEPIECE),
        "has documents, but no text in them to train on",
    ),
    ((*GOOD, "--vocab-size", 300, "--max-bytes", -1), "--max-bytes is -1"),
    (
        (*GOOD, "--vocab-size", 300, "--model-type", "bpe"),
        "--model-type is 'bpe'; allowed: only",
    ),
    (
        (*GOOD, "--vocab-size", 300, "--output", "."),
        "--output is '.'; allowed: a file; this is",
    ),
    (
        (*GOOD, "--vocab-size", 300, "--output", ""),
        "--output is ''; allowed: a file",
    ),
    (
        (*GOOD, "--vocab-size", 300, "--output", "t/"),
        "--output is 't/'; allowed: a file; this is",
    ),
    (
        (*GOOD, "--vocab-size", 300, "--output", "a.jsonl/x/y"),
        "{tmp_path}/a.jsonl cannot",
    ),
    (("--input", "none", "--vocab-size", 300), "--input none does not exist"),
    (
        ("--input", "empty.jsonl", "--vocab-size", 300),
        "--input empty.jsonl has no documents",
    ),
    (
        ("--input", "bad.jsonl", "--vocab-size", 300, "--on-error", "skip"),
        "documents: all 1 records were skip",
    ),
    (
        (*GOOD, "--vocab-size", 300, "--json-key", "body"),
        "a.jsonl:1: no key 'body'",
    ),
)


def test_impossible_trainings_are_refused(tmp_path):
    files = {
        "a.jsonl": ["some text", "more"],
        "blank.jsonl": ["", "\n\r\n"],
        "nul.jsonl": ["\x00"],
    }
    for name, texts in files.items():
        jsonl(tmp_path / name, texts)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_bytes(b"x\n")
    for arguments, match in IMPOSSIBLE:
        line = one_line_error(
            run(TOOL, "--output", "new/t.json", *arguments, cwd=tmp_path, code=2)
        )
        assert line.startswith("train_tokenizer.py: error: ")
        assert match.replace("{tmp_path}", str(tmp_path)) in line
    assert sorted(os.listdir(tmp_path)) == sorted([*files, "bad.jsonl", "empty.jsonl"])
    possible = (*GOOD, "--vocab-size", 267, *SENTENCEPIECE)
    run(TOOL, "--output", "t.model", *possible, cwd=tmp_path)


@pytest.mark.parametrize(
    ("module", "package"), [("sentencepiece", "sentencepiece"), ("google", "protobuf")]
)
def test_missing_package_is_reported_first(tmp_path, monkeypatch, module, package):
    """Before the text, which does not exist, is read."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("google", "sentencepiece"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    flags = ["--input", "none", "--output", str(tmp_path / "t.model"), "--vocab-size", "300"]
    arguments = train_tokenizer.parser().parse_args([*flags, *SENTENCEPIECE])
    message = rf"^--kind sentencepiece needs the package {package}, which is not installed. "
    with pytest.raises(ValueError, match=message + "Install it: pip install 'moe-megatron.sen"):
        train_tokenizer.train(arguments)


def test_sentencepiece_errors_are_one_line():
    error = RuntimeError("INTERNAL:\nx [no]\n")
    message = r"^SentencePiece cannot train on this text \(INTERNAL: x \[no\]\)$"
    with (
        mock.patch("sentencepiece.SentencePieceTrainer.train", side_effect=error),
        pytest.raises(ValueError, match=message),
    ):
        train_tokenizer.train_sentencepiece(["a"], 300, "bpe")


def test_failed_write_leaves_no_file(tmp_path, monkeypatch, capsys):
    path = jsonl(tmp_path / "a.jsonl", ["text"])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            TOOL,
            "--input",
            str(path),
            "--vocab-size",
            "300",
            "--output",
            str(tmp_path / "t.json"),
        ],
    )
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        assert train_tokenizer.main() == 2
    assert capsys.readouterr().err == (
        f"train_tokenizer.py: error: [Errno 28] No space left on device: '{tmp_path}/t.json'\n"
    )
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_progress_bar_counts_bytes(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", ["x" * 100] * 100)
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    assert len(list(train_tokenizer.Corpus([str(path)], ["text"]))) == 100
    assert "100%" in screen.getvalue() and "/11.3k" in screen.getvalue()
