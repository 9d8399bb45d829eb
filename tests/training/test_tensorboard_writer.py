"""What TensorBoard shows of a run, also of one that was resumed."""

from __future__ import annotations

import pytest

from helpers import runs
from helpers.metric_rows import EVAL, TRAIN
from megatron.config.schema import CheckpointConfig, LoggingConfig
from megatron.training.metric_writers import build_metric_writers
from megatron.training.tensorboard_writer import TensorboardWriter


def test_tensorboard_gets_scalars_by_kind(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorboardWriter(tmp_path)
    writer.write(TRAIN)
    writer.write(EVAL)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/perplexity", "train/experts_per_token_by_layer/1"} <= tags
    assert not {t for t in tags if "kind" in t or t.endswith("/iteration")}
    (event,) = events.Scalars("train/experts_per_token_by_layer/1")
    assert (event.step, event.value) == (10, 4.0)


@pytest.mark.parametrize("saved", [0, 2])
def test_tensorboard_forgets_repeated_steps(saved, tmp_path):
    """A run that was killed after iteration 4 resumes from its last checkpoint, or from 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LoggingConfig(tensorboard_dir=str(tmp_path))
    for life, iterations in ((1, range(5)), (2, range(saved + 1 if saved else 0, 4))):
        completed = saved if life == 2 else 0
        writers = build_metric_writers(options, CheckpointConfig(), 0, 10, 80, completed)
        for i in iterations:
            writers.write({"kind": "train", "iteration": i, "loss": float(life)})
        writers.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(i, 1.0) for i in range(saved + 1)]
    if not saved:
        expected = [(0, 2.0)]
    assert shown == expected + [(i, 2.0) for i in range(saved + 1, 4)]


@pytest.mark.parametrize("kind", ["eval", "train"])
def test_tensorboard_forgets_nothing_of_others(kind, tmp_path):
    """An evaluation and a new run leave what another run logged in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LoggingConfig(tensorboard_dir=str(tmp_path))
    for row_kind, iterations in (("train", range(5)), (kind, [2])):
        writers = build_metric_writers(options, CheckpointConfig(), 0, 10, 80)
        for i in iterations:
            writers.write({"kind": row_kind, "iteration": i, "loss": 1.0})
        writers.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    if kind == "eval":
        assert steps == [0, 1, 2, 3, 4]
        assert [event.step for event in events.Scalars("eval/loss")] == [2]
    else:
        assert steps == [0, 1, 2, 3, 4, 2]


def test_new_run_purges_no_events(finished, data, tmp_path, ranks1):
    """A run from 0 and one with --finetune share the folder of an earlier run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(tmp_path / "tb")
    more = ("--tensorboard-dir", folder, "--save=", "--eval-iters", "0", "--split", "100,0,0")
    finetune = ("--load", str(finished / "checkpoints"), "--finetune")
    for options in ((), (), finetune):
        ranks1.run(runs.train, runs.flags(data, tmp_path, 2, *more, *options), timeout=300)
    events = EventAccumulator(folder)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2] * 3
