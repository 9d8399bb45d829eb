"""Training on --mock-data, and on the blend of a file given by --data-args-path."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import runs

CHANGED = "differ(s) from the checkpoint's"


def mock_flags(out: Path, *more: str) -> list[str]:
    """Flags of four iterations in fp32 without any file; the tokenizer is not chosen."""
    argv = runs.flags("", out, 4, "--no-bf16", "--hidden-dropout", "0", "--eval-interval", "2")
    for name in ("--data-path", "--split", "--tokenizer-type"):
        start = argv.index(name)
        del argv[start : start + 2]
    return [*argv, "--mock-data", "--vocab-size", "300", "--eod-mask-loss", *more]


@pytest.fixture(scope="module")
def mocked(tmp_path_factory, ranks1) -> Path:
    out = tmp_path_factory.mktemp("mocked")
    ranks1.run(runs.train, mock_flags(out), timeout=300)
    return out


def test_mock_data_trains_and_evaluates(mocked):
    assert len(runs.metrics(mocked)) == 4
    assert [row["iteration"] for row in runs.metrics(mocked, "eval")] == [0, 2, 4]
    losses = [row["loss"] for row in runs.metrics(mocked, "eval")]
    assert losses == sorted(losses, reverse=True), "small ids are more frequent"
    (test,) = runs.metrics(mocked, "test")
    assert test["loss"] != losses[-1]


def test_mock_data_is_equal_on_two_ranks(mocked, tmp_path, ranks2):
    ranks2.run(runs.train, mock_flags(tmp_path, *runs.EP2), timeout=300)
    for kind in ("train", "eval", "test"):
        rows = zip(runs.metrics(tmp_path, kind), runs.metrics(mocked, kind), strict=True)
        for row, expected in rows:
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_mock_data_resumes_bit_for_bit(mocked, tmp_path, ranks1):
    argv = mock_flags(tmp_path)
    ranks1.run(runs.train, [*argv, "--exit-interval", "2"], timeout=300)
    ranks1.run(runs.train, [*argv, "--load", str(tmp_path / "checkpoints")], timeout=300)
    losses = [row["loss"] for row in runs.metrics(tmp_path)]
    assert losses == [row["loss"] for row in runs.metrics(mocked)]


def test_mock_data_keeps_a_named_tokenizer(tmp_path, ranks1):
    argv = mock_flags(tmp_path, "--tokenizer-type", "ByteTokenizer", "--exit-interval", "1")
    (lines,) = ranks1.run(runs.logged_train, argv, timeout=300)
    assert not [line for line in lines if "NullTokenizer" in line]
    other = ["--tokenizer-type", "NullTokenizer", "--tokenizer-model", "299"]
    argv = mock_flags(tmp_path, *other, "--load", str(tmp_path / "checkpoints"))
    with pytest.raises(RuntimeError, match="the tokenizer is 'NullTokenizer' but checkpoint"):
        ranks1.run(runs.train, argv, timeout=300)


def test_checkpoint_compares_the_content(data, tmp_path, ranks1):
    """The file may have another name, or its words may come from --data-path; not other words."""
    first = tmp_path / "blend.txt"
    second = tmp_path / "renamed.txt"
    changed = tmp_path / "changed.txt"
    other = runs.copy_dataset(data, tmp_path / "other")
    first.write_text(f"0.5 {data}\n0.5 {other}\n")
    second.write_text(f"0.5\t{data} 0.5 {other}")
    changed.write_text(f"0.9 {data} 0.1 {other}")
    base = runs.flags("", tmp_path, 4)
    start = base.index("--data-path")
    del base[start : start + 2]

    def lines_of(steps: int, *source: str) -> list[str]:
        argv = [*base, *source, "--exit-interval", str(steps)]
        if steps > 1:
            argv += ["--load", str(tmp_path / "checkpoints")]
        (lines,) = ranks1.run(runs.logged_train, argv, timeout=300)
        return [line for line in lines if CHANGED in line]

    assert lines_of(1, "--data-args-path", str(first)) == []
    assert lines_of(2, "--data-args-path", str(second)) == []
    assert lines_of(3, "--data-path", "0.5", data, "0.5", other) == []
    (line,) = lines_of(4, "--data-args-path", str(changed))
    assert line.startswith("--data-path differ(s)")
    assert [row["iteration"] for row in runs.metrics(tmp_path)] == [1, 2, 3, 4]


def test_unreadable_data_args_end_every_rank(tmp_path, ranks2):
    argv = runs.flags("", tmp_path, 4)
    start = argv.index("--data-path")
    del argv[start : start + 2]
    argv += ["--data-args-path", str(tmp_path / "nowhere")]
    with pytest.raises(
        RuntimeError, match="--data-args-path is '.*nowhere', which cannot be read: No such"
    ):
        ranks2.run(runs.train, argv, timeout=300)
