"""Files that replace long data flags: --data-args-path and --per-split-data-args-path."""

from __future__ import annotations

import json
import os

import pytest

from megatron.config.schema import DataConfig
from megatron.data.data_args import read_data_args


@pytest.mark.parametrize(
    "text, words",
    [
        ("0.7 a 0.3 b\n", ("0.7", "a", "0.3", "b")),
        ("0.7 a\n\n0.3\tb", ("0.7", "a", "0.3", "b")),
        ("a", ("a",)),
        ("  a\r\nb  \n", ("a", "b")),
        ("1.0 'my data/a' 0.5 \"b c\"", ("1.0", "my data/a", "0.5", "b c")),
    ],
)
def test_blend_file_equals_the_flag(text, words, tmp_path):
    path = tmp_path / "blend.txt"
    path.write_text(text)
    data = DataConfig(data_args_path=str(path), valid_data_path=("v",), split="9,1,0")
    expected = DataConfig(data_path=words, valid_data_path=("v",), split="9,1,0")
    assert read_data_args(data) == expected


def test_long_blend_file(tmp_path):
    path = tmp_path / "blend.txt"
    path.write_text("".join(f"{i + 1} shard{i}\n" for i in range(5000)))
    words = read_data_args(DataConfig(data_args_path=str(path))).data_path
    assert len(words) == 10000
    assert words[-2:] == ("5000", "shard4999")


def test_split_file_equals_the_flags(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": [0.7, "a", "0.3", "b"], "valid": "c d"}))
    data = DataConfig(per_split_data_args_path=str(path), valid_sets=("x=e",))
    assert read_data_args(data) == DataConfig(
        train_data_path=("0.7", "a", "0.3", "b"),
        valid_data_path=("c", "d"),
        valid_sets=("x=e",),
    )


def test_flags_without_a_file_are_unchanged():
    data = DataConfig(data_path=("a",))
    assert read_data_args(data) is data


@pytest.mark.parametrize(
    "content, message",
    [
        (
            None,
            "--data-args-path is '.*f', which cannot be read: No such file or directory; give",
        ),
        (
            b"\xff",
            "--data-args-path is '.*f', which is not UTF-8 text; give the path of a text",
        ),
        (
            b" \n",
            "--data-args-path .*f is ''; allowed: weights and prefixes, or prefixes alone",
        ),
        (b"1 a 2", "--data-args-path .*f is '1 a 2'; allowed: weight prefix weight prefix"),
        (b"1 'a", "--data-args-path .*f: No closing quotation; quote a prefix with blanks"),
        (b"0 a", "a weight of --data-args-path .*f is 0.0; allowed: a positive number"),
    ],
)
def test_unusable_blend_file(content, message, tmp_path):
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        read_data_args(DataConfig(data_args_path=str(path)))
    assert "\n" not in str(error.value)


def test_message_about_a_long_blend_is_short(tmp_path):
    path = tmp_path / "f"
    path.write_text("1 shard " * 5000 + "7")
    with pytest.raises(ValueError, match="allowed: weight prefix weight prefix") as error:
        read_data_args(DataConfig(data_args_path=str(path)))
    assert "Word 10001 is '7'. " in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "--per-split-data-args-path is '.*f', which cannot be read: No such file"),
        ("{", "--per-split-data-args-path: .*f is not JSON: Expecting"),
        ("[1]", r"the content of --per-split-data-args-path .*f is \[1\]; allowed: a JSON obj"),
        ("{}", r"the content of --per-split-data-args-path .*f is \{\}; allowed: a JSON obj"),
        ('{"valdi": []}', r"the content of .*f is \{'valdi': \[\]\}; allowed: a JSON object"),
        ('{"train": 3}', "--per-split-data-args-path .*f: train is 3; allowed: a list of"),
        ('{"train": [["a"]]}', r".*f: train is \[\['a'\]\]; allowed: a list of weights"),
        ('{"train": []}', "--per-split-data-args-path .*f: train is ''; allowed: weights"),
        (
            '{"test": ["a", 1]}',
            "--per-split-data-args-path .*f: test is 'a 1'; allowed: weight",
        ),
    ],
)
def test_unusable_split_file(content, message, tmp_path):
    path = tmp_path / "f"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^{message}"):
        read_data_args(DataConfig(per_split_data_args_path=str(path)))


def test_pipe_is_no_blend_file(tmp_path):
    """Reading it would wait for a writer."""
    os.mkfifo(tmp_path / "f")
    with pytest.raises(ValueError, match="cannot be read: It is not a regular file"):
        read_data_args(DataConfig(data_args_path=str(tmp_path / "f")))
