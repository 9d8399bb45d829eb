"""Every tokenizer against an independent encoder; special tokens in text; missing, wrong files."""

from __future__ import annotations

import base64
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers import sentencepiece_models
from megatron.config.schema import TOKENIZERS, TokenizerConfig
from megatron.tokenizer import base, fast_bpe
from megatron.tokenizer import build as module
from megatron.tokenizer.build import TOKENIZER_BUILDERS, build_tokenizer
from megatron.tokenizer.byte import ByteTokenizer
from megatron.tokenizer.null import NullTokenizer

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
TEXTS = [
    "",
    "the cat sat on the mat",
    "Don't <|endoftext|> </s> <eos> <s>",
    " \n\n\t  x",
    "naïve 日本 \U0001f600\0",
    "12345",
]
CORPUS = ["the cat sat on the mat, don't you see the cat? 12345 hello world\n"] * 20
needs_gpt2 = pytest.mark.skipif(
    not (SHARED / "gpt2-vocab.json").exists(), reason="no GPT-2 files in ../shared/data"
)


def trained(
    tmp_path: Path, *, pre=None, eod: str = "<|endoftext|>", normalizer=None
) -> tokenizers.Tokenizer:
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    if normalizer:
        t.normalizer = normalizer
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=290,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    t.add_special_tokens([eod])
    t.save(str(tmp_path / "tokenizer.json"))
    return t


def build(kind: str, model: Path | str = "", **files) -> base.Tokenizer:
    return build_tokenizer(TokenizerConfig(kind, tokenizer_model=str(model), **files))


def gpt2(**changes) -> base.Tokenizer:
    files = {
        "vocab_file": str(SHARED / "gpt2-vocab.json"),
        "merge_file": str(SHARED / "gpt2-merges.txt"),
        **changes,
    }
    return build_tokenizer(TokenizerConfig("GPT2BPETokenizer", **files))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    return sentencepiece_models.train(path, CORPUS, 320, **sentencepiece_models.EXACT)


@pytest.fixture(params=[t for t in TOKENIZERS if t != "NullTokenizer"])
def any_tokenizer(request, tmp_path, sentencepiece_model) -> base.Tokenizer:
    """Each tokenizer that encodes text (NullTokenizer has its own tests)."""
    kind = request.param
    if kind == "GPT2BPETokenizer":
        if not (SHARED / "gpt2-vocab.json").exists():
            pytest.skip("no GPT-2 files in ../shared/data")
        return gpt2()
    if kind == "HuggingFaceTokenizer":
        trained(tmp_path)
        return build(kind, tmp_path)
    if kind == "TiktokenTokenizer":
        pytest.importorskip("tiktoken", reason="tiktoken is optional and not installed")
        return build(kind, ranks_file(tmp_path))
    return build(kind, "" if kind == "ByteTokenizer" else sentencepiece_model)


def ranks_file(folder: Path, name: str = "r50k_base") -> Path:
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)] + [
        base64.b64encode(b"th") + b" 256"
    ]
    path = folder / f"{name}.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def rows(flat: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    assert flat.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.sum() == len(flat)
    return (
        [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]
        if len(lengths)
        else []
    )


def test_every_tokenizer_round_trips_text(any_tokenizer):
    t = any_tokenizer
    batch = rows(*t.encode_batch(TEXTS))
    assert batch == [t.encode(text).tolist() for text in TEXTS]
    assert all(0 <= i < t.vocab_size for row in batch for i in row)
    assert [t.decode(row[t.bos is not None :]) for row in batch] == TEXTS
    assert not any(t.eod in row for row in batch), "a literal became the end-of-document id"
    assert 0 <= t.eod < t.vocab_size and len(t.fingerprint) == 64
    assert t.decode([t.vocab_size, t.vocab_size + 9]) == ""
    assert rows(*t.encode_batch([])) == []


