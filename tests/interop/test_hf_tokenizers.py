"""Tokenizers of exported models: transformers' AutoTokenizer gives the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import sentencepiece_models
from megatron.config.schema import TokenizerConfig
from megatron.interop.hf.export_tokenizer import write_tokenizer
from megatron.interop.hf.tokenizer_choice import choose_tokenizer
from megatron.tokenizer.build import build_tokenizer

TEXTS = ("to be or not to be", "  two blanks,\n\nlines", "naïve 東京", "")
pytest.importorskip("transformers", reason="the reference implementation is not installed")


def byte_level_files(folder: Path) -> tuple[Path, Path]:
    """Write vocab.json and merges.txt of a byte-level BPE with a few merges."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "o"), ("Ġ", "b"), ("Ġb", "e")]
    tokens = [*letters, *(first + second for first, second in merges), "<|endoftext|>"]
    vocab = folder / "gpt2-vocab.json"
    vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merge = folder / "gpt2-merges.txt"
    merge.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return vocab, merge


def same_ids(config: TokenizerConfig, folder: Path, texts=TEXTS) -> None:
    """Check that transformers and ours encode alike, but for the token that begins texts."""
    from transformers import AutoTokenizer

    ours = build_tokenizer(config)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist(), text
    assert theirs.eos_token_id == ours.eod


def test_gpt2_bpe_is_a_tokenizer_json(tmp_path):
    vocab, merges = byte_level_files(tmp_path)
    config = TokenizerConfig("GPT2BPETokenizer", str(vocab), str(merges))
    (tmp_path / "out").mkdir()
    write_tokenizer(config, tmp_path / "none", tmp_path / "out")
    same_ids(config, tmp_path / "out")


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_model_is_loaded(tmp_path, kind):
    """Where a text begins with a blank, transformers leaves out SentencePiece's own one."""
    pytest.importorskip("sentencepiece")
    model = sentencepiece_models.train(
        tmp_path / "m.model", [*TEXTS, *TEXTS], 300, **sentencepiece_models.EXACT
    )
    config = TokenizerConfig(kind, tokenizer_model=str(model))
    (tmp_path / "out").mkdir()
    write_tokenizer(config, tmp_path / "none", tmp_path / "out")
    texts = [text for text in TEXTS if not text.startswith(" ")]
    same_ids(config, tmp_path / "out", texts)


@pytest.mark.parametrize("kind", ["ByteTokenizer", "missing"])
def test_tokenizer_without_files_is_logged(tmp_path, kind, caplog):
    config = TokenizerConfig("ByteTokenizer")
    if kind == "missing":
        config = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "gone"))
    with caplog.at_level("INFO"):
        write_tokenizer(config, tmp_path / "none", tmp_path)
    assert "the folder has no tokenizer" in caplog.text
    assert not list(tmp_path.iterdir())


def test_files_decide_which_tokenizer_is_ours(tmp_path):
    """tokenizer.json has precedence; without files ids are the text."""
    content = {"vocab_size": 50}
    none = TokenizerConfig()
    assert choose_tokenizer(tmp_path, content, none).tokenizer_type == "NullTokenizer"
    vocab, merges = byte_level_files(tmp_path)
    vocab.rename(tmp_path / "vocab.json")
    merges.rename(tmp_path / "merges.txt")
    assert choose_tokenizer(tmp_path, content, none).tokenizer_type == "GPT2BPETokenizer"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert choose_tokenizer(tmp_path, content, none).tokenizer_type == "Llama2Tokenizer"
    (tmp_path / "tokenizer.json").write_bytes(b"")
    assert choose_tokenizer(tmp_path, content, none).tokenizer_type == "HuggingFaceTokenizer"
