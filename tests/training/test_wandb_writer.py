"""What Weights & Biases gets of a run, also of one that was resumed, and when it fails."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import wandb_files
from helpers.fake_wandb import FakeError, FakeUsageError, FakeWandb
from helpers.wandb_server import WandbServer
from megatron.checkpoint.manifest import write_manifest
from megatron.config.schema import LoggingConfig
from megatron.training.heat_map import heat_map
from megatron.training.metric_writers import MetricsWriters
from megatron.training.wandb_memory import WandbMemory, read_memory, write_memory
from megatron.training.wandb_writer import WandbWriter

LOAD = [[0.25, 0.5, 0.25, 0.0], None, [0.5, math.nan, 0.5, 0.0]]
RUN = {"kind": "run", "iteration": 0, "command": ["a"], "config": {"train": {"seed": 1}}}


@pytest.fixture
def fake(monkeypatch):
    """Install a FakeWandb of these arguments, and return it."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)

    def install(**options):
        module = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def options(**more):
    return LoggingConfig(wandb_project="p", **more)


def row(iteration, kind="train", **metrics):
    return {"kind": kind, "iteration": iteration, "loss": float(iteration), **metrics}


def test_values_have_the_names_of_tensorboard(fake):
    wandb = fake()
    writer = WandbWriter(options())
    metrics = {
        "x_by_layer": [1.0, None, 3.0],
        "experts_per_token_histogram": [0.25, 0.75],
        "load_by_expert": LOAD,
    }
    writer.write(row(3, **metrics))
    writer.write(row(3, "eval/wiki", **metrics))
    histogram = ("histogram", [0.25, 0.75], [-0.5, 0.5, 1.5])
    # Of multiples 1, 2, 1 and 0: 30 buckets from 0 to 2, of which the last contains its end.
    counts = [0] * 30
    counts[0] = 1
    counts[15] = 2
    counts[29] = 1
    _, load_counts, load_edges = wandb.rows[1].pop("eval/wiki/load_by_expert/0")
    assert load_counts == counts
    assert load_edges == pytest.approx([i / 15 for i in range(31)])
    assert wandb.rows == [
        {
            "iteration": 3,
            "train/iteration": 3,
            "train/loss": 3.0,
            "train/x_by_layer/0": 1.0,
            "train/x_by_layer/2": 3.0,
            "train/experts_per_token_histogram": histogram,
        },
        {
            "iteration": 3,
            "eval/wiki/iteration": 3,
            "eval/wiki/loss": 3.0,
            "eval/wiki/x_by_layer/0": 1.0,
            "eval/wiki/x_by_layer/2": 3.0,
            "eval/wiki/experts_per_token_histogram": histogram,
            "eval/wiki/load_by_expert": ("image", heat_map(LOAD).tolist()),
        },
    ]
    assert wandb.steps == [0, 1]
    assert wandb.metrics["*"] == {"step_metric": "iteration"}
    assert {name for name, how in wandb.metrics.items() if how.get("hidden")} == {
        "iteration",
        "train/iteration",
        "eval/wiki/iteration",
    }


def test_flags_reach_wandb(fake, tmp_path):
    wandb = fake()
    WandbWriter(options())
    assert wandb.inits[0] == {
        "project": "p",
        "entity": None,
        "name": None,
        "dir": None,
        "id": None,
        "resume": "allow",
        "mode": None,
        "settings": {"x_transaction_log_flush_interval": 0.1, "finish_timeout": 300.0},
    }
    names = {
        "wandb_exp_name": "n",
        "wandb_entity": "e",
        "wandb_id": "i",
        "wandb_mode": "offline",
    }
    WandbWriter(options(wandb_save_dir="d", **names), str(tmp_path))
    expected = {"name": "n", "entity": "e", "id": "i", "mode": "offline", "dir": "d"}
    assert wandb.inits[1].items() >= expected.items()


def test_defaults_follow_the_run_and_variables(fake, tmp_path, monkeypatch):
    """The files are in the folder of the run, unless W&B's own variable names another."""
    wandb = fake()
    WandbWriter(options(), str(tmp_path))
    assert wandb.inits[-1]["dir"] == str(tmp_path)
    WandbWriter(options(wandb_log_checkpoints=True))
    assert "finish_timeout" not in wandb.inits[-1]["settings"]
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    WandbWriter(options(), str(tmp_path))
    assert wandb.inits[-1]["dir"] is None
    assert "finish_timeout" not in wandb.inits[-1]["settings"]