def test_fingerprint_identifies_the_vocabulary(tmp_path, sentencepiece_model):
    (tmp_path / "b").mkdir()
    trained(tmp_path)
    trained(tmp_path / "b", eod="<eos>")
    made = [
        build("HuggingFaceTokenizer", tmp_path),
        build("HuggingFaceTokenizer", tmp_path / "b"),
        ByteTokenizer(),
        NullTokenizer(9),
        NullTokenizer(10),
        build("SentencePieceTokenizer", sentencepiece_model),
    ]
    assert len({t.fingerprint for t in made}) == len(made)
    assert (
        build("HuggingFaceTokenizer", tmp_path / "tokenizer.json").fingerprint
        == made[0].fingerprint
    )


@needs_gpt2
def test_gpt2_equals_tokenizers_library(caplog):
    t = gpt2()
    reference = tokenizers.ByteLevelBPETokenizer(
        str(SHARED / "gpt2-vocab.json"), str(SHARED / "gpt2-merges.txt")
    )
    with open(SHARED / "wikitext2-valid.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:30] + TEXTS
    assert rows(*t.encode_batch(texts)) == [reference.encode(text).ids for text in texts]
    assert t.vocab_size == 50257 and t.eod == 50256 and t.decode([t.eod]) == "<|endoftext|>"
    assert t.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert t._fast is not None and not caplog.records


@needs_gpt2
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS), max_size=4
    )
)
def test_gpt2_equals_reference_on_any_text(texts):
    t = gpt2_once()
    assert rows(*t.encode_batch(texts)) == [list(ids) for ids in t._reference(texts)]
    assert [t.decode(t.encode(text)) for text in texts] == texts


@pytest.fixture(scope="module")
def punctuated(tmp_path_factory) -> base.Tokenizer:
    """A tokenizer with merges across punctuation, letters, digits and spaces.

    Its tokens show where a text was split.
    """
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        [Path(__file__).read_text()] * 2,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    folder = tmp_path_factory.mktemp("punctuated")
    t.save(str(folder / "tokenizer.json"))
    return build("HuggingFaceTokenizer", folder)


@pytest.mark.parametrize("context", ['{}",', "the{}the"])
def test_every_character_equals_the_reference(punctuated, context):
    """Without special treatment thousands differ: gigatoken's Unicode tables are newer."""
    texts = [context.replace("{}", chr(c)) for c in range(0x40000) if not 0xD800 <= c < 0xE000]
    texts += [context.replace("{}", chr(c)) for c in range(0x40000, 0x110000, 997)]
    flat, lengths = punctuated.encode_batch(texts)
    reference = punctuated._reference(texts)
    right, right_lengths = base.flatten(reference)
    assert np.array_equal(lengths, right_lengths) and np.array_equal(flat, right)
    assert punctuated._fast is not None and not punctuated.difference


def test_grown_fast_encoder_is_reloaded(punctuated, monkeypatch):
    right = punctuated.encode("the cat").tolist()
    loaded = []
    load = punctuated._load
    monkeypatch.setattr(punctuated, "_load", lambda: loaded.append(1) or load())
    punctuated.encode("the cat")
    assert not loaded
    monkeypatch.setattr(fast_bpe, "_CACHE_BYTES", -(1 << 40))
    assert [punctuated.encode("the cat").tolist() for _ in range(3)] == [right] * 3 and len(
        loaded
    ) == 3
    assert (1 << 20) < fast_bpe.resident_bytes() < (1 << 40)


def test_resident_bytes_without_proc_is_zero(monkeypatch):
    def nothing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", nothing)
    assert fast_bpe.resident_bytes() == 0


def test_reference_encodes_new_characters_only(punctuated, monkeypatch):
    """At any place in a batch; the fast encoder stays in use."""
    seen = []
    reference = punctuated._reference
    monkeypatch.setattr(
        punctuated, "_reference", lambda texts: seen.extend(texts) or reference(texts)
    )
    punctuated.compare(0)
    new = ['"\ua7cf",', '\U00033479",', "\U00050000"]
    for texts in (
        new[:1],
        ["a", new[0], "", "é", new[1]],
        [new[2], "日本", "x"],
        [*new, *("b" * i for i in range(40))],
        [*("b" * i for i in range(40)), *new],
        [],
    ):
        seen.clear()
        flat, lengths = punctuated.encode_batch(texts)
        assert (
            rows(flat, lengths) == [list(ids) for ids in reference(texts)]
            and flat.dtype == np.uint32
        )
        assert seen == [text for text in texts if text in new]
    punctuated.compare(3)
    punctuated.encode_batch(new)
    assert punctuated._fast is not None


