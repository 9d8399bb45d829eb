"""Check the commands, flags, files and links in the Markdown pages of the repository.

Nothing is trained: launch scripts print their command under DRY_RUN, tools only parse
their flags, and every other program answers --help.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from helpers.scripts import config_of, launch_command
from megatron.config.flags import EXPERT_OPTIONS, flags_of
from megatron.config.foreign_names import ALIASES, NOT_NEEDED, NOT_SUPPORTED
from megatron.config.schema import SECTIONS
from megatron.interop.upcycle.options import UpcycleOptions
from megatron.moe.experts.expert_type import available_expert_types, expert_config_class
from megatron.moe.gate import available_gates, gate_config_class
from tools.analyze_model import AnalysisOptions
from tools.check_gate import CheckOptions

REPO = Path(__file__).resolve().parents[2]
PYTHON_HEREDOC = r"python - <<'EOF'\n(.*?)\nEOF\n"
TOOLS = (
    "tools/preprocess_data.py",
    "tools/merge_datasets.py",
    "tools/inspect_dataset.py",
    "tools/train_tokenizer.py",
    "tools/inspect_checkpoint.py",
    "tools/consolidate_checkpoint.py",
    "tools/convert_from_hf.py",
    "tools/convert_to_hf.py",
    "tools/generate_text.py",
    "tools/report.py",
    "tools/evaluate.py",
    "tools/evaluate_perplexity.py",
    "tools/compare_gates.py",
    "tools/inspect_routing.py",
    "dataset/make_corpus.py",
)
GENERAL_FLAGS = {"--help", "--help-all", "--version", "--config"}
"""Flags of pretrain_gpt.py that are not fields of its configuration"""

PATH = r"(?:megatron|tools|dataset|benchmarks|examples_deepspeed|docs|tests)/[\w./-]*"
"""A file or folder of the repository, as a page writes it"""


def bash_blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def python_programs(text: str) -> list[str]:
    """List the Python programs that bash blocks pass to `python -`."""
    programs = []
    for block in bash_blocks(text):
        programs += re.findall(PYTHON_HEREDOC, block, re.DOTALL)
    return programs


def commands(text: str) -> list[str]:
    """List the commands of all bash blocks, with continued lines joined."""
    lines = []
    for block in bash_blocks(text):
        shell = re.sub(PYTHON_HEREDOC, "", block, flags=re.DOTALL).replace("\\\n", " ")
        for line in shell.splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                lines.append(command)
    return lines


def run(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in bash with this Python first on the PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "PATH": path, **env},
    )


def tool_parser(tool: str) -> argparse.ArgumentParser:
    return importlib.import_module(tool.removesuffix(".py").replace("/", ".")).parser()


def assert_command_is_valid(command: str, folder: Path) -> None:
    """Assert that a documented command is valid; `folder` is for its output."""
    words = shlex.split(command)
    if words[0] == "make":
        assert_success(run(f"make -n {shlex.join(words[1:])}", REPO))
        return
    if words[:3] == ["python", "-m", "pytest"]:
        paths = [word for word in words[3:] if "/" in word]
        assert paths and all((REPO / path).exists() for path in paths), command
        return
    script = next(word for word in words if word.endswith((".sh", ".py")))
    assert (REPO / script).exists(), script
    if script in TOOLS:
        assert words[0] == "python"
        assert tool_parser(script).parse_args(words[words.index(script) + 1 :])
    elif script.endswith("run.sh"):
        hosts = folder / "hosts"
        hosts.write_text("node-a slots=8\nnode-b slots=8\n")
        command = command.replace("HOSTFILE=hosts", f"HOSTFILE={hosts}")
        # `echo` replaces Python, which would need two seconds to print the model's size.
        done = run(f"DRY_RUN=1 {command}", REPO, OUTPUT_DIR=str(folder), PYTHON="/bin/echo")
        assert_success(done)
        config_of(launch_command(done.stdout))
    elif "/gates/" in script:
        # tests/test_gate_scripts.py parses the flags.
        done = run(f"DRY_RUN=1 {command}", REPO, OUTPUT_DIR=str(folder), PYTHON="/bin/echo")
        assert_success(done)
    elif script.endswith(".sh"):  # downloads from the network
        assert_success(run(f"bash -n {script}", REPO))
    else:
        assert_has_help(script)


@cache
def assert_has_help(script: str) -> None:
    """Assert that a program prints its flags; commands may start the same one many times."""
    assert_success(run(f"python {script} --help", REPO))


def assert_success(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def known_flags() -> frozenset[str]:
    """Return the flags of training, gates, tools and benchmarks, and those of Megatron."""
    flags = {*GENERAL_FLAGS, *ALIASES, *NOT_NEEDED, *NOT_SUPPORTED}
    for source in [*REPO.glob("benchmarks/*.py"), REPO / "tests/record_results.py"]:
        flags |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source.read_text()))
    for tool in TOOLS:
        flags |= set(tool_parser(tool)._option_string_actions)
    sections = [*SECTIONS.items()]
    for options in (AnalysisOptions, CheckOptions, UpcycleOptions):
        sections.append(("options", options))
    for name in available_gates():
        sections.append(("gate_options", gate_config_class(name)))
        for flag in flags_of(gate_config_class(name), "gate_options"):
            spellings = [spelling.removeprefix("--") for spelling in flag.all_spellings]
            flags |= {f"--{name}.{spelling}".replace("_", "-") for spelling in spellings}
    for name in available_expert_types():
        sections.append((EXPERT_OPTIONS, expert_config_class(name)))
    for section, cls in sections:
        for flag in flags_of(cls, section):
            flags |= set(flag.all_spellings)
    return frozenset(flags)


def unknown_flags(text: str) -> set[str]:
    """Return flags in inline code that no program and no gate shown on the page has."""
    flags = set()
    for inline in re.findall(r"`(--[^`]+)`", text):
        found = re.findall(r"(?:^|\s)(--[a-z][a-z0-9_.-]*)", inline)
        flags |= {flag.rstrip(".").replace("_", "-") for flag in found}
    fields = set(re.findall(r"^        (\w+): ", text, re.MULTILINE))
    fields |= set(re.findall(r"^    --([a-z0-9-]+) ", text, re.MULTILINE))
    shown = {"--" + field.replace("_", "-") for field in fields}
    shown |= {"--expert-" + field.replace("_", "-") for field in fields}
    return flags - known_flags() - shown


def missing_paths(text: str) -> list[str]:
    """Return paths in inline code that do not exist; NAME stands for a gate."""
    paths = re.findall(rf"`({PATH})`", text)
    return [path for path in paths if not (REPO / path.replace("NAME", "topk")).exists()]


def broken_links(page: Path) -> list[str]:
    """Return relative links to files that do not exist."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    return [link for link in local if not (page.parent / link).exists()]


def assert_tool_examples_parse(text: str) -> None:
    """Parse inline examples such as `tools/inspect_dataset.py PREFIX --full`."""
    names = "|".join(map(re.escape, TOOLS))
    for tool, arguments in re.findall(rf"`({names}) ([^`]+)`", text):
        assert tool_parser(tool).parse_args(shlex.split(arguments))