def test_resumed_run_sends_what_is_new(fake, tmp_path):
    """Interrupted after iteration 6, whose evaluation was sent, too, and resumed from 3."""
    wandb = fake()
    folder = str(tmp_path)
    first = WandbWriter(options(), folder)
    first.write(RUN)
    for i in range(1, 7):
        first.write(row(i))
    first.write(row(6, "eval"))
    second = WandbWriter(options(), folder, resumes=True)
    second.write({**RUN, "iteration": 3})
    for i in range(4, 9):
        second.write(row(i))
        if i % 3 == 0:
            second.write(row(i, "eval"))
            second.write(row(i, "eval/new"))
    assert [call["id"] for call in wandb.inits] == [None, "new"]
    sent = [("train", i) for i in range(1, 7)] + [("eval", 6)]
    assert wandb.iterations() == [*sent, ("eval/new", 6), ("train", 7), ("train", 8)]
    assert wandb.steps == list(range(10))


@pytest.mark.parametrize("wandb_id, expected", [("", "old"), ("old", "old"), ("b", "b")])
def test_id_decides_what_is_repeated(wandb_id, expected, fake, tmp_path):
    """Another id is another run, which gets everything that the resumed run computes."""
    wandb = fake()
    write_memory(str(tmp_path), WandbMemory("old", 5, {"train": 5}))
    writer = WandbWriter(options(wandb_id=wandb_id), str(tmp_path), resumes=True)
    writer.write({**RUN, "iteration": 3})
    for i in range(4, 8):
        writer.write(row(i))
    assert wandb.inits[0]["id"] == expected
    first = 4 if expected == "b" else 6
    assert wandb.iterations() == [("train", i) for i in range(first, 8)]
    assert read_memory(str(tmp_path)).id == expected


def test_server_knows_what_it_has(fake, tmp_path):
    """A killed process had not sent all of what is remembered; it is sent when it is repeated."""
    summary = {"train/iteration": 4, "eval/iteration": 3, "eval/loss": 1.0, "_step": 5}
    wandb = fake(server=summary)
    write_memory(str(tmp_path), WandbMemory("old", 9, {"train": 7, "eval": 6}))
    writer = WandbWriter(options(), str(tmp_path), resumes=True)
    writer.write({**RUN, "iteration": 3})
    for i in range(4, 7):
        writer.write(row(i))
    writer.write(row(6, "eval"))
    assert wandb.iterations() == [("train", 5), ("train", 6), ("eval", 6)]
    assert wandb.steps == [6, 7, 8]


def test_another_run_may_continue_an_id(fake, tmp_path):
    """A run that does not repeat anything adds all of its rows to the run of --wandb-id."""
    wandb = fake(server={"train/iteration": 4, "_step": 5})
    writer = WandbWriter(options(wandb_id="i"), str(tmp_path))
    writer.write(RUN)
    writer.write(row(1))
    assert wandb.iterations() == [("train", 1)]
    assert wandb.steps == [6]


def test_new_run_forgets_an_earlier_one(fake, tmp_path):
    wandb = fake()
    write_memory(str(tmp_path), WandbMemory("old", 5, {"train": 5}))
    writer = WandbWriter(options(), str(tmp_path))
    writer.write(RUN)
    writer.write(row(1))
    assert wandb.inits[0]["id"] is None
    assert read_memory(str(tmp_path)) == WandbMemory("new", 1, {"train": 1})


def test_evaluation_is_not_remembered(fake, tmp_path):
    """It has no row of kind run, and is a run of its own."""
    fake()
    write_memory(str(tmp_path), WandbMemory("old", 5, {"train": 5}))
    WandbWriter(options(), str(tmp_path)).write(row(3, "eval"))
    assert read_memory(str(tmp_path)).id == "old"


