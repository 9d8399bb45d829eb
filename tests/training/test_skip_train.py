"""--skip-train: the checkpoint of --load is evaluated, and nothing is trained or written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers import runs

FIGURES = ("loss", "perplexity", "experts_per_token", "load_imbalance_max_over_mean")


def evaluation_flags(data: str, out: Path, load: Path, *more: str) -> list[str]:
    """Flags of an evaluation: no length of a run, no learning rate, no training data."""
    training = runs.flags(data, out)
    for name in ("--train-iters", "--lr", "--min-lr", "--lr-warmup-fraction"):
        start = training.index(name)
        del training[start : start + 2]
    return [*training, "--skip-train", "--load", str(load / "checkpoints"), *more]


def evaluate(argv: list[str]) -> list[tuple[str, float]]:
    """Run an evaluation in a rank.

    Returns:
        For each split, the type of what runs the model, and the share of the training that is
        done, as gates see it.
    """
    from megatron.engine.engine import Engine

    calls = []
    original = Engine.evaluate

    def evaluate_and_look(self, batches, task, progress):
        assert self._optimizer is None
        calls.append((type(self.deepspeed).__name__, progress))
        return original(self, batches, task, progress)

    Engine.evaluate = evaluate_and_look
    try:
        runs.train(argv)
    finally:
        Engine.evaluate = original
    return calls


def same_figures(out: Path, reference: Path, **tolerance: float) -> None:
    """Compare with the last evaluations of the run that wrote the checkpoint."""
    for kind in ("eval", "test"):
        (row,) = runs.metrics(out, kind)
        expected = runs.metrics(reference, kind)[-1]
        assert row["iteration"] == expected["iteration"] == 20
        assert row["consumed_samples"] == expected["consumed_samples"]
        for name in FIGURES:
            assert row[name] == pytest.approx(expected[name], **tolerance), f"{kind} {name}"


@pytest.fixture(scope="module")
def repeated(finished, data, tmp_path_factory, ranks2) -> Path:
    """Evaluate the last checkpoint of `finished` on its own ranks, with a blend as named set."""
    out = tmp_path_factory.mktemp("repeated")
    argv = evaluation_flags(data, out, finished, *runs.EP2)
    other = runs.copy_dataset(data, tmp_path_factory.mktemp("copy") / "other")
    argv += ["--valid-sets", f"all={data}", "mixed=3", data, "1", other]
    assert ranks2.run(evaluate, argv, timeout=300) == [[("EvaluationModel", 1.0)] * 4] * 2
    return out


def test_skip_train_repeats_last_evaluation(finished, repeated):
    """On the same ranks to the last bit."""
    same_figures(repeated, finished, abs=0, rel=0)


def test_skip_train_writes_metrics_only(repeated):
    """No row of kind run, either: it would replace what a run in this file has logged since."""
    assert not runs.metrics(repeated)
    assert not runs.metrics(repeated, "run")
    assert [path.name for path in repeated.iterdir()] == ["metrics.jsonl"]


def test_named_sets_have_own_rows(repeated):
    rows = [
        row
        for kind in ("eval", "eval/all", "eval/mixed")
        for row in runs.metrics(repeated, kind)
    ]
    assert [row["kind"] for row in rows] == ["eval", "eval/all", "eval/mixed"]
    assert len({row["loss"] for row in rows}) == 3
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-6)
        assert row["iteration"] == 20


def test_skip_train_on_one_rank(finished, data, tmp_path, ranks1):
    """The global batch stays the checkpoint's, so the samples are the same."""
    argv = evaluation_flags(data, tmp_path, finished)
    start = argv.index("--global-batch-size")
    del argv[start : start + 2]
    assert ranks1.run(evaluate, argv, timeout=300) == [[("EvaluationModel", 1.0)] * 2]
    same_figures(tmp_path, finished, rel=1e-2)


def test_skip_train_with_zero3(finished, data, tmp_path, ranks2):
    """DeepSpeed shards the weights."""
    argv = evaluation_flags(data, tmp_path, finished, *runs.EP2, "--zero-stage", "3")
    assert ranks2.run(evaluate, argv, timeout=300) == [[("DeepSpeedEngine", 1.0)] * 2] * 2
    same_figures(tmp_path, finished, rel=1e-2)


def test_unused_deepspeed_config_is_logged(data, tmp_path, ranks1, finished):
    config = tmp_path / "ds.json"
    config.write_text("{}")
    argv = evaluation_flags(data, tmp_path, finished, "--deepspeed_config", str(config))
    (lines,) = ranks1.run(runs.logged_train, argv, timeout=300)
    assert (
        "--deepspeed_config is not used: evaluation runs DeepSpeed under ZeRO 3 only" in lines
    )
    path = finished / "checkpoints/iter_0000020"
    assert (
        f"--skip-train: evaluating {path} on valid, test; 1 rank(s) on cpu, bf16, no optimizer"
        in lines
    )


def test_initial_weights_are_evaluated(finished, data, tmp_path, ranks1):
    """Without a checkpoint, and with no data but a named set: the figures of iteration 0."""
    argv = evaluation_flags(data, tmp_path, tmp_path, "--load-or-init", "--data-path", "")
    (tmp_path / "checkpoints").mkdir()
    argv += ["--valid-sets", f"all={data}", "--train-data-path", "/nowhere"]
    assert ranks1.run(evaluate, argv, timeout=300) == [[("EvaluationModel", 0.0)]]
    (row,) = runs.metrics(tmp_path, "eval/all")
    first = runs.metrics(finished, "eval")[0]
    assert row["iteration"] == 0
    assert row["loss"] == pytest.approx(first["loss"], abs=0.3)
    assert not runs.metrics(tmp_path, "eval") and not runs.metrics(tmp_path, "test")


def test_nothing_to_evaluate_is_an_error(finished, data, tmp_path, ranks1):
    argv = evaluation_flags(data, tmp_path, finished, "--split", "1,0,0")
    with pytest.raises(
        RuntimeError,
        match="--skip-train is set, but there is neither a validation nor a test set. Name one",
    ):
        ranks1.run(runs.train, argv, timeout=300)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_model_is_refused(finished, data, tmp_path, ranks1):
    argv = evaluation_flags(data, tmp_path, finished, "--hidden-size", "64")
    with pytest.raises(RuntimeError, match="--hidden-size is 64 but checkpoint .* with 32"):
        ranks1.run(runs.train, argv, timeout=300)


def test_finetuned_run_is_evaluated(finished, data, tmp_path, ranks1):
    """Its run.json has the --finetune and --load-step of its start, which do not apply."""
    own = tmp_path / "checkpoints"
    start = ("--load", str(finished / "checkpoints"), "--load-step", "20", "--finetune")
    ranks1.run(runs.train, runs.flags(data, tmp_path, 2, *start), timeout=300)
    argv = ["--config", str(own / "iter_0000002/run.json"), "--load", str(own), "--skip-train"]
    assert ranks1.run(evaluate, argv, timeout=300) == [[("EvaluationModel", 1.0)] * 2]
    assert [row["iteration"] for row in runs.metrics(tmp_path, "eval")] == [0, 2, 2]
