"""The study files in examples_deepspeed/MoE/studies: each cell parses, and the plan matches."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
from test_structure import AVOIDED

from helpers import markdown
from megatron.analysis.compare.cells import build_cells
from megatron.analysis.compare.plan import StudyPlan, plan_study
from megatron.analysis.compare.seed_statistics import detectable_difference
from megatron.analysis.compare.study import Study
from megatron.analysis.compare.study_file import read_study
from megatron.pretrain import parse_flags

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "examples_deepspeed/MoE/studies"
FILES = sorted(FOLDER.glob("*.yaml"))
DATA_FLAGS = (
    "data-path",
    "train-data-path",
    "valid-data-path",
    "valid-sets",
    "split",
    "tokenizer-type",
    "tokenizer-model",
    "vocab-file",
    "merge-file",
)
VOCABULARY = {"balancing": 2048, "libmoe": 8000, "peer": 50257}


def without_files(study: Study) -> Study:
    """The study with random tokens of the same vocabulary, because its data are not here."""
    vocabulary = VOCABULARY[study.name.partition("_")[0]]
    base = {flag: value for flag, value in study.base.items() if flag not in DATA_FLAGS}
    base |= {"mock-data": True, "tokenizer-type": "NullTokenizer"}
    return dataclasses.replace(study, base=base | {"tokenizer-model": str(vocabulary)})


@cache
def planned(name: str) -> StudyPlan:
    return plan_study(without_files(read_study(FOLDER / f"{name}.yaml")), parse_flags)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flags_of_every_cell_parse(path):
    """With the parser of pretrain_gpt.py, and as they are in the file."""
    study = read_study(path)
    cells = build_cells(study)
    assert study.name == path.stem
    assert len(study.seeds) >= 3 and study.baseline
    for cell in cells:
        config = parse_flags(cell.words)
        assert config.train.seed == cell.seed
        assert config.train.eval_interval and config.train.eval_iters
        for value in cell.tuning.values if cell.tuning else ():
            parse_flags(cell.with_tuned(value).words)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "peer_data"], ids=lambda path: path.stem
)
def test_parameters_match(path):
    plan = planned(path.stem)
    plan.require_matched()
    assert plan.study.match is not None
    tokens = {cell.tokens for cell in plan.runs}
    assert len(tokens) == 1


@pytest.mark.parametrize(("name", "millions"), [("libmoe_158m", 158), ("libmoe_679m", 679)])
def test_libmoe_models_have_their_published_sizes(name, millions):
    softmax = planned(name).cells[0]
    assert softmax.cell.axes == {"gate": "softmax"}
    assert abs(softmax.size.total / (millions * 1e6) - 1) < 1e-3
    assert softmax.tokens in (6_553_600_000, 26_214_400_000)


def test_balancing_study_has_the_gates_of_its_question():
    plan = planned("balancing")
    active = {cell.cell.axes["gate"]: cell.active for cell in plan.cells}
    assert list(active)[:4] == ["topk", "threshold", "remoe", "dense"]
    # Each extra run of a grid costs one run; the chosen one is a cell of the study.
    assert (len(active), len(plan.cells), len(plan.runs)) == (12, 36, 43)
    for value in active.values():
        assert abs(value / active["topk"] - 1) < 0.02


def test_mixes_of_data_add_up():
    """Weights sum to 1, and held-out documents are in no mix."""
    for cell in build_cells(read_study(FOLDER / "peer_data.yaml")):
        words = cell.flags["train-data-path"]
        assert sum(words[::2]) == pytest.approx(1)
        held_out = cell.flags["valid-data-path"][1::2]
        assert not set(words[1::2]) & set(held_out)
        named = {word.partition("=")[2] for word in cell.flags["valid-sets"]}
        assert named == set(held_out)


def test_readme_describes_each_study():
    readme = (FOLDER / "README.md").read_text()
    for path in FILES:
        assert f"`{path.name}`" in readme, path.name


@pytest.mark.parametrize(
    "page", [FOLDER / "README.md", REPO / "docs/studies/README.md"], ids=["examples", "docs"]
)
def test_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert not markdown.missing_paths(text)
    assert not markdown.broken_links(page)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not [match[0] for match in AVOIDED.finditer(prose)]
    for command in markdown.commands(text):
        program = command.split()[1]
        assert (REPO / program).is_file(), command


def test_readme_makes_the_data_of_balancing():
    """The prefix and the tokenizer of the study are those that the commands write."""
    base = read_study(FOLDER / "balancing.yaml").base
    commands = markdown.commands((FOLDER / "README.md").read_text())
    prefix = base["data-path"].removesuffix("_text_document")
    assert any(f"--output-prefix {prefix} " in command for command in commands)
    assert any(
        command.endswith(f"--output {base['tokenizer-model']}")
        and "--vocab-size 2048" in command
        for command in commands
    )


@pytest.mark.parametrize(("pairs", "stated"), [(3, 3.3), (5, 1.7)])
def test_page_states_what_few_seeds_find(pairs, stated):
    assert round(detectable_difference(1.0, pairs), 1) == stated
    page = (REPO / "docs/studies/README.md").read_text()
    assert f"{stated}" in page