EXTREME_TEXTS = [
    "",
    " ",
    "   \t\n \r\n",
    "\x00\x01\x1f\x7f\x80\x9f",
    "e\u0301\u0301\u20dd",
    "\u202e\u200b\ufeff\u2028",
    "\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1e9\U0001f1ea",
    "\ufffe\uffff",
    "'s 't've 'LL'",
    "a" * (1 << 20),
    "\u65e5\u672c" * 100000,
    " " * 100000,
    "\n" * 100000,
    "\xe9" * 99999 + "\n",
]


@pytest.mark.parametrize(
    "text", EXTREME_TEXTS, ids=[f"{len(t)}-{ascii(t[:6])}" for t in EXTREME_TEXTS]
)
def test_extreme_texts_equal_the_reference(punctuated, text):
    flat, lengths = punctuated.encode_batch(["x", text, "y"])
    assert rows(flat, lengths) == [list(ids) for ids in punctuated._reference(["x", text, "y"])]
    assert punctuated.decode(punctuated.encode(text)) == text


def gpt2_once(made: list = []) -> base.Tokenizer:  # noqa: B006 - a cache
    made or made.append(gpt2())
    return made[0]


def test_huggingface_template_and_padding_are_ignored(tmp_path):
    """Added tokens keep their ids, and ordinary added tokens are recognised."""
    t = trained(tmp_path)
    t.add_tokens(["<tool>"])
    t.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 290)]
    )
    t.enable_truncation(2)
    t.enable_padding(length=9)
    t.save(str(tmp_path / "tokenizer.json"))
    ours = build("HuggingFaceTokenizer", tmp_path)
    assert ours._fast is not None and ours.eod == 290 and ours.vocab_size == 292
    text = "the cat<tool> sat on the <|endoftext|>"
    ids = ours.encode(text).tolist()
    assert 291 in ids and 290 not in ids and ids == ours._reference([text])[0]
    assert ours.decode([290, 291]) == "<|endoftext|><tool>"


def test_huggingface_config_names_eod(tmp_path):
    trained(tmp_path, eod="</s>").get_vocab()
    t = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    t.add_special_tokens(["<stop>"])
    t.save(str(tmp_path / "tokenizer.json"))
    assert build("HuggingFaceTokenizer", tmp_path).eod == t.token_to_id("</s>")
    for named in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert build("HuggingFaceTokenizer", tmp_path).eod == t.token_to_id("<stop>")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="is not a HuggingFace tokenizer"):
        build("HuggingFaceTokenizer", tmp_path)


def test_gigatoken_difference_is_logged(tmp_path, caplog):
    """gigatoken 0.10 splits by GPT-2's regex even if the file disables splitting."""
    t = trained(tmp_path, pre=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    ours = build("HuggingFaceTokenizer", tmp_path)
    assert ours._fast is not None
    texts = ["x", "the cat sat on the mat, don't you see the cat? 12345 hello world\n"]
    with caplog.at_level(logging.WARNING, "megatron"):
        assert rows(*ours.encode_batch(texts)) == [t.encode(text).ids for text in texts]
    assert ours._fast is None and "encodes a document differently" in caplog.text


def test_gigatoken_is_compared_on_first_documents(tmp_path, monkeypatch):
    trained(tmp_path)
    ours = build("HuggingFaceTokenizer", tmp_path)
    seen = []
    reference = ours._reference
    monkeypatch.setattr(
        ours, "_reference", lambda texts: seen.extend(texts) or reference(texts)
    )
    for _ in range(3):
        ours.encode_batch(["the cat " * 4000] * 10)
    assert (
        len(seen) == fast_bpe._COMPARED_DOCUMENTS
        and max(map(len, seen)) == fast_bpe._COMPARED_CHARACTERS
    )


def test_gigatoken_warnings_come_from_rank0(tmp_path, caplog, monkeypatch):
    """Every rank of a run builds the tokenizer and encodes the same texts."""
    trained(tmp_path, pre=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING, "megatron"):
        ours = build("HuggingFaceTokenizer", tmp_path)
        ours.encode_batch(["the cat sat on the mat, don't you see the cat? 12345 hello\n"])
        trained(tmp_path, normalizer=normalizers.Lowercase())
        without = build("HuggingFaceTokenizer", tmp_path)
    assert ours._fast is without._fast is None and not caplog.messages


@pytest.mark.parametrize("kind", ["lowercase", "word level"])
def test_gigatoken_load_failure_is_logged(tmp_path, caplog, kind):
    if kind == "lowercase":
        t = trained(tmp_path, normalizer=normalizers.Lowercase())
    else:
        t = tokenizers.Tokenizer(
            models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="<unk>")
        )
        t.pre_tokenizer = pre_tokenizers.Whitespace()
        t.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "megatron"):
        ours = build("HuggingFaceTokenizer", tmp_path)
    assert (
        "gigatoken cannot load this HuggingFaceTokenizer" in caplog.text
        and "\n" not in caplog.messages[0]
    )
    assert rows(*ours.encode_batch(["THE cat", "the"])) == [
        t.encode("THE cat").ids,
        t.encode("the").ids,
    ]