def test_disabled_run_is_not_remembered(fake, tmp_path):
    """A resumed run that is not disabled sends everything from there on to a run of its own."""
    fake()
    writer = WandbWriter(options(wandb_mode="disabled"), str(tmp_path))
    writer.write(RUN)
    writer.write(row(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", '{"id": ""}', '{"id": "a", "last": 1}'])
def test_damaged_memory_is_an_error(content, tmp_path):
    path = tmp_path / "wandb.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{path} is .*not valid.*Delete it"):
        read_memory(str(tmp_path))


def test_memory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "wandb.json").mkdir()
    with pytest.raises(OSError, match="wandb.json"):
        write_memory(str(tmp_path), WandbMemory("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["wandb.json"], "no temporary file"


def test_run_is_described_by_its_config(fake):
    wandb = fake()
    WandbWriter(options()).write(RUN)
    assert wandb.configs == [{"train": {"seed": 1}, "run": {"command": ["a"]}}]
    assert not wandb.rows


def test_resume_says_what_is_not_repeated(fake, tmp_path, printed):
    fake()
    write_memory(str(tmp_path), WandbMemory("old", 9, {"train": 7, "eval": 6}))
    for iteration in (3, 7):
        writer = WandbWriter(options(), str(tmp_path), resumes=True)
        writer.write({**RUN, "iteration": iteration})
    assert printed() == (
        "Weights & Biases has this run up to iteration 7; what is repeated from iteration 4 on is "
        "not sent again\n"
    )


def test_refused_settings_are_an_error(fake):
    fake(refusals=[FakeUsageError("No API key\nconfigured.")])
    with pytest.raises(ValueError) as caught:
        WandbWriter(options())
    assert str(caught.value) == (
        "--wandb-project is 'p', but Weights & Biases refuses the run: No API key configured. Run "
        "`wandb login`, or set --wandb-mode offline"
    )


def test_offline_run_may_be_refused(fake, printed):
    fake(refusals=[FakeError("timed out."), FakeError("no program")])
    message = "refuses the run: no program. Leave --wandb-project out"
    with pytest.raises(ValueError, match=message):
        WandbWriter(options())
    assert printed() == ""


def test_unreachable_server_makes_it_offline(fake, printed):
    wandb = fake(refusals=[FakeError("timed out.")])
    writer = WandbWriter(options(wandb_id="i"))
    writer.write(row(1))
    assert [(call["id"], call["mode"]) for call in wandb.inits] == [
        ("i", None),
        ("i", "offline"),
    ]
    assert wandb.iterations() == [("train", 1)]
    assert printed() == (
        "ERROR Weights & Biases cannot be reached: timed out. The run is logged offline; `wandb "
        "sync` uploads it later\n"
    )


def test_broken_process_follows_on_save_error(fake, tmp_path, printed):
    wandb = fake()
    writer = WandbWriter(options(), str(tmp_path))
    writer.write(RUN)
    wandb.broken = ConnectionResetError("Connection lost")
    message = "Weights & Biases accepts nothing: Connection lost. metrics.jsonl has all metrics"
    with pytest.raises(OSError, match=message):
        MetricsWriters([writer], "stop").write(row(1))
    writers = MetricsWriters([writer], "continue")
    writers.write(row(1))
    assert read_memory(str(tmp_path)).last_iterations == {}, "it was not sent"
    writers.close()
    assert printed().splitlines() == [
        f"ERROR {message}. The training continues without metrics there, as --on-save-error sets",
        f"ERROR {message}",
    ]


def test_failed_run_is_marked(fake):
    wandb = fake()
    WandbWriter(options()).close()
    try:
        raise ValueError
    except ValueError:
        WandbWriter(options()).close()
    assert wandb.exit_codes == [0, 1]


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the manifest of a checkpoint, and a file that does not belong to it."""
    path = tmp_path / "iter_0000005"
    path.mkdir()
    files = dict.fromkeys(("run.json", "state.json", "index.json", "r.safetensors"), (1, "0"))
    write_manifest(path, 5, 1, files)
    (path / "other").touch()
    return path


@pytest.mark.parametrize("logs", [False, True])
def test_checkpoint_is_an_artifact_on_request(logs, fake, checkpoint):
    wandb = fake()
    writer = WandbWriter(options(wandb_log_checkpoints=logs))
    MetricsWriters([writer]).log_checkpoint(checkpoint)
    assert len(wandb.artifacts) == logs
    for artifact, aliases in wandb.artifacts:
        assert (artifact.name, artifact.type) == ("checkpoint-new", "model")
        assert artifact.metadata == {"iteration": 5}
        assert aliases == ["iter_0000005"]
        names = ["index.json", "r.safetensors", "run.json", "state.json", "manifest.json"]
        assert artifact.files == {name: str(checkpoint / name) for name in names}


def test_artifact_follows_on_save_error(fake, checkpoint, printed):
    wandb = fake()
    writer = WandbWriter(options(wandb_log_checkpoints=True))

    def refuse(name, type, metadata):
        raise FakeError("no space")

    wandb.Artifact = refuse
    with pytest.raises(OSError, match="accepts nothing: no space"):
        MetricsWriters([writer], "stop").log_checkpoint(checkpoint)
    MetricsWriters([writer], "continue").log_checkpoint(checkpoint)
    assert printed() == (
        f"ERROR {checkpoint} is not logged: Weights & Biases accepts nothing: no space. "
        "metrics.jsonl has all metrics. The training continues, as --on-save-error sets\n"
    )


# The real package, in processes of their own


PROGRAM = """
import json, sys
from megatron import log
from megatron.config.schema import CheckpointConfig, LoggingConfig
from megatron.training.metric_writers import build_metric_writers

log.setup()
options, save, completed, rows = json.loads(sys.argv[1])
writers = build_metric_writers(
    LoggingConfig(**options), CheckpointConfig(save=save), 0, 10, 80, completed
)
for row in rows:
    writers.write(row)
writers.close()
"""


def log_in_process(folder: Path, rows: list[dict], environment: dict, completed=None, **more):
    """Write rows to W&B in a process, as training does. Returns what it printed."""
    arguments = [{"wandb_project": "p", **more}, str(folder), completed, rows]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env={**os.environ, "WANDB_SILENT": "true", "RANK": "0", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_file_has_values_and_pictures(tmp_path):
    metrics = {"experts_per_token_histogram": [0.25, 0.75], "load_by_expert": LOAD}
    rows = [RUN, row(1), row(1, "eval", **metrics)]
    log_in_process(tmp_path, rows, {}, wandb_mode="offline")
    train, evaluation = wandb_files.history(tmp_path)
    assert train.items() >= {"iteration": 1, "train/loss": 1, "_step": 0}.items()
    histogram = "eval/experts_per_token_histogram"
    assert evaluation[f"{histogram}/values"] == [0.25, 0.75]
    assert evaluation[f"{histogram}/bins"] == [-0.5, 0.5, 1.5]
    (file,) = wandb_files.run_files(tmp_path)
    picture = file.parent / "files" / evaluation["eval/load_by_expert/path"]
    assert (np.asarray(Image.open(picture)) == heat_map(LOAD)).all()
    settings = {}
    for record in wandb_files.records(file):
        settings |= {e.key: json.loads(e.value_json) for e in record.config.update if e.key}
    assert settings["train"] == {"seed": 1}
    assert settings["run"] == {"command": ["a"]}


def test_online_run_continues_where_the_server_is(tmp_path):
    """The server has lost the last two rows that the first process sent."""
    with WandbServer() as server:
        log_in_process(tmp_path, [RUN, *map(row, range(1, 6))], server.variables())
        (run,) = server.runs.values()
        assert [r["iteration"] for r in run.history()] == [1, 2, 3, 4, 5]
        for offset in (3, 4):
            del run.lines[offset]
        run.summary = run.lines[2]
        resumed = [{**RUN, "iteration": 2}, *map(row, range(3, 8))]
        log_in_process(tmp_path, resumed, server.variables(), completed=2)
        assert len(server.runs) == 1
        history = run.history()
        assert [r["iteration"] for r in history] == [1, 2, 3, 4, 5, 6, 7]
        assert [r["_step"] for r in history] == list(range(7))
        assert [r["train/loss"] for r in history] == [1, 2, 3, 4, 5, 6, 7]


def test_outage_at_start_is_logged_offline(tmp_path):
    """Nothing listens at port 9; a run in earnest waits for 90 s."""
    environment = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "1",
    }
    output = log_in_process(tmp_path, [RUN, row(1)], environment)
    assert output.count("ERROR Weights & Biases cannot be reached: ") == 1
    assert [r["iteration"] for r in wandb_files.history(tmp_path)] == [1]
