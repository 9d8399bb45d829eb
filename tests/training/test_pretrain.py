"""Training runs on tiny data: through scripts and launcher, resumed, refused and killed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import runs
from helpers.spawn import free_port
from megatron.data.indexed.writer import IndexedWriter
from megatron.pretrain import main

REPO = Path(__file__).resolve().parents[2]


def test_run_learns_and_logs_metrics(finished):
    train = runs.metrics(finished)
    evals = runs.metrics(finished, "eval")
    test = runs.metrics(finished, "test")
    assert [m["iteration"] for m in train] == list(range(1, 21))
    assert [m["iteration"] for m in evals] == [0, 10, 20] and [
        m["iteration"] for m in test
    ] == [20]
    assert evals[0]["loss"] == pytest.approx(np.log(257), abs=0.5), (
        "an untrained model knows nothing"
    )
    assert evals[-1]["loss"] < evals[0]["loss"] - 1.0
    for m in train:
        assert m["tokens_per_s"] == pytest.approx(8 * 32 / m["step_time_ms"] * 1000, rel=1e-3)
        assert 1 <= m["experts_per_token"] <= 4 and m["dropped_assignment_fraction"] == 0
        assert len(m["experts_per_token_by_layer"]) == 1
        assert m["consumed_samples"] == 8 * m["iteration"] and m["skipped_steps"] == 0
        assert (
            m["grad_norm"] > 0 and m["load_imbalance_max_over_mean"] >= 1 and m["aux_loss"] > 0
        )
    assert train[0]["lr"] < train[1]["lr"] == 5e-3 and train[-1]["lr"] < 1e-3


def test_each_rank_saves_half_of_experts(finished):
    """Each rank also saves half of the optimizer state, in one file."""
    folder = finished / "checkpoints" / (finished / "checkpoints" / "latest").read_text()
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "manifest.json",
        "run.json",
        "state.json",
        "index.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    }
    tensors = json.loads((folder / "index.json").read_text())["tensors"]
    stacks = [t for name, t in tensors.items() if ".experts." in name]
    assert stacks and all(t["shape"][0] == 4 for t in stacks)
    for stack in stacks:
        half = math.prod(stack["shape"]) // 2
        assert stack["pieces"] == [[0, 0, half], [1, half, half]]


def test_resumed_run_repeats_bit_for_bit(finished, data, tmp_path, ranks2):
    """A run stopped at iteration 10 and resumed equals one without a stop, to the last bit."""
    argv = runs.flags(data, tmp_path, 20, *runs.EP2)
    ranks2.run(runs.train, [*argv, "--exit-interval", "10"], timeout=300)
    assert [m["iteration"] for m in runs.metrics(tmp_path)] == list(
        range(1, 11)
    ) and not runs.metrics(tmp_path, "test")
    ranks2.run(runs.train, [*argv, "--load", str(tmp_path / "checkpoints")], timeout=300)
    for kind in ("train", "eval", "test"):
        full = {m["iteration"]: m for m in runs.metrics(finished, kind)}
        halves = {m["iteration"]: m for m in runs.metrics(tmp_path, kind)}
        assert full.keys() == halves.keys()
        for i, m in full.items():
            for key in (
                "loss",
                "aux_loss",
                "lr",
                "grad_norm",
                "consumed_samples",
                "experts_per_token",
            ):
                assert m.get(key) == halves[i].get(key), f"{kind} {i} {key}"


@pytest.mark.parametrize(
    "options",
    [
        ("--zero-stage", "2"),
        ("--zero-stage", "3"),
        ("--recompute-activations",),
        ("--moe-train-capacity-factor", "1.0", "--moe-shared-experts", "1"),
    ],
    ids=lambda o: " ".join(o),
)
def test_other_options_train(options, finished, data, tmp_path, ranks2):
    """Recomputation changes nothing, ZeRO 2 and 3 only rounding; a capacity drops tokens."""
    argv = runs.flags(data, tmp_path, 4, *runs.EP2, "--lr-warmup-fraction", "0.5", *options)
    ranks2.run(runs.train, argv, timeout=300)
    got = runs.metrics(tmp_path)
    if options == ("--recompute-activations",):
        assert got[0]["loss"] == runs.metrics(finished)[0]["loss"]
        assert got[0]["grad_norm"] == runs.metrics(finished)[0]["grad_norm"]
    elif options[0] == "--zero-stage":
        assert got[0]["loss"] == pytest.approx(runs.metrics(finished)[0]["loss"], abs=0.02)
        assert got[0]["grad_norm"] == pytest.approx(
            runs.metrics(finished)[0]["grad_norm"], rel=0.02
        )
    else:
        assert max(m["dropped_assignment_fraction"] for m in got) > 0
        assert all(
            m["experts_per_token"] < m["experts_per_token_before_capacity"]
            for m in got
            if m["dropped_assignment_fraction"]
        )
    assert got[-1]["loss"] < got[0]["loss"]


def _train_with_nan_weight(argv: list[str]) -> None:
    """Train in a rank with a weight that is NaN from the start."""
    from megatron.model.gpt import GPT

    original = GPT.init_weights

    def with_nan(self, seed):
        original(self, seed)
        self.norm.weight.data[0] = float("nan")

    GPT.init_weights = with_nan
    try:
        runs.train(argv)
    finally:
        GPT.init_weights = original


def test_nan_is_logged_and_stops_run(data, tmp_path, ranks2):
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, "--max-bad-steps", "3")
    with pytest.raises(RuntimeError, match="3 consecutive steps up to iteration 3 had NaN"):
        ranks2.run(_train_with_nan_weight, argv, timeout=300)
    last = runs.metrics(tmp_path)[-1]
    assert last["iteration"] == 3 and last["skipped_steps"] == 3 and np.isnan(last["loss"])
    assert '"loss": NaN' in (tmp_path / "metrics.jsonl").read_text()
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--hidden-size", "64"), r"--hidden-size is 64 but checkpoint .* was made with 32"),
        (("--gate", "topk"), r"--gate is 'topk' but checkpoint .* was made with 'threshold'"),
        (("--num-experts", "8"), r"--num-experts is 8 but checkpoint .* was made with 4"),
        (
            ("--lr", "4e-3"),
            r"--lr is 0.004 but checkpoint .* was made with 0.005; use the checkpoint's value, or "
            r"add --override-lr-schedule",
        ),
        (
            ("--train-iters", "30"),
            r"number of iterations, which its learning rates follow, is 30 .* made with 20",
        ),
    ],
)
def test_checkpoint_contradicting_flags_is_refused(
    changes, message, finished, data, tmp_path, ranks2
):
    argv = runs.flags(data, tmp_path, 20, *runs.EP2, "--load", str(finished / "checkpoints"))
    if "--gate" in changes:
        argv = runs.with_gate(argv)
    with pytest.raises(RuntimeError, match=message):
        ranks2.run(runs.train, [*argv, *changes])


def run(argv: list[str], **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env},
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--no-such-flag", "1"), r"--no-such-flag"),
        (("--gate", "nope"), r"nope.*allowed: .*threshold.*topk"),
        (("--tokenizer-type", "NoTokenizer"), r"NoTokenizer.*GPT2BPETokenizer"),
        (
            ("--moe-expert-parallel-size", "3"),
            r"--num-experts is 4; allowed: a multiple of --moe-expert-parallel-size",
        ),
        (
            ("--moe-expert-parallel-size", "4"),
            r"--moe-expert-parallel-size is 4; allowed: a divisor of the 1 ranks",
        ),
        (("--data-path", "/nowhere/x"), r"/nowhere/x"),
        (("--split", "0,1,1"), r"the train split of .* is empty: --split 0,1,1 of 60 doc"),
        (("--load", "/nowhere"), r"/nowhere is not a directory of checkpoints. Point --load"),
        (
            ("--zero-stage", "0", "--moe-expert-parallel-size", "2"),
            r"--zero-stage is 0; allowed: 1, 2 or 3",
        ),
        (
            ("--vocab-size", "100"),
            r"--vocab-size is 100; allowed: at least the tokenizer's 257",
        ),
        (("--metrics-file", "/proc/nowhere/m.jsonl"), r"/proc/nowhere"),
        (("--global-batch-size", "7"), r"--global-batch-size is 7; allowed: a multiple of"),
        (
            ("--threshold-max-experts", "9"),
            r"--threshold-max-experts is 9; allowed: 0 \(no cap\) to .* which is 4",
        ),
        (("--topk", "-1"), r"--topk is -1; allowed: 0 or more, without effect"),
        (("--score-function", "sigmoid"), r"--score-function.*topk"),
    ],
)
def test_bad_flag_is_one_line_error(changes, message, data, tmp_path):
    """Exit code 2 and one line on stderr that names what was set and where; no traceback."""
    check_refused([*runs.flags(data, tmp_path, 2), *changes], message)


def check_refused(argv: list[str], message: str) -> None:
    done = run([sys.executable, "pretrain_gpt.py", *argv])
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1 and re.search(message, errors[0]), done.stderr


def test_token_outside_vocabulary_is_named(tmp_path):
    prefix = str(tmp_path / "foreign")
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            writer.add_document(np.full(200, 300))
        writer.finish({})
    check_refused(runs.flags(prefix, tmp_path, 2), r"foreign.*300.*0 to 256")


def test_bad_token_on_one_rank(tmp_path):
    """Only rank 1 meets the token. Rank 0 stops without a traceback, too."""
    prefix = str(tmp_path / "mixed")
    with IndexedWriter(prefix, np.uint16) as writer:
        for i in range(400):
            writer.add_document(np.full(33, 300 if i % 40 == 7 else 65))
    argv = runs.flags(
        prefix, tmp_path, 50, *runs.EP2, "--eval-iters", "0", "--global-batch-size", "4"
    )
    done = run(
        [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "pretrain_gpt.py",
            *argv,
        ]
    )
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in text, text
    named = [x for x in text.splitlines() if "holds the token id 300" in x]
    assert len(named) == 1 and "error:" in named[0]


def test_exit_skips_interpreter_teardown(tmp_path):
    """Exit handlers run, the teardown does not: threads that need the GIL would abort in it."""
    program = """
