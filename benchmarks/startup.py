"""From the launch of the demo to its first logged step, against two ranks that import.

The baseline is a launch of two ranks that import torch and DeepSpeed. Both go through
the `deepspeed` launcher with the same environment, in turn, with the files in the page
cache (one demo before the first round warms it). The demo is
examples_deepspeed/MoE/demo.sh from its training on, with a log line per step. It is
killed when the line of the first step is printed. Before that it also evaluates the
untrained model, which the second row leaves out. The baseline ends when its launcher
does; in the third row, when both ranks have imported. Below the ratios is where the
time goes: the launcher up to the start of the ranks, and the stages that the run logs.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

REPO = Path(__file__).resolve().parent.parent
RANKS = 2
BAR = 1.5
IMPORTS = "import torch, deepspeed\nprint('imported', flush=True)\n"
FIRST_STEP = r"iteration +1/"
IMPORTED = "imported"
STAGES = r"start-up: ([\d.]+) s: (.*)"
TOTAL = "launch to first logged step"
BASELINE = f"{RANKS} ranks that import torch and DeepSpeed"


def launch(command: list[str], until: str | None, **env: str) -> list[tuple[float, str]]:
    """Run a program and time its output.

    Args:
        until: pattern; the program is killed when it prints a line that matches. None:
            it runs to its end.
        env: additional environment variables.

    Returns:
        (seconds since the launch, line) of each printed line; with `until` None, the
        end of the program is the last entry, with an empty line.

    Raises:
        RuntimeError: the program ends before it prints the line, or fails.
    """
    start = time.perf_counter()
    lines: list[tuple[float, str]] = []
    found = False
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        start_new_session=True,
        env=environment() | env,
    )
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
            if until is not None and re.search(until, line):
                found = True
                break
        else:
            process.wait()
            lines.append((time.perf_counter() - start, ""))
    finally:
        if process.poll() is None:
            # The session has the launcher, its ranks and the shells.
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        code = process.wait()
    succeeded = code == 0 if until is None else found
    if not succeeded:
        printed = "\n".join(line for _, line in lines)
        raise RuntimeError(f"{' '.join(command)} did not do what it should:\n{printed}")
    return lines


def environment() -> dict[str, str]:
    """The environment of run.sh on two cores without a GPU, with this Python first."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPO),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(report.free_port()),
        "NUM_GPUS": str(RANKS),
        "PYTHONUNBUFFERED": "1",
    }


def prepare(data: Path) -> None:
    """Make the demo's corpus and token files.

    The tokenizer has the demo's size and is trained on a fifth of the text.
    """
    data.mkdir()
    make_corpus = ["dataset/make_corpus.py", "--output", "corpus.jsonl"]
    train_tokenizer = ["tools/train_tokenizer.py", "--input", "corpus.jsonl"]
    train_tokenizer += ["--vocab-size", "8192", "--max-bytes", "6000000"]
    train_tokenizer += ["--output", "tokenizer.json"]
    preprocess = ["tools/preprocess_data.py", "--input", "corpus.jsonl"]
    preprocess += ["--output-prefix", "corpus", "--append-eod"]
    preprocess += ["--tokenizer-type", "HuggingFaceTokenizer"]
    preprocess += ["--tokenizer-model", "tokenizer.json"]
    for script, *arguments in (make_corpus, train_tokenizer, preprocess):
        subprocess.run(
            [sys.executable, REPO / script, *arguments],
            check=True,
            cwd=data,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )


def demo(folder: Path) -> dict[str, float]:
    """Launch the demo; return the seconds of each stage up to its first step."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        lines = launch(
            ["bash", "examples_deepspeed/MoE/demo.sh"],
            FIRST_STEP,
            OUTPUT_DIR=out,
            LOG_INTERVAL="1",
            DATA_DIR=str(folder / "data"),
        )
    return stages(lines)


def stages(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Split the time of a launch into stages, whose sum is the time of the last line.

    The stages are the launcher, which ends when rank 0's process starts, those in the run's
    line on its start-up, and the rest.
    """
    logged_at, found = next(
        (seconds, found) for seconds, line in lines if (found := re.search(STAGES, line))
    )
    seconds_of = {"launcher": logged_at - float(found[1])}
    for stage in re.split(r"(?<=\d), ", found[2]):
        name, seconds = re.fullmatch(r"(.*) ([\d.]+)", stage).groups()
        seconds_of[name] = float(seconds)
    last, _ = lines[-1]
    return {**seconds_of, "the rest": last - sum(seconds_of.values())}


def imports(script: Path) -> tuple[float, float]:
    """Launch the baseline.

    Returns:
        seconds until both ranks have imported, and until the launcher has ended.
    """
    port = environment()["MASTER_PORT"]
    command = ["deepspeed", "--num_gpus", str(RANKS), "--master_port", port, str(script)]
    lines = launch(command, None)
    end, _ = lines[-1]
    return max(seconds for seconds, line in lines if IMPORTED in line), end


def main() -> int:
    args = report.parser(__doc__).parse_args()
    rounds = 3 if args.quick else 7
    ours: list[dict[str, float]] = []
    until_imported: list[float] = []
    until_end: list[float] = []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        script = folder / "imports.py"
        script.write_text(IMPORTS)
        prepare(folder / "data")
        demo(folder)
        for _ in range(rounds):
            imported, end = imports(script)
            until_imported.append(imported)
            until_end.append(end)
            ours.append(demo(folder))
    total = [sum(launched.values()) for launched in ours]
    trained = [t - launched["evaluation"] for t, launched in zip(total, ours, strict=True)]
    rows = [
        report.row(TOTAL, BASELINE, ratios(total, until_end), BAR),
        report.row(f"{TOTAL}, no evaluation", BASELINE, ratios(trained, until_end), BAR),
        report.row(TOTAL, "the same, until they have", ratios(total, until_imported)),
    ]
    code = report.finish(rows, args)
    seconds: dict[str, list[float]] = {stage: [] for stage in ours[0]}
    for launched in ours:
        for stage, value in launched.items():
            seconds[stage].append(value)
    seconds[TOTAL] = total
    seconds["baseline, until both have imported"] = until_imported
    seconds["baseline, until its launcher ends"] = until_end
    print_seconds(seconds)
    return code


def ratios(values: list[float], baseline: list[float]) -> list[float]:
    """Divide by the baseline, round by round."""
    return [a / b for a, b in zip(values, baseline, strict=True)]


def print_seconds(seconds: dict[str, list[float]]) -> None:
    """Print median, lowest and highest of each row."""
    print(f"\n{'seconds, median (lowest - highest)':48s}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:42s}{median:6.2f}   ({min(values):.2f} - {max(values):.2f})")


if __name__ == "__main__":
    raise SystemExit(main())
