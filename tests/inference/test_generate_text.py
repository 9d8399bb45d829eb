"""tools/generate_text.py on a sharded checkpoint, and the complete demo at a small size."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers import runs

REPO = Path(__file__).resolve().parents[2]


def _generate(argv: list[str]) -> list[str]:
    """Run the tool in a rank of the pool; return the continuations that it prints."""
    sys.path.insert(0, str(REPO))
    from tools import generate_text

    os.environ.update(
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        generate_text.run(generate_text.parse(argv))
    return [line for line in out.getvalue().splitlines() if line.startswith(">")]


def test_rank0_prints_one_line_per_prompt(finished, ranks2):
    argv = [
        "--load",
        str(finished / "checkpoints"),
        "--prompt",
        "the quick ",
        "fox\n",
        "--max-new-tokens",
        "8",
    ]
    first, second = ranks2.run(_generate, argv)
    assert second == [] and len(first) == 2
    assert first[0].startswith("> the quick |") and first[1].startswith("> fox\\n|")
    assert all(len(line.split("|", 1)[1]) >= 1 for line in first)
    assert ranks2.run(_generate, argv)[0] == first, "the same seed should give the same text"


def test_text_does_not_depend_on_neighbours(data, ranks1, ranks2, tmp_path):
    """Nor on the number of ranks: one holds all experts, two share them. In fp32, where the sizes
    of matrix products do not decide between likely tokens; the run has a capacity."""
    argv = [*runs.flags(data, tmp_path, 2, *runs.EP2), "--moe-eval-capacity-factor", "0.5"]
    argv = [*argv, "--eval-iters", "0", "--split", "100,0,0"]
    ranks2.run(runs.train, [flag for flag in argv if flag != "--bf16"])
    flags = ["--load", str(tmp_path / "checkpoints"), "--max-new-tokens", "8", "--prompt"]
    prompts = ["the quick brown ", "d"]
    together = ranks2.run(_generate, [*flags, *prompts])[0]
    assert ranks2.run(_generate, [*flags, *reversed(prompts)])[0] == together[::-1]
    for prompt, line in zip(prompts, together, strict=True):
        assert ranks1.run(_generate, [*flags, prompt])[0] == [line]


def test_capacity_factor_is_a_choice(finished, data, ranks1, tmp_path):
    """It changes the text; values that cannot be used are refused in one line."""
    flags = ["--load", str(finished / "checkpoints"), "--prompt", "the quick ", "fox", "a dog "]
    factor = "--moe-eval-capacity-factor"
    dropless = ranks1.run(_generate, flags)
    assert ranks1.run(_generate, [*flags, factor, "0"]) == dropless
    assert ranks1.run(_generate, [*flags, factor, "0.1"]) != dropless
    for value in ("-1", "nan", "inf"):
        with pytest.raises(RuntimeError, match=f"{factor} is {float(value)}; allowed: "):
            ranks1.run(_generate, [*flags, factor, value])
    argv = [*runs.flags(data, tmp_path, 1), "--eval-iters", "0", "--split", "100,0,0"]
    dense = runs.with_gate(argv)
    first = dense.index(runs.MOE[0])
    del dense[first : first + len(runs.MOE)]
    ranks1.run(runs.train, dense)
    flags[1] = str(tmp_path / "checkpoints")
    assert len(ranks1.run(_generate, flags)[0]) == 3
    with pytest.raises(RuntimeError, match=f"{factor} is 2.0; allowed: 0 for a model without"):
        ranks1.run(_generate, [*flags, factor, "2"])


def test_prompt_may_be_repeated():
    from tools.generate_text import parse

    assert parse(["--load", "x"]).prompt == ["def "]
    words = ["--load", "x", "--prompt", "a", "b", "--prompt", "c"]
    assert parse(words).prompt == ["a", "b", "c"]


def test_control_characters_are_escaped():
    """A model may generate them; letters of all scripts stay."""
    sys.path.insert(0, str(REPO))
    from tools.generate_text import one_line

    text = "> a\n\r\t\0\x1b[2J\x85\u2028\ud800|größe 日本\u3000\xa0"
    shown = one_line(text)
    assert shown == r"> a\n\r\t\x00\x1b[2J\x85\u2028\ud800|größe 日本" + "\u3000\xa0"
    assert shown.splitlines() == [shown]


def test_deepspeed_config_of_training_is_not_read(data, ranks1, tmp_path):
    """That file may be gone, and it may name folders that DeepSpeed would make."""
    ds_config = tmp_path / "ds.json"
    monitor = {"enabled": True, "output_path": str(tmp_path / "made"), "job_name": "x"}
    ds_config.write_text(json.dumps({"csv_monitor": monitor}))
    argv = [*runs.flags(data, tmp_path, 1), "--eval-iters", "0", "--split", "100,0,0"]
    ranks1.run(runs.train, [*argv, "--deepspeed_config", str(ds_config)])
    assert (tmp_path / "made").exists()
    shutil.rmtree(tmp_path / "made")
    generate = ["--load", str(tmp_path / "checkpoints"), "--max-new-tokens", "2"]
    expected = ranks1.run(_generate, generate)
    assert len(expected[0]) == 1 and not (tmp_path / "made").exists()
    ds_config.unlink()
    assert ranks1.run(_generate, generate) == expected


def test_missing_checkpoint_is_one_line_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/generate_text.py", "--load", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path} has no valid checkpoint. Point --load at the directory given to --save "
        "of a training run\n"
    )


@pytest.mark.slow
def test_demo_runs_twice(tmp_path):
    """demo.sh with a tiny model: its outputs exist, and a second call resumes the first run."""
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUTPUT_DIR": str(tmp_path),
        "NUM_LAYERS": "2",
        "HIDDEN_SIZE": "64",
        "SEQ_LEN": "64",
        "TRAIN_ITERS": "4",
        "LOG_INTERVAL": "2",
        "EVAL_ITERS": "1",
        "MASTER_PORT": "29615",
    }
    for _ in range(2):
        done = subprocess.run(
            ["bash", "examples_deepspeed/MoE/demo.sh"],
            capture_output=True,
            text=True,
            cwd=REPO,
            env=env,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert len([x for x in done.stdout.splitlines() if x.startswith("> ")]) == 5
    records = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {r["kind"] for r in records} == {"train", "eval", "test"} and records[0][
        "iteration"
    ] == 0
    assert 1 <= records[0]["experts_per_token"] <= 16
    corpus = (tmp_path / "data/corpus.jsonl").stat().st_size
    assert 20e6 < corpus < 60e6, "about 30 MB of real text"
