"""tools/generate_text.py on a sharded checkpoint, and the complete demo at a small size."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers import runs
from megatron.inference.transcript import visible

REPO = Path(__file__).resolve().parents[2]


def _generate(argv: list[str], typed: str = "") -> list[tuple[str, str]]:
    """Run the tool in a rank of the pool; return the prompts and texts that it prints."""
    sys.path.insert(0, str(REPO))
    from tools import generate_text

    os.environ.update(
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
    )
    out = io.StringIO()
    err = io.StringIO()
    stdin = sys.stdin
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        tempfile.TemporaryFile("w+") as sys.stdin,
    ):
        sys.stdin.write(typed)
        sys.stdin.flush()
        os.lseek(sys.stdin.fileno(), 0, os.SEEK_SET)
        try:
            generate_text.run(generate_text.parse(argv))
        finally:
            sys.stdin = stdin
    if dist.get_rank() == 0:
        assert re.search(r"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s\n", err.getvalue())
    return _blocks(out.getvalue())


def _blocks(printed: str) -> list[tuple[str, str]]:
    """Return the prompts and texts of printed lines, without log lines."""
    blocks = re.findall(r"((?:^> .*\n)+)((?:^\| .*\n)+)", printed, re.MULTILINE)
    return [
        tuple(re.sub("^. ", "", text, flags=re.MULTILINE)[:-1] for text in block)
        for block in blocks
    ]


def test_rank0_prints_each_prompt_and_text(finished, ranks2):
    """Blanks and newlines as they are; streamed, in batches and without a cache the same."""
    argv = ["--load", str(finished / "checkpoints"), "--prompt", "the quick ", "fox\n\n", "a"]
    argv = [*argv, "--max-new-tokens", "8"]
    first, second = ranks2.run(_generate, argv)
    assert second == [] and [prompt for prompt, _ in first] == ["the quick ", "fox\n\n", "a"]
    assert all(text for _, text in first)
    for more in (["--stream"], ["--stream", "--batch-size", "2"], ["--no-cache"]):
        assert ranks2.run(_generate, [*argv, *more])[0] == first, "the same seed and text"


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
    for prompt, block in zip(prompts, together, strict=True):
        assert ranks1.run(_generate, [*flags, prompt])[0] == [block]


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
    assert parse(["--load", "x", "--interactive"]).prompt is None


def test_prompt_file_and_output(finished, ranks2, tmp_path):
    """Every rank reads the file; rank 0 writes JSON lines and prints nothing."""
    (tmp_path / "prompts.jsonl").write_text('{"q": "the quick "}\n\n{"q": "fox"}\n')
    (tmp_path / "prompts.txt").write_text("the quick \n\nfox\n")
    argv = ["--load", str(finished / "checkpoints"), "--greedy", "--prompt"]
    expected = ranks2.run(_generate, [*argv, "the quick ", "fox"])[0]
    argv[-1] = "--prompt-file"
    assert ranks2.run(_generate, [*argv, str(tmp_path / "prompts.txt")])[0] == expected
    output = tmp_path / "out.jsonl"
    argv = [
        *argv,
        str(tmp_path / "prompts.jsonl"),
        "--prompt-key",
        "q",
        "--output",
        str(output),
    ]
    assert ranks2.run(_generate, argv) == [[], []]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["the quick ", "fox"]
    assert [visible(record["text"]) for record in records] == [text for _, text in expected]
    assert all(record["end"] == "length" and len(record["tokens"]) == 32 for record in records)


def test_text_ends_before_stop_strings(finished, ranks1):
    argv = ["--load", str(finished / "checkpoints"), "--greedy", "--prompt", "the quick "]
    (((_, text),),) = ranks1.run(_generate, argv)
    stop = text[3:6]
    (((_, cut),),) = ranks1.run(_generate, [*argv, "--stop", "@@@@", stop])
    assert cut == text[: text.index(stop)]


def test_lines_of_a_user_are_answered(finished, ranks2):
    """Without a chat template each line is a prompt. Rank 0 alone reads; other ranks follow."""
    argv = ["--load", str(finished / "checkpoints"), "--max-new-tokens", "8"]
    expected = ranks2.run(_generate, [*argv, "--prompt", "the quick ", "fox"])[0]
    typed = "the quick \n\n" + "x" * 200 + "\nfox"
    first, second = ranks2.run(_generate, [*argv, "--interactive"], typed)
    assert first == expected and second == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--interactive", "--prompt", "a"],
            "source of prompts is '--prompt and --interactive'",
        ),
        (["--prompt-file", "none.txt"], "No such file or directory: 'none.txt'"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; allowed: 1 or more"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--stop", "x", ""], "--stop is ''; allowed: a text of one character or more"),
        (
            ["--greedy", "--temperature", "0.5"],
            "--temperature is 0.5; allowed: none with --greedy",
        ),
        (["--min-p", "2"], "min_p is 2.0; allowed: 0 to 1"),
        (
            ["--output", "none/x.jsonl"],
            "--output is 'none/x.jsonl'; allowed: the path of a file",
        ),
        (
            ["--interactive", "--output", "x"],
            "--output is 'x'; allowed: none with --interactive",
        ),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    """Before a checkpoint is looked for."""
    from tools import generate_text

    monkeypatch.chdir(tmp_path)
    assert generate_text.main(["--load", "nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


def test_long_and_empty_prompts_are_refused(finished, ranks1):
    argv = ["--load", str(finished / "checkpoints"), "--prompt"]
    for prompt, number in (("x" * 200, 200), ("", 0)):
        message = (
            f"number of tokens of the prompt '{prompt}' is {number}; allowed: 1 to the model"
        )
        with pytest.raises(RuntimeError, match=message):
            ranks1.run(_generate, [*argv, prompt])


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
        f"error: {tmp_path} has no valid checkpoint. Give the directory given to --save of a "
        "training run, or the folder of a downloaded Hugging Face model\n"
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
    assert {r["kind"] for r in records} == {"run", "train", "eval", "test"}
    first = next(r for r in records if r["kind"] != "run")
    assert first["iteration"] == 0
    assert 1 <= first["experts_per_token"] <= 16
    corpus = (tmp_path / "data/corpus.jsonl").stat().st_size
    assert 20e6 < corpus < 60e6, "about 30 MB of real text"