import atexit, sys, threading, time
from megatron.exit_codes import exit_process
class Late:
    def __del__(self): print("torn down")
late = Late()
atexit.register(print, "handler", end=" ")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
exit_process(int(sys.argv[1]))
"""
    for code in (0, 3):
        done = run([sys.executable, "-c", program, str(code)])
        assert (done.returncode, done.stdout) == (code, "thread handler ")


def test_run_script_through_launcher(data, tmp_path):
    """run.sh on two ranks logs to screen and file; a second call resumes; bad input fails.

    By the default --split, 60 documents leave none to test on, which is no error.
    """
    out = tmp_path / "run"
    env = {
        "OUTPUT_DIR": str(out),
        "NUM_GPUS": "2",
        "DATA_PATH": data,
        "TOKENIZER_TYPE": "ByteTokenizer",
        "NUM_LAYERS": "2",
        "HIDDEN_SIZE": "32",
        "NUM_ATTN_HEADS": "2",
        "SEQ_LEN": "32",
        "EP_SIZE": "4",
        "THRESHOLD": "0.8",
        "GLOBAL_BATCH_SIZE": "4",
        "TRAIN_ITERS": "4",
        "LOG_INTERVAL": "1",
        "EVAL_ITERS": "1",
        "MASTER_PORT": str(free_port()),
    }
    script = ["bash", "examples_deepspeed/MoE/run.sh"]
    first = run([*script, "--exit-interval", "2"], **env)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (
        "2 rank(s) on cpu with gloo, because" in first.stdout
        and "2 of 4 experts on each rank" in first.stdout
    )
    assert "experts run on the cpu backend: rows stay in the cache" in first.stdout
    logged = (out / "log.txt").read_text()
    assert all(
        f"iteration {i}/4 | loss" in text for i in (1, 2) for text in (logged, first.stdout)
    )
    assert list((out / "tensorboard").glob("events*"))
    second = run(script, **env)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed from" in second.stdout and runs.metrics(out)[-1]["iteration"] == 4
    assert second.stdout.count("WARNING no test set: the share by --split 969,30,1") == 1
    assert runs.metrics(out, "eval") and not runs.metrics(out, "test")
    bad = run(script, **{**env, "DATA_PATH": "/nowhere/y", "OUTPUT_DIR": str(tmp_path / "bad")})
    text = bad.stdout + bad.stderr
    assert bad.returncode != 0 and "Traceback" not in text
    errors = [x for x in bad.stdout.splitlines() if "error:" in x]
    assert len(errors) == 1 and "/nowhere/y" in errors[0], "rank 1 is ended, too"
    assert text.splitlines()[-2:] == [
        *errors,
        f"run.sh: exit code {bad.returncode}; log: {tmp_path}/bad/log.txt",
    ]


def test_killed_rank_ends_run(data, tmp_path):
    argv = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "pretrain_gpt.py",
        *runs.flags(data, tmp_path, 100000, *runs.EP2),
    ]
    process = subprocess.Popen(
        argv,
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    pids = []
    for line in process.stdout:
        if found := re.search(r"process (\d+) spawned", line):
            pids.append(int(found.group(1)))
        if (
            "iteration" in line
            and (tmp_path / "metrics.jsonl").exists()
            and runs.metrics(tmp_path)
        ):
            break
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - start < 60
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


GATE = '''"""Modulo gate: the token id selects the expert."""

from dataclasses import dataclass

import torch

from megatron.moe import Gate, GateInput, Routing


class ModuloGate(Gate, name="modulo"):
    """Send each token to expert (token id + shift) mod E."""

    @dataclass(frozen=True)
    class Config:
        shift: int = 0
        """offset added to the token id"""

    def forward(self, inp: GateInput) -> Routing:
        expert_A = (inp.token_ids_T + self.config.shift) % self.num_experts
        token_A = torch.arange(len(expert_A), device=expert_A.device)
        weight_A = torch.ones(len(expert_A), device=expert_A.device)
        return Routing(token_A, expert_A, weight_A, aux_loss=weight_A.new_zeros(()))
'''


def test_gate_is_one_file(data, tmp_path):
    """A gate file added to a copy of the tree is found and trained; no other file changes."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copytree(
        REPO / "megatron", tree / "megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPO / "pretrain_gpt.py", tree)
    (tree / "megatron/moe/gates/modulo.py").write_text(GATE)
    argv = runs.with_gate(runs.flags(data, tmp_path, 5), "--gate", "modulo", "--shift", "3")
    done = subprocess.run(
        [sys.executable, str(tree / "pretrain_gpt.py"), *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    got = runs.metrics(tmp_path)
    assert len(got) == 5 and all(m["experts_per_token"] == 1 for m in got)
    assert got[-1]["loss"] < got[0]["loss"]
    assert (tmp_path / "checkpoints/iter_0000005/rank_00000.safetensors").is_file()


def test_help_lists_gate_flags(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help", "--gate", "threshold"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert (
        "--threshold" in text
        and "total probability that a token's experts must reach" in text
        and "topk" in text
    )
