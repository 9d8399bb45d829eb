"""The commands, flags, files and examples of both READMEs are valid."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from helpers import markdown
from megatron.inference.text import Continuation
from megatron.inference.transcript import Transcript
from megatron.training import console_writer

REPO = markdown.REPO
NAMES = ("README.md", "dataset/README.md")
READMES = {name: (REPO / name).read_text(encoding="utf-8") for name in NAMES}
README = READMES["README.md"]
TOP_FOLDERS = {"megatron", "tools", "examples_deepspeed/MoE", "dataset", "benchmarks"}
TOP_FOLDERS |= {"docs", "tests"}
COMMANDS = [
    (readme, command) for readme, text in READMES.items() for command in markdown.commands(text)
]


@pytest.mark.parametrize(("readme", "command"), COMMANDS)
def test_readme_commands_are_valid(readme, command, tmp_path):
    """`helpers.markdown` describes how each kind of command is checked."""
    markdown.assert_command_is_valid(command, tmp_path)


def test_readme_preprocessing_writes_token_files(tmp_path):
    """Preprocess one document, with the GPT-2 vocabulary if the machine has it."""
    vocabulary = REPO.parent / "shared/data"
    if not (vocabulary / "gpt2-vocab.json").exists():
        pytest.skip("this machine has no GPT-2 vocabulary in ../shared/data")
    commands = [c for c in markdown.commands(README) if "preprocess_data.py" in c]
    (command,) = [c for c in commands if "--vocab-file dataset/gpt2-vocab.json" in c]
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        command = command.replace(f"dataset/{name}", str(vocabulary / name))
    (tmp_path / "corpus.jsonl").write_text('{"text": "hello world"}\n')
    markdown.assert_success(markdown.run(command.replace("tools/", f"{REPO}/tools/"), tmp_path))
    assert (tmp_path / "runs/mine/data/corpus_text_document.idx").exists()


@pytest.mark.parametrize("readme", READMES)
def test_readme_inline_code_is_valid(readme):
    """Paths exist, flags are known, links work, and examples of tools parse."""
    text = READMES[readme]
    assert not markdown.missing_paths(text)
    assert not markdown.unknown_flags(text)
    assert not markdown.broken_links(REPO / readme)
    markdown.assert_tool_examples_parse(text)


def test_readme_python_programs_compile():
    programs = []
    for text in READMES.values():
        programs += markdown.python_programs(text)
    assert len(programs) == sum(text.count("<<") for text in READMES.values()) > 0
    for program in programs:
        compile(program, "README", "exec")


def test_readme_has_no_placeholders():
    assert "@@" not in README


def test_readme_names_every_gate():
    from megatron.moe.gate import available_gates

    for name in available_gates():
        assert f"`{name}`" in README, name


def test_readme_lists_every_folder():
    """The table has every package of megatron/ and every folder at the top."""
    listed = re.findall(r"^\| `([\w/]+)/` \|", README, re.MULTILINE)
    packages = [path.parent for path in (REPO / "megatron").glob("*/__init__.py")]
    expected = {path.relative_to(REPO).as_posix() for path in packages}
    expected |= TOP_FOLDERS
    assert set(listed) == expected and len(listed) == len(expected)


def test_readme_lists_every_tool():
    for path in (REPO / "tools").glob("*.py"):
        assert f"`{path.name}`" in README, path.name


def test_readme_gate_is_the_tested_gate():
    """tests/training/test_pretrain.py adds exactly this gate to a copy of the tree."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    tested = (REPO / "tests/training/test_pretrain.py").read_text(encoding="utf-8")
    assert f"GATE = '''{example}'''" in tested


def test_readme_log_lines_have_console_format(monkeypatch):
    """The sample log lines are what the console writer prints for these metrics."""
    lines = []
    logger = SimpleNamespace(info=lines.append)
    monkeypatch.setattr(console_writer, "get_logger", lambda: logger)
    console = console_writer.ConsoleWriter(200, 200 * 4096)
    console.write(
        {
            "kind": "train",
            "iteration": 200,
            "loss": 4.49745,
            "aux_loss": 0.03123,
            "lr": 2.001e-4,
            "grad_norm": 0.708,
            "tokens_per_s": 2810.0,
            "experts_per_token": 9.69,
            "experts_per_token_before_capacity": 9.69,
            "load_imbalance_max_over_mean": 1.42,
            "dropped_assignment_fraction": 0.0,
            "skipped_steps": 0,
        }
    )
    console.write(
        {
            "kind": "test",
            "iteration": 200,
            "loss": 4.75318,
            "perplexity": 115.952,
            "experts_per_token": 9.82,
            "experts_per_token_before_capacity": 9.82,
            "load_imbalance_max_over_mean": 1.39,
            "dropped_assignment_fraction": 0.0,
            "experts_per_token_by_layer": [7.39, 11.14, 10.92],
        }
    )
    assert len(lines) == 2
    for line in lines:
        assert f" {line}\n" in README, line


def test_readme_continuations_have_printed_form():
    """The sample output has the prompts of demo.sh, and a text for each, as they are printed."""
    script = (REPO / "examples_deepspeed/MoE/demo.sh").read_text(encoding="utf-8")
    prompts = re.findall(r'"(.*?)"', re.search(r"PROMPTS=\((.*)\)", script)[1])
    shown = re.search(r"== 5/6 .*\n((?:[>|] .*\n)*)== 6/6 ", README)[1]
    texts = re.findall(r"> (.*)\n((?:\| .*\n)+)", shown)
    printed = []
    transcript = Transcript(prompts, is_live=False, write=printed.append)
    for number, (_, lines) in enumerate(texts):
        text = re.sub("^\\| ", "", lines, flags=re.MULTILINE).removesuffix("\n")
        transcript.callbacks.on_text(number, text)
        transcript.callbacks.on_end(number, Continuation(text, [], "length"))
    assert "".join(printed) == shown and len(texts) == len(prompts) == 5
