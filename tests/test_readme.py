"""The commands of the READMEs exist and parse; what takes minutes is run elsewhere (the demo) or shrunk here."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.flags import flags_of as config_flags_of
from megatron.config.schema import SECTIONS

REPO = Path(__file__).resolve().parent.parent
READMES = {name: (REPO / name).read_text() for name in ("README.md", "dataset/README.md")}
README = READMES["README.md"]
HEREDOC = r"python - <<'EOF'\n(.*?)\nEOF\n"
TOOLS = (
    "tools/preprocess_data.py",
    "tools/merge_datasets.py",
    "tools/inspect_dataset.py",
    "tools/train_tokenizer.py",
    "tools/inspect_checkpoint.py",
    "tools/consolidate_checkpoint.py",
    "dataset/make_corpus.py",
)


def blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines of all bash blocks, continuations joined, comments and programs in Python dropped."""
    lines = []
    for block in blocks(text):
        for line in (
            re.sub(HEREDOC, "", block, flags=re.DOTALL).replace("\\\n", " ").splitlines()
        ):
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                lines.append(line)
    return lines


def run(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **env,
        },
    )


def flags_of(tool: str) -> argparse.ArgumentParser:
    return importlib.import_module(tool.removesuffix(".py").replace("/", ".")).parser()


@pytest.mark.parametrize(
    ("readme", "command"),
    [(name, line) for name, text in READMES.items() for line in commands(text)],
)
def test_command(readme, command, tmp_path):
    """make targets expand; training commands are dry-run; data tools parse their flags, and the README's preprocessing
    is done; other programs answer --help."""
    words = shlex.split(command)
    if words[0] == "make":
        done = run(f"make -n {' '.join(words[1:])}", REPO)
        assert done.returncode == 0, done.stderr
        return
    if words[:2] == ["python", "-c"]:
        assert compile(words[2], readme, "exec")
        return
    script = next(w for w in words if w.endswith((".sh", ".py")))
    assert (REPO / script).exists()
    if script in TOOLS:
        assert words[0] == "python" and flags_of(script).parse_args(
            words[words.index(script) + 1 :]
        )
        if readme != "README.md" or not script.endswith("preprocess_data.py"):
            return
    if script.endswith("download_vocab.sh"):  # needs a network
        assert run(f"bash -n {script}", REPO).returncode == 0
        return
    if script.endswith("run.sh"):
        done = run(f"DRY_RUN=1 {command}", REPO, OUTPUT_DIR=str(tmp_path))
    elif (
        "/gates/" in script
    ):  # tests/test_gate_scripts.py parses the flags; the demo's tokenizer is not there yet
        done = run(f"DRY_RUN=1 {command}", REPO, OUTPUT_DIR=str(tmp_path), PYTHON="/bin/echo")
    elif script.endswith("preprocess_data.py"):
        done = preprocess(command, tmp_path)
    elif "--help" in words:
        done = run(command, REPO)
    else:
        done = run(f"python {script} --help", REPO)
    assert done.returncode == 0, done.stdout + done.stderr


def preprocess(command: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """The README's preprocessing line on one document, with the GPT-2 vocabulary if the machine has it."""
    shared = REPO.parent / "shared/data"
    if not (shared / "gpt2-vocab.json").exists():
        pytest.skip("no GPT-2 vocabulary beside the repository")
    (tmp_path / "corpus.jsonl").write_text('{"text": "hello world"}\n')
    for name in ("vocab.json", "merges.txt"):
        command = command.replace(f"dataset/gpt2-{name}", str(shared / f"gpt2-{name}"))
    done = run(command.replace("tools/", f"{REPO}/tools/"), tmp_path)
    assert (tmp_path / "runs/mine/data/corpus_text_document.idx").exists(), done.stderr
    return done


@pytest.mark.parametrize("readme", READMES)
def test_what_is_inline_is_real(readme):
    """Files, commands of the tools, and flags: of some tool, of training, or of pip."""
    text = READMES[readme]
    for name in re.findall(
        r"`((?:megatron|tools|dataset|benchmarks|examples_deepspeed)/[\w./-]+)`", text
    ):
        assert (REPO / name).exists(), name
    for tool, arguments in re.findall(rf"`({'|'.join(map(re.escape, TOOLS))}) ([^`]+)`", text):
        assert flags_of(tool).parse_args(shlex.split(arguments))
    known = {flag for tool in TOOLS for flag in flags_of(tool)._option_string_actions}
    known |= {
        flag
        for name, cls in SECTIONS.items()
        for entry in config_flags_of(cls, name)
        for flag in entry.spellings
    }
    for inline in re.findall(r"`(--[^`]+)`", text):
        for flag in re.findall(r"(?:^|\s)(--[a-z][a-z-]*)", inline):
            field = flag.removeprefix("--").replace("-", "_")  # of the gate that is shown
            assert flag in known or f"    {field}: " in text, f"{readme}: {flag}"


def test_programs_in_the_readmes_compile():
    programs = [
        p
        for text in READMES.values()
        for block in blocks(text)
        for p in re.findall(HEREDOC, block, re.DOTALL)
    ]
    assert len(programs) == sum(text.count("<<") for text in READMES.values()) > 0
    for program in programs:
        compile(program, "README", "exec")


def test_figures_are_filled_in():
    assert "@@" not in README


def test_the_gates_it_names_are_the_gates_there_are():
    from megatron.moe.gate import available_gates

    for name in available_gates():
        assert f"`{name}`" in README, name


def test_the_gate_it_shows_is_the_gate_that_is_tested():
    """The example in the README is the throw-away gate that tests/training/test_pretrain.py trains."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    tested = (REPO / "tests/training/test_pretrain.py").read_text()
    body = example.split('mod E."""\n', 1)[1]
    assert body.strip() in tested