def test_sentencepiece_equals_the_library(sentencepiece_model, tmp_path):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    plain, llama = (
        build("SentencePieceTokenizer", sentencepiece_model),
        build("Llama2Tokenizer", sentencepiece_model),
    )
    assert rows(*plain.encode_batch(TEXTS)) == [reference.encode(text) for text in TEXTS]
    assert rows(*llama.encode_batch(TEXTS)) == [[1, *reference.encode(text)] for text in TEXTS]
    assert (
        plain.bos is None
        and llama.bos == reference.bos_id() == 1
        and plain.eod == llama.eod == reference.eos_id()
    )
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        build("Llama2Tokenizer", tmp_path / "bad.model")


def test_llama2_requires_a_bos_token(tmp_path):
    sentencepiece_models.train(tmp_path / "t.model", CORPUS, 60, bos_id=-1)
    with pytest.raises(
        ValueError, match="no begin-of-sequence token.*Use SentencePieceTokenizer"
    ):
        build("Llama2Tokenizer", tmp_path / "t.model")


def test_tiktoken_encodes_and_checks_files(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken", reason="tiktoken is optional and not installed")
    t = build("TiktokenTokenizer", ranks_file(tmp_path))
    assert t.encode("the <|endoftext|>").tolist() == [256, 101, *b" <|endoftext|>"]
    assert t.vocab_size == 50257 and t.eod == 50256 and t._fast is not None
    with pytest.raises(
        ValueError,
        match="no known encoding in its name; allowed: r50k_base.tiktoken, cl100k_base",
    ):
        build("TiktokenTokenizer", ranks_file(tmp_path, "mine"))
    (tmp_path / "o200k_base.tiktoken").write_bytes(b"YQ== 0\nbad\n")
    with pytest.raises(ValueError, match="is not a .tiktoken file"):
        build("TiktokenTokenizer", tmp_path / "o200k_base.tiktoken")


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [
        ("TiktokenTokenizer", "tiktoken", "tiktoken"),
        ("SentencePieceTokenizer", "sentencepiece", "sentencepiece"),
        ("Llama2Tokenizer", "sentencepiece", "sentencepiece"),
    ],
)
def test_missing_package_is_reported(tmp_path, monkeypatch, kind, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        rf"^--tokenizer-type {kind} needs the package {module}, which is not installed. "
        rf"Install it: pip install 'moe-megatron\[{extra}\]'$"
    )
    with pytest.raises(ValueError, match=message):
        build(kind, ranks_file(tmp_path))


