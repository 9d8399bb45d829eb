"""Special tokens in text: every model against one whose vocabulary lacks them; --eod-token."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from helpers import sentencepiece_models
from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

SPECIAL = ("</s>", "[SEP]")
CHARACTERS = [*"<>/[]|abcSEP", "\u2581"]
WORDS = ["the", "cat", "</", "s>", "[S"]
PIECES = [*SPECIAL, " ", "  ", *"<>/[]abcSEPxé", "the", "cat", "\n", "</S>", "<unk>"]


def unigram(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((character, -5.0) for character in CHARACTERS)]
    pieces += [(word, -6.0) for word in WORDS]
    t = tokenizers.Tokenizer(models.Unigram(pieces + [(s, -1.0) for s in special], 0))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    return t


def word_piece(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    entries = ["[UNK]", *CHARACTERS, *WORDS]
    entries += [*(f"##{entry}" for entry in entries[1:]), *special]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    t = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t


def word_level(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    vocabulary = {entry: i for i, entry in enumerate(["<unk>", *CHARACTERS, *WORDS, *special])}
    t = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t


def lowercase_unigram(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    t = unigram(special)
    t.normalizer = normalizers.Lowercase()
    return t


def bpe(special: tuple[str, ...], **options) -> tokenizers.Tokenizer:
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "</", "s>", *special]
    merges = [("t", "h"), ("th", "e"), ("<", "/"), ("s", ">")]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    t = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    return t


def bpe_without_merging(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    t = bpe(special, ignore_merges=True)
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return t


def bpe_with_merged(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    """BPE whose merges produce the special tokens: `</` and `s>` are joined last."""
    spec = json.loads(bpe(special).to_str())
    spec["pre_tokenizer"] = {**spec["pre_tokenizer"], "use_regex": False}
    if "</s>" in special:
        spec["model"]["merges"].append(["</", "s>"])
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


KINDS = [
    unigram,
    lowercase_unigram,
    word_piece,
    word_level,
    bpe_without_merging,
    bpe_with_merged,
]
Maker = Callable[[tuple[str, ...]], tokenizers.Tokenizer]
by_kind = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


def wrapped(backend: tokenizers.Tokenizer, **options) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer("HuggingFaceTokenizer", backend, "t.json", **options)


@by_kind
@pytest.mark.parametrize("added", [True, False], ids=["added", "vocabulary only"])
def test_special_literals_stay_text(make: Maker, added: bool):
    """The encoding is that of a vocabulary without them, and only `</s>` need be declared.

    `</s>` ends documents, so that it is special even if the file does not say so.
    """
    backend = make(SPECIAL)
    if added:
        backend.add_special_tokens(list(SPECIAL))
    special = SPECIAL if added else SPECIAL[:1]
    ours = wrapped(backend)
    reference = make(tuple(token for token in SPECIAL if token not in special))
    special_ids = {backend.token_to_id(literal) for literal in special}
    assert ours.eod == backend.token_to_id("</s>")

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
    def check(text: str) -> None:
        ids = ours.encode(text).tolist()
        assert not special_ids & set(ids)
        expected = [reference.id_to_token(i) for i in reference.encode(text).ids]
        assert [backend.id_to_token(i) for i in ids] == expected

    check()
    for literal in special:
        for text in (literal, f" {literal} ", f"the {literal} cat", literal * 2):
            assert special_ids.isdisjoint(ours.encode(text).tolist()), text
    assert all(ours.decode([i]).strip() == backend.id_to_token(i) for i in special_ids)
    assert ours.vocab_size == len(backend.get_vocab())


def test_plain_bpe_needs_no_second_model():
    """GPT-2's vocabulary contains `<|endoftext|>`, which no merge produces."""
    ours = wrapped(bpe(("<|endoftext|>",)))
    assert ours._encoder is ours._tokenizer and ours._fast is not None
    assert ours.eod not in ours.encode("a <|endoftext|> b").tolist()


def test_ordinary_added_eod_is_no_text():
    """An added token that ends documents counts as special even if it is not declared so."""
    t = bpe(())
    t.add_tokens([AddedToken("<eos>", normalized=False), AddedToken("<tool>")])
    ours = wrapped(t)
    ids = ours.encode("a<eos>b<tool>").tolist()
    expected = [*bpe(()).encode("a<eos>b").ids, t.token_to_id("<tool>")]
    assert ours.eod == t.token_to_id("<eos>") and ids == expected
    assert ours._fast is not None and ours._reference(["a<eos>b<tool>"]) == [ids]


def test_byte_tokens_are_always_found():
    """Byte fallback needs them, also where a file calls them special."""
    entries = ["<unk>", "</s>", "a", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    t = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    t.add_special_tokens(["</s>", *entries[3:]])
    ours = wrapped(t)
    assert ours.encode("aé").tolist() == [2, 3 + 0xC3, 3 + 0xA9]
    assert ours.encode("</s>").tolist() == [3 + byte for byte in b"</s>"]


def test_special_character_of_bpe_is_refused():
    """Without its token, the character would silently be left out of every text."""
    with pytest.raises(ValueError, match="special token '!' is also the only token for a"):
        wrapped(bpe(()), eod_flag="!")
    t = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "!": 1, "a": 2}, [], unk_token="<unk>"))
    assert wrapped(t, eod_flag="!").encode("a!").tolist() == [2, 0]


def test_unknown_words_without_unk_are_reported():
    t = tokenizers.Tokenizer(models.WordLevel({"the": 0, "</s>": 1}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ours = wrapped(t)
    assert ours.encode("the the").tolist() == [0, 0]
    with pytest.raises(ValueError, match="cannot encode a text .*Add a token for unknown text"):
        ours.encode("the </s>")


STRIPPING = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}]
AROUND = ["", " ", "  \t", "\n", "\u00a0", "\u3000", "\x1c", "a", "_", "1", "é", "<t>", "."]


