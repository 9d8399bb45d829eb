"""The study in docs/comparing-gates.md is valid, and the page names all keys."""

from __future__ import annotations

import re

import yaml

from helpers.studies import REPO
from megatron.analysis.compare import study_file
from megatron.analysis.compare.overrides import override
from megatron.analysis.compare.plan import plan_study
from megatron.analysis.compare.study_file import read_study
from megatron.pretrain import parse_flags

PAGE = (REPO / "docs/comparing-gates.md").read_text(encoding="utf-8")


def test_study_of_the_page_is_matched(tmp_path):
    """With random tokens in place of the demo's data, which `make demo` writes."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    content = yaml.safe_load(text)
    for flag in ("data-path", "split", "tokenizer-type", "tokenizer-model"):
        del content["base"][flag]
    content["base"] |= {"mock-data": True, "vocab-size": 8192}
    content["base"] |= {"tokenizer-type": "ByteTokenizer"}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    plan = plan_study(read_study(path), parse_flags)
    plan.require_matched()
    assert (len(plan.cells), len(plan.runs)) == (9, 12)
    # As in its third command
    assert "--seeds 1 2 --set train-iters=50" in PAGE
    short = plan_study(override(read_study(path), {}, [1, 2], ["train-iters=50"]), parse_flags)
    assert [cell.iterations for cell in short.cells] == [50] * 6


def test_page_names_all_keys():
    keys = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert keys == set(study_file.STUDY_KEYS)
