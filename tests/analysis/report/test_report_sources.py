"""The runs that a report's command line names."""

from __future__ import annotations

import json

import pytest

from helpers.report_runs import rows_of_run, write_run
from megatron.analysis.report.sources import find_runs


def cell(study, name, **state):
    folder = study / "cells" / name
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"cell_id": name, **state}))
    return folder


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
    for seed in (1, 2):
        axes = {"gate": "topk", "experts": "8"}
        folder = cell(tmp_path, f"topk-{seed}", axes=axes, seed=seed, state="finished")
        write_run(folder, rows_of_run(seed))
    cell(tmp_path, "broken", axes={"gate": "x"}, seed=1, state="failed", error="no memory")
    cell(tmp_path, "later", axes={"gate": "y"}, seed=1, state="planned")
    (tmp_path / "study.json").write_text(json.dumps({"order": ["topk-2", "topk-1"]}))
    sources = find_runs([str(tmp_path)])
    assert [source.name for source in sources] == ["topk-2", "topk-1", "broken"]
    assert [source.label for source in sources] == ["topk, 8", "topk, 8", "x"]
    assert [source.seed for source in sources] == [2, 1, 1]
    assert (sources[2].state, sources[2].error) == ("failed", "no memory")


def test_study_cell_reads_the_run_it_shares(tmp_path):
    shared = write_run(tmp_path / "tuning" / "one", rows_of_run(1))
    cell(tmp_path, "topk", axes={}, seed=1, state="finished", same_as="../../tuning/one")
    (source,) = find_runs([str(tmp_path)])
    assert source.path == shared / "metrics.jsonl"


def test_study_without_states_is_read(tmp_path):
    write_run(tmp_path / "cells" / "a", rows_of_run(1))
    folder = write_run(tmp_path / "cells" / "b", rows_of_run(1))
    (folder / "state.json").write_text("{broken")
    (tmp_path / "cells" / "notes").mkdir()
    sources = find_runs([str(tmp_path)])
    assert [(source.name, source.label) for source in sources] == [("a", ""), ("b", "")]


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
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match="has no cell with metrics.jsonl"):
        find_runs([str(tmp_path)])


def test_run_named_twice_is_refused(run):
    with pytest.raises(ValueError, match="is given twice"):
        find_runs([str(run), f"again={run / 'metrics.jsonl'}"])
