"""The runs that a report's command line names."""

from __future__ import annotations

import pytest

from helpers.report_runs import rows_of_run, write_run
from helpers.study_results import StudyFolder
from megatron.analysis.report.sources import find_runs


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo", rows_of_run(1))


def test_run_folder_and_metrics_file_are_runs(run, tmp_path):
    (by_folder,) = find_runs([str(run)])
    (by_file,) = find_runs([str(run / "metrics.jsonl")])
    assert by_folder.path == by_file.path == run / "metrics.jsonl"
    assert by_folder.name == by_file.name == "demo"
    other = (run / "metrics.jsonl").rename(tmp_path / "old.jsonl")
    assert find_runs([str(other)])[0].name == "old"


def test_label_precedes_the_path(run):
    (source,) = find_runs([f"top 2={run}"])
    assert (source.label, source.name) == ("top 2", "demo")


def test_path_with_equals_sign_is_a_path(tmp_path):
    folder = write_run(tmp_path / "lr=1", rows_of_run(1))
    (source,) = find_runs([str(folder)])
    assert (source.label, source.name) == ("", "lr=1")
    (source,) = find_runs([f"warmup=10={folder}"])
    assert (source.label, source.path.parent) == ("warmup=10", folder)


def test_runs_with_one_name_get_their_paths(tmp_path):
    folders = [write_run(tmp_path / name / "run", rows_of_run(1)) for name in "ab"]
    assert [source.name for source in find_runs(map(str, folders))] == list(map(str, folders))


def test_study_cells_are_grouped_by_axes(tmp_path):
    order = ["topk_8_seed-2", "topk_8_seed-1"]
    study = StudyFolder(tmp_path, ["gate", "experts"], {}, order=order)
    for seed in (1, 2):
        study.add({"gate": "topk", "experts": "8"}, seed, rows_of_run(seed))
    failed = {"gate": "x", "experts": "8"}
    study.add(failed, 1, None, state="failed", error="no memory")
    study.add({"gate": "y", "experts": "8"}, 1, None, state="planned")
    sources = find_runs([str(tmp_path)])
    assert [source.name for source in sources] == [*order, "x_8_seed-1"]
    assert [source.label for source in sources] == ["topk, 8", "topk, 8", "x, 8"]
    assert [source.seed for source in sources] == [2, 1, 1]
    assert (sources[2].state, sources[2].error) == ("failed", "no memory")
    labelled = find_runs([f"old={tmp_path}"])
    assert labelled[0].label == "old, topk, 8"


def test_study_cell_reads_the_run_it_shares(tmp_path):
    shared = write_run(tmp_path / "tuning" / "one", rows_of_run(1))
    StudyFolder(tmp_path, ["gate"], {}).add(
        {"gate": "topk"}, 1, None, same_as="../../tuning/one"
    )
    (source,) = find_runs([str(tmp_path)])
    assert source.path == shared / "metrics.jsonl"


def test_folder_of_cells_without_a_study_is_refused(tmp_path):
    write_run(tmp_path / "cells" / "a", rows_of_run(1))
    with pytest.raises(ValueError, match="has no study.json; allowed: the output folder"):
        find_runs([str(tmp_path)])


def test_missing_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none', which does not exist; allowed: a run folder"):
        find_runs([str(tmp_path / "none")])


def test_folder_without_metrics_names_those_below(run, tmp_path):
    with pytest.raises(ValueError, match=r"no metrics.jsonl and no cells/; name .*: demo"):
        find_runs([str(tmp_path)])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="was the run started with --metrics-file"):
        find_runs([str(empty)])


def test_study_without_started_cells_is_refused(tmp_path):
    StudyFolder(tmp_path, ["gate"], {}).add({"gate": "y"}, 1, None, state="planned")
    with pytest.raises(ValueError, match="has no cell that has started"):
        find_runs([str(tmp_path)])


def test_run_named_twice_is_refused(run):
    with pytest.raises(ValueError, match="is given twice"):
        find_runs([str(run), f"again={run / 'metrics.jsonl'}"])


def test_study_named_twice_is_refused(tmp_path):
    """Also one of its cells, before or after it, and the tuning run that a cell has adopted."""
    write_run(tmp_path / "tuning" / "one", rows_of_run(1))
    study = StudyFolder(tmp_path, ["gate"], {})
    study.add({"gate": "topk"}, 1, rows_of_run(1))
    study.add({"gate": "remoe"}, 1, None, same_as="../../tuning/one")
    root = str(tmp_path)
    for part in (tmp_path, tmp_path / "cells/topk_seed-1", tmp_path / "tuning/one"):
        for arguments in ([root, f"again={part}"], [str(part), root]):
            with pytest.raises(ValueError, match="is given twice; name each run once"):
                find_runs(arguments)


def test_cells_of_a_study_may_share_a_run(tmp_path):
    write_run(tmp_path / "tuning" / "one", rows_of_run(1))
    study = StudyFolder(tmp_path, ["gate"], {})
    for gate in ("a", "b"):
        study.add({"gate": gate}, 1, None, same_as="../../tuning/one")
    first, second = find_runs([str(tmp_path)])
    assert first.path == second.path and (first.label, second.label) == ("a", "b")
