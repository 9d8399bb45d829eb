"""What TensorBoard shows of a run, also of one that was resumed."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from helpers import runs
from helpers.metric_rows import EVAL, TRAIN
from megatron.config.schema import CheckpointConfig, LoggingConfig, RunConfig
from megatron.model.parameter_count import ParameterCount
from megatron.parallel.groups import Groups
from megatron.training.heat_map import heat_map
from megatron.training.metric_writers import build_metric_writers
from megatron.training.run_row import describe_run
from megatron.training.tensorboard_writer import TensorboardWriter, hyperparameters

LOAD = [None, [0.25, 0.5, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, math.nan, 0.5, 0.0]]


def rows_of(iteration, loss=1.0):
    """A row of each kind of summary: training and evaluation."""
    for kind in ("train", "eval"):
        yield {
            "kind": kind,
            "iteration": iteration,
            "loss": loss,
            "experts_per_token_histogram": [0.0, 0.25, 0.5, 0.25],
            "load_by_expert": LOAD,
            "coactivation": [[[1.0]]],
        }


def run_row(iteration):
    size = ParameterCount(10, {"embedding": 10}, 10, 10)
    return describe_run(RunConfig(), Groups(), size, iteration)


def accumulated(folder):
    """All summaries of a folder, as TensorBoard's reader of the older kind sees them."""
    from tensorboard.backend.event_processing import event_accumulator

    kinds = (
        event_accumulator.SCALARS,
        event_accumulator.IMAGES,
        event_accumulator.HISTOGRAMS,
        event_accumulator.TENSORS,
    )
    events = event_accumulator.EventAccumulator(str(folder), dict.fromkeys(kinds, 0))
    events.Reload()
    return events


def steps_by_tag(folder):
    """Steps of every summary, as the server of TensorBoard sees them: all are tensors."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"tensors": 0})
    events.Reload()
    return {tag: [e.step for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


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
        assert sorted(steps) == [0, 1, 2, 2, 3, 4]  # files of one second are in any order


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


def test_histogram_has_a_bucket_per_number(tmp_path):
    """The fraction of tokens with 0, 1, 2 and 3 experts; it is not shown as scalars, too."""
    writer = TensorboardWriter(tmp_path)
    for row in rows_of(7):
        writer.write(row)
    writer.close()
    events = accumulated(tmp_path)
    for kind in ("train", "eval"):
        (event,) = events.Histograms(f"{kind}/experts_per_token_histogram")
        histogram = event.histogram_value
        assert event.step == 7
        assert histogram.bucket_limit == [0.5, 1.5, 2.5, 3.5]
        assert histogram.bucket == [0.0, 0.25, 0.5, 0.25]
        assert (histogram.min, histogram.max, histogram.num) == (-0.5, 3.5, 1.0)
        assert histogram.sum == 0.25 + 2 * 0.5 + 3 * 0.25
        assert histogram.sum_squares == 0.25 + 4 * 0.5 + 9 * 0.25
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}


def test_evaluations_show_load_by_expert(tmp_path):
    """As a picture, and for each layer as the distribution of multiples of the mean."""
    writer = TensorboardWriter(tmp_path)
    for row in rows_of(7):
        writer.write(row)
    writer.close()
    events = accumulated(tmp_path)
    assert events.Tags()["images"] == ["eval/load_by_expert"]
    (event,) = events.Images("eval/load_by_expert")
    shown_HW3 = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert (shown_HW3 == heat_map(LOAD)).all()
    tags = [tag for tag in events.Tags()["histograms"] if "by_expert" in tag]
    assert tags == ["eval/load_by_expert/1", "eval/load_by_expert/2"], "layer 0 has none, 3 NaN"
    (event,) = events.Histograms(tags[0])
    histogram = event.histogram_value
    assert (histogram.num, histogram.sum, histogram.min, histogram.max) == (4, 4, 0, 2)
    limits = np.array(histogram.bucket_limit)
    counted = {float(limits[i]): histogram.bucket[i] for i in np.nonzero(histogram.bucket)[0]}
    assert list(counted.values()) == [1, 2, 1]


def test_run_is_described_in_words_and_settings(tmp_path):
    writer = TensorboardWriter(tmp_path)
    row = run_row(0)
    writer.write(row)
    writer.close()
    (event,) = accumulated(tmp_path).Tensors("run/text_summary")
    (text,) = event.tensor_proto.string_val
    assert json.loads(text.decode().removeprefix("```json").removesuffix("```")) == row
    steps = steps_by_tag(tmp_path)
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= steps.keys()


def test_hyperparameters_are_in_one_level():
    config = {"version": 3, "train": {"seed": 1, "sets": ["a"], "none": None, "on": True}}
    assert hyperparameters(config) == {
        "version": 3,
        "train.seed": 1,
        "train.sets": '["a"]',
        "train.on": True,
    }


def test_resume_forgets_every_kind_of_summary(tmp_path):
    """Killed after 5, resumed from 3 twice; the first process closed nothing."""
    options = LoggingConfig(tensorboard_dir=str(tmp_path))
    for life, (completed, steps) in enumerate([(None, (1, 6)), (3, (4, 6)), (3, (4, 8))]):
        writers = build_metric_writers(options, CheckpointConfig(), 0, 10, 80, completed)
        writers.write(run_row(completed or 0))
        for i in range(*steps):
            for row in rows_of(i, loss=float(life)):
                writers.write(row)
    for tag, steps in steps_by_tag(tmp_path).items():
        described = tag.startswith(("run/", "_hparams_/"))
        assert steps == ([1, 4] if described else [1, 2, 3, 4, 5, 6, 7]), tag
    events = accumulated(tmp_path)
    for tag in events.Tags()["scalars"]:
        assert [e.value for e in events.Scalars(tag)] == [0.0] * 3 + [2.0] * 4
    for tag in events.Tags()["images"]:
        assert [e.step for e in events.Images(tag)] == [1, 2, 3, 4, 5, 6, 7]
    for tag in events.Tags()["histograms"]:
        assert [e.step for e in events.Histograms(tag)] == [1, 2, 3, 4, 5, 6, 7]
