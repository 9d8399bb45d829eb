"""Flags of one config section in the parser of a tool."""

import argparse

import pytest

from megatron.config.flag_parser import add_section_flags, section_from_args, section_values
from megatron.config.schema import DataConfig, TokenizerConfig


def parse(cls: type, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_section_flags(parser, cls, "of this tool")
    return parser.parse_args(words)


def test_section_from_args_converts_values():
    args = parse(
        DataConfig, "--num-workers", "2", "--data-path", "a", "b", "--no-eod-mask-loss"
    )
    assert section_values(args, DataConfig) == {
        "data_path": ("a", "b"),
        "num_workers": 2,
        "eod_mask_loss": False,
    }
    assert section_from_args(args, DataConfig) == DataConfig(("a", "b"), num_workers=2)


def test_section_from_args_defaults_without_flags():
    args = parse(TokenizerConfig)
    assert section_values(args, TokenizerConfig) == {}
    assert section_from_args(args, TokenizerConfig) == TokenizerConfig()


@pytest.mark.parametrize(
    "cls, words, message",
    [
        (TokenizerConfig, ("--tokenizer-type", "x"), "--tokenizer-type is 'x'; allowed: GPT2"),
        (DataConfig, ("--num-workers", "x"), "--num-workers is 'x'; allowed: an integer"),
        (DataConfig, ("--num-workers", "-1"), "--num-workers is -1; allowed: 0 or more"),
    ],
)
def test_section_from_args_refuses_wrong_values(cls, words, message):
    with pytest.raises(ValueError, match=message):
        section_from_args(parse(cls, *words), cls)


def test_section_flags_are_a_described_group(capsys):
    with pytest.raises(SystemExit):
        parse(TokenizerConfig, "--help")
    out = capsys.readouterr().out
    assert "tokenizer:\n  of this tool" in out and "--vocab-file TEXT" in out


def test_section_from_args_refuses_useless_flags():
    args = parse(TokenizerConfig, "--tokenizer-type", "ByteTokenizer", "--vocab-file", "x")
    message = (
        "--vocab-file is 'x'; it has an effect only with --tokenizer-type GPT2BPETokenizer"
    )
    with pytest.raises(ValueError, match=message):
        section_from_args(args, TokenizerConfig)
    # What it needs is a flag of another section, which this tool does not have.
    args = parse(DataConfig, "--valid-data-path", "a")
    assert section_from_args(args, DataConfig).valid_data_path == ("a",)
