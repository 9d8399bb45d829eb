"""From the launch of the demo to its first logged step, against a launch of two ranks that import torch and DeepSpeed.

Both go through the `deepspeed` launcher with the same environment, in turn, with the files in the page cache (one demo
before the first round warms it). The demo is examples_deepspeed/MoE/demo.sh from its training on, with a log line every
step; it is ended when the line of the first step is there. Until then it also evaluates the untrained model, which the
second row leaves out. The baseline ends when its launcher does; in the third row, when both ranks have imported. Below
the ratios stands what takes the time: the launcher up to the start of the ranks, and the stages that the run logs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

REPO = Path(__file__).resolve().parent.parent
RANKS, BAR = 2, 1.5
IMPORTS = "import torch, deepspeed\nprint('imported', flush=True)\n"
FIRST_STEP, SPAWNED, IMPORTED = r"iteration +1/", r"process \d+ spawned", "imported"
STAGES = r"start-up: [\d.]+ s: (.*)"


def launch(command: list[str], until: str | None, **env: str) -> list[tuple[float, str]]:
    """(seconds since the launch, line) of what a program printed up to a line with `until`, at which it is ended; None:
    up to its end, which is the last entry.

    Raises:
        RuntimeError: it ends in another way.
    """
    start, lines, found = time.perf_counter(), [], until is None
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
            os.killpg(
                process.pid, signal.SIGKILL
            )  # the launcher, its ranks and the shells: a session of their own
        process.stdout.close()
        code = process.wait()
    if not found or until is None and code:
        raise RuntimeError(
            "\n".join(
                [
                    f"{' '.join(command)} did not do what it should:",
                    *(line for _, line in lines),
                ]
            )
        )
    return lines


def environment() -> dict[str, str]:
    """As run.sh has it on two cores without a GPU, with this Python first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPO),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(port),
        "NUM_GPUS": str(RANKS),
        "PYTHONUNBUFFERED": "1",
    }


def prepare(data: Path) -> None:
    """The demo's corpus and shards, with a tokenizer of the demo's size from a fifth of the text."""
    data.mkdir()
    for command in (
        ["dataset/make_corpus.py", "--output", "corpus.jsonl"],
        [
            "tools/train_tokenizer.py",
            "--input",
            "corpus.jsonl",
            "--vocab-size",
            "8192",
            "--max-bytes",
            "6000000",
            "--output",
            "tokenizer.json",
        ],
        [
            "tools/preprocess_data.py",
            "--input",
            "corpus.jsonl",
            "--output-prefix",
            "corpus",
            "--append-eod",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            "tokenizer.json",
        ],
    ):
        subprocess.run(
            [sys.executable, REPO / command[0], *command[1:]],
            check=True,
            cwd=data,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )


def demo(folder: Path) -> dict[str, float]:
    """Seconds of each stage of one launch of the demo; their sum is the time to its first logged step."""
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
    """The launcher, the stages in the run's line on its start-up, and what is left: starting Python, and printing."""
    launcher = max(seconds for seconds, line in lines if re.search(SPAWNED, line))
    logged = next(found[1] for _, line in lines if (found := re.search(STAGES, line)))
    pairs = [
        re.fullmatch(r"(.*) ([\d.]+)", stage).groups()
        for stage in re.split(r"(?<=\d), ", logged)
    ]
    named = {"launcher": launcher, **{name: float(seconds) for name, seconds in pairs}}
    return {**named, "the rest": lines[-1][0] - sum(named.values())}


def imports(script: Path) -> tuple[float, float]:
    """Seconds until both ranks have imported, and until the launcher has ended."""
    lines = launch(
        [
            "deepspeed",
            "--num_gpus",
            str(RANKS),
            "--master_port",
            environment()["MASTER_PORT"],
            str(script),
        ],
        None,
    )
    return max(seconds for seconds, line in lines if IMPORTED in line), lines[-1][0]


def main() -> int:
    args = report.parser(__doc__).parse_args()
    rounds = 3 if args.quick else 7
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as temp:
        folder, script = Path(temp), Path(temp) / "imports.py"
        script.write_text(IMPORTS)
        prepare(folder / "data")
        demo(folder)
        for _ in range(rounds):
            theirs.append(imports(script))
            ours.append(demo(folder))
    total = [sum(one.values()) for one in ours]
    whole, baseline = (
        "launch to first logged step",
        f"{RANKS} ranks that import torch and DeepSpeed",
    )
    rows = [
        report.row(
            whole, baseline, [a / b for a, (_, b) in zip(total, theirs, strict=True)], BAR
        ),
        report.row(
            f"{whole}, no evaluation",
            baseline,
            [
                (a - one["evaluation"]) / b
                for a, one, (_, b) in zip(total, ours, theirs, strict=True)
            ],
            BAR,
        ),
        report.row(
            whole,
            "the same, until they have",
            [a / b for a, (b, _) in zip(total, theirs, strict=True)],
        ),
    ]
    code = report.finish(rows, args)
    print(f"\n{'seconds, median (lowest - highest)':48s}")
    for name, values in {
        **{stage: [one[stage] for one in ours] for stage in ours[0]},
        whole: total,
        "baseline, until both have imported": [a for a, _ in theirs],
        "baseline, until its launcher ends": [b for _, b in theirs],
    }.items():
        print(
            f"{name:42s}{statistics.median(values):6.2f}   ({min(values):.2f} - {max(values):.2f})"
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