def trained(**flags: bool) -> tokenizers.Tokenizer:
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, show_progress=False, initial_alphabet=alphabet
    )
    t.train_from_iterator(["the cat sat on  the\n\nmat\t\t and"] * 20, trainer)
    t.add_special_tokens(["</s>"])
    t.add_tokens([AddedToken("<t>", normalized=False, **flags)])
    return t


@pytest.mark.parametrize("flags", STRIPPING, ids=str)
def test_stripping_tokens_are_encoded_fast(flags):
    """gigatoken takes the white space around an added token exactly as `tokenizers` does."""
    t = trained(**flags)
    ours = wrapped(t)
    texts = [f"{a}{b}<t>{c}{d}" for a in AROUND for b in AROUND for c in AROUND for d in AROUND]
    ours.compare(0)
    ids, lengths = ours.encode_batch(texts)
    assert ours._fast is not None
    expected = [encoding.ids for encoding in t.encode_batch(texts)]
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [i for row in expected for i in row]


@pytest.mark.parametrize("flags", STRIPPING, ids=str)
def test_single_word_tokens_use_the_reference(flags, caplog):
    """gigatoken finds them inside words, too, which the compared documents need not contain."""
    t = trained(single_word=True, **flags)
    with caplog.at_level(logging.WARNING, "megatron"):
        ours = wrapped(t)
    assert ours._fast is None and "that the token '<t>' is recognised as a sep" in caplog.text
    ours.encode_batch(["the cat"] * 20)
    for text in ("the<t>cat", "the <t> cat", "1<t>_", "<t>"):
        assert ours.encode(text).tolist() == t.encode(text).ids
    assert t.token_to_id("<t>") not in ours.encode("the<t>cat").tolist()


def build(kind: str, model: Path | str, eod_token: str = ""):
    return build_tokenizer(
        TokenizerConfig(kind, tokenizer_model=str(model), eod_token=eod_token)
    )


def sentencepiece_model(folder: Path, **options) -> Path:
    sentences = ["the cat sat on the mat </s> don't <stop> you see\n"] * 20
    options |= sentencepiece_models.EXACT
    return sentencepiece_models.train(folder / "t.model", sentences, 300, **options)


def test_sentencepiece_eod_is_no_text(tmp_path):
    """A user-defined symbol that ends documents is ordinary text; another one is not."""
    path = sentencepiece_model(tmp_path, user_defined_symbols=["<stop>", "<tool>"], eos_id=-1)
    ours = build("SentencePieceTokenizer", path, "<stop>")
    plain = build("SentencePieceTokenizer", path, "<tool>")
    stop, tool = plain.encode("<stop>")[-1], ours.encode("<tool>")[-1]
    assert (ours.eod, plain.eod) == (stop, tool) and stop != tool
    for text in ("<stop>", "the <stop> cat", "<stop><stop>", "a<tool>b<stop>"):
        ids = ours.encode(text).tolist()
        assert stop not in ids and ours.decode(ids) == text
        assert (tool in ids) == ("<tool>" in text)
    assert ours.decode([stop]) == "<stop>"
    with pytest.raises(ValueError, match="--eod-token is '<unk>', which stands for unknown"):
        build("SentencePieceTokenizer", path, "<unk>")
    with pytest.raises(ValueError, match="--eod-token is '<0x41>', which stands for unknown"):
        build("Llama2Tokenizer", path, "<0x41>")


def test_vocabulary_without_eod_is_accepted(tmp_path):
    """An end-of-document token is required by what uses it only."""
    t = bpe(())
    t.add_special_tokens(["<stop>", "<other>"])
    t.save(str(tmp_path / "tokenizer.json"))
    ours = build("HuggingFaceTokenizer", tmp_path)
    assert ours.eod is None and ours.encode("the").tolist() == [t.token_to_id("the")]
    message = (
        r"^--append-eod needs an end-of-document token, and the vocabulary of this "
        r"HuggingFaceTokenizer has none; tried <\|endoftext\|> .*</s> <eos>.* --eod-token"
    )
    with pytest.raises(ValueError, match=message):
        ours.require_eod("--append-eod")
    path = sentencepiece_model(tmp_path, eos_id=-1)
    assert build("SentencePieceTokenizer", path).eod is None


def test_eod_flag_precedes_the_files(tmp_path):
    t = bpe(())
    t.add_special_tokens(["</s>", "<stop>", "<other>"])
    t.save(str(tmp_path / "tokenizer.json"))
    named = {"eos_token": "<other>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert build("HuggingFaceTokenizer", tmp_path).eod == t.token_to_id("<other>")
    ours = build("HuggingFaceTokenizer", tmp_path, "<stop>")
    assert ours.eod == ours.require_eod("--append-eod") == t.token_to_id("<stop>")


@pytest.mark.parametrize(
    ("kind", "token", "message"),
    [
        ("ByteTokenizer", "a", "--eod-token is 'a'; allowed with ByteTokenizer: none, .* 256"),
        ("NullTokenizer", "7", "--eod-token is '7'; allowed with NullTokenizer: none, .* 50"),
        ("HuggingFaceTokenizer", "</S>", "--eod-token is '</S>', which is not in the vocab"),
        ("HuggingFaceTokenizer", "<unk>", "--eod-token is '<unk>', which stands for unknown"),
    ],
)
def test_impossible_eod_flag_is_refused(tmp_path, kind, token, message):
    model = "50" if kind == "NullTokenizer" else tmp_path / "tokenizer.json"
    unigram(SPECIAL).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message):
        build(kind, model, token)
