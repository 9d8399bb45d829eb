"""Files of prompts in their formats, files that are refused, and the file of continuations."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron.config.tool_flags import require_output_file
from megatron.inference.prompts import (
    read_prompts,
    require_fitting_prompt,
    write_continuations,
)
from megatron.inference.text import Continuation


def test_text_has_a_prompt_per_line(tmp_path):
    """Blanks and other separators belong to a prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa \r\n\n b\u2028c\n{}".encode())
    assert read_prompts(str(file), "prompt") == ["a ", " b\u2028c", "{}"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL.gz"])
def test_json_lines_have_prompts_under_key(suffix, tmp_path):
    file = tmp_path / f"prompts{suffix}"
    content = b'{"q": "a\\nb", "id": 3}\n\n{"q": "c"}\n'
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read_prompts(str(file), "q") == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "--prompt-file .*a.txt has no prompt"),
        ("a.txt", b"\n\r\n", "--prompt-file .*a.txt has no prompt"),
        ("a.jsonl", b"", "--prompt-file .*a.jsonl has no prompt"),
        ("a.jsonl", b'{"prompt": ""}', "--prompt-file .*a.jsonl has no prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "a"}', "a.jsonl:2: .*leave the line empty"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1: .*"),
        ("a.jsonl", b"x", "a.jsonl:1: .*"),
        ("a.txt", b"a\xff", r"a.txt is not text in UTF-8 \(byte 1\)"),
    ],
)
def test_files_without_prompts_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), "prompt")


def test_continuations_are_json_lines(tmp_path):
    """Also of a prompt that is no valid text, as a shell can pass it."""
    file = tmp_path / "out.jsonl"
    rows = [Continuation("é\n", [1, 2], "eod"), Continuation("", [], "length")]
    write_continuations(str(file), ["a", "\udcff"], rows)
    first, second = file.read_bytes().splitlines()
    assert "é".encode() in first
    assert json.loads(first) == {"prompt": "a", "text": "é\n", "tokens": [1, 2], "end": "eod"}
    assert json.loads(second)["prompt"] == "\udcff"


def test_output_path_is_checked(tmp_path):
    require_output_file(str(tmp_path / "a"))
    for path in (tmp_path, tmp_path / "none/a"):
        with pytest.raises(ValueError, match="--output is .*; allowed: the path of a file"):
            require_output_file(str(path))


def test_prompt_must_fit_positions():
    require_fitting_prompt([1, 2], "a", 2)
    for tokens in ([], [1, 2, 3]):
        with pytest.raises(ValueError, match=f"prompt 'a' is {len(tokens)}; allowed: 1 to the"):
            require_fitting_prompt(tokens, "a", 2)