def test_damaged_package_is_reported(tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('no libstdc++.so.6')")
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"which cannot be imported \(no libstdc"):
        build("SentencePieceTokenizer", ranks_file(tmp_path))


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "TiktokenTokenizer"])
def test_result_without_gigatoken_is_equal(tmp_path, monkeypatch, caplog, kind):
    trained(tmp_path)
    model = tmp_path
    if kind == "TiktokenTokenizer":
        pytest.importorskip("tiktoken", reason="tiktoken is optional and not installed")
        model = ranks_file(tmp_path)
    expected = rows(*build(kind, model).encode_batch(TEXTS))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with caplog.at_level(logging.WARNING, "megatron"):
        ours = build(kind, model)
    assert rows(*ours.encode_batch(TEXTS)) == expected and ours._fast is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the package gigatoken is not installed: using the")
    assert caplog.messages[0].endswith("Install it: pip install 'moe-megatron[fast]'")


def test_slow_encoder_is_logged_once(tmp_path, monkeypatch, caplog):
    """Every rank builds the tokenizer; rank 0 warns."""
    trained(tmp_path, normalizer=normalizers.Lowercase())
    with caplog.at_level(logging.WARNING, "megatron"):
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            build("HuggingFaceTokenizer", tmp_path)
    assert len(caplog.messages) == 1


def test_null_tokenizer_reads_ids():
    t = build("NullTokenizer", "50")
    assert (t.vocab_size, t.eod) == (51, 50)
    assert rows(*t.encode_batch(["1 2  50", "", "49"])) == [[1, 2, 50], [], [49]]
    assert t.decode([1, 2, 60]) == "1 2"
    for text in ("51", "-1", "a", "1.5", "²"):
        with pytest.raises(
            ValueError, match="is no token id for NullTokenizer; allowed: 0 to 50"
        ):
            t.encode(text)
    for size in ("", "x", "0", "-5", "²", str(2**31 - 1), "3000000000", "9" * 5000):
        with pytest.raises(
            ValueError, match="allowed for NullTokenizer: the vocabulary size, 1 to 2147483646 "
        ):
            build("NullTokenizer", size)
    assert build("NullTokenizer", str(2**31 - 2)).eod == np.iinfo(np.int32).max - 1


def test_byte_tokenizer_uses_utf8():
    t = build("ByteTokenizer")
    assert (t.vocab_size, t.eod) == (257, 256)
    assert t.encode("aé").tolist() == [97, 195, 169] and t.decode([97, 256, 195]) == "a\ufffd"


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("GPT2BPETokenizer", "--vocab-file"),
        ("HuggingFaceTokenizer", "--tokenizer-model"),
        ("SentencePieceTokenizer", "--tokenizer-model"),
        ("Llama2Tokenizer", "--tokenizer-model"),
    ],
)
def test_missing_files_are_reported(tmp_path, kind, flag):
    with pytest.raises(FileNotFoundError, match=f"{flag} is not set; {kind} needs"):
        build(kind)
    with pytest.raises(
        FileNotFoundError, match=f"{flag} /no/file does not exist; {kind} needs"
    ):
        build(kind, "/no/file", vocab_file="/no/file")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="--merge-file is not set.*download_vocab.sh"):
        build("GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"))


def test_malformed_files_are_reported(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a HuggingFace tokenizer"):
        build("HuggingFaceTokenizer", tmp_path)
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    with pytest.raises(ValueError, match="are not the two files of a byte-level BPE"):
        build(
            "GPT2BPETokenizer",
            vocab_file=str(tmp_path / "tokenizer.json"),
            merge_file=str(tmp_path / "merges.txt"),
        )


def test_threads_reach_the_libraries(monkeypatch, sentencepiece_model):
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    t = build_tokenizer(
        TokenizerConfig("SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)),
        threads=1,
    )
    assert module.os.environ["RAYON_NUM_THREADS"] == "1" and t._threads == 1


def test_registry_matches_the_flags_choices():
    assert tuple(TOKENIZER_BUILDERS) == TOKENIZERS


def test_unknown_tokenizer_type_is_refused(monkeypatch):
    """A choice of the flag that has no builder is an error, and not another tokenizer."""
    monkeypatch.delitem(TOKENIZER_BUILDERS, "ByteTokenizer")
    with pytest.raises(
        ValueError, match="--tokenizer-type is 'ByteTokenizer'; allowed: GPT2BPETokenizer"
    ):
        build("ByteTokenizer")
