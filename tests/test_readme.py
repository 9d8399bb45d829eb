"""The README's commands exist and parse; what takes minutes is run elsewhere (the demo) or shrunk here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()


def commands() -> list[str]:
    """Lines of all bash blocks, continuations joined, comments dropped."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                lines.append(line)
    return lines


def run(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=cwd, timeout=300,
                          env={**os.environ, "PYTHON": sys.executable,
                               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env})


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path):
    """make targets expand; training commands are dry-run; programs get their real input or answer --help."""
    words = shlex.split(command)
    if words[0] == "make":
        done = run(f"make -n {' '.join(words[1:])}", REPO)
        assert done.returncode == 0, done.stderr
        return
    script = next(w for w in words if w.endswith((".sh", ".py")))
    assert (REPO / script).exists()
    if script.endswith("download_vocab.sh"):  # needs a network
        assert run(f"bash -n {script}", REPO).returncode == 0
        return
    if script.endswith("run.sh"):
        done = run(f"DRY_RUN=1 {command}", REPO, OUTPUT_DIR=str(tmp_path))
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


def test_inline_commands_name_real_files():
    for name in re.findall(r"`((?:megatron|tools|dataset|benchmarks|examples_deepspeed)/[\w./-]+)`", README):
        assert (REPO / name).exists(), name


def test_figures_are_filled_in():
    assert "@@" not in README


def test_the_gates_it_names_are_the_gates_there_are():
    from megatron.moe.gates import available

    for name in available():
        assert f"`{name}`" in README, name


def test_the_gate_it_shows_is_the_gate_that_is_tested():
    """The example in the README is the throw-away gate that tests/test_pretrain.py trains."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    tested = (REPO / "tests/test_pretrain.py").read_text()
    body = example.split('mod E."""\n', 1)[1]
    assert body.strip() in tested
