"""The expected time of a step: its sum, what it grows with, and measured and given ceilings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.spawn import groups_for
from helpers.tracked_steps import planned_run
from megatron.analysis.ceilings import (
    Ceilings,
    given_ceilings,
    measure_ceilings,
    read_ceilings,
    write_ceilings,
)
from megatron.analysis.rank_parameters import Topology
from megatron.analysis.step_time import StepTimeEstimate, memory_sections
from megatron.config.schema import RunConfig
from megatron.model.builder import build_run_config_model
from megatron.model.flops import ModelFlops
from megatron.model.meta_device import meta_device
from megatron.parallel.groups import Groups

CEILINGS = Ceilings(2.0, 1.0, 100.0, 10.0, 5.0)


def _time(ceilings: Ceilings = CEILINGS, world_size: int = 2, **options) -> StepTimeEstimate:
    config = planned_run(world_size=world_size, **options)
    topology = Topology(world_size, "cpu")
    flops = _flops(config)
    return memory_sections(config, 2048, topology, 2.0, flops_by_part=flops, ceilings=ceilings)[
        -1
    ]


def _flops(config: RunConfig) -> dict[str, float]:
    with meta_device():
        model = build_run_config_model(config, 2048)
    flops = ModelFlops.of(model)
    return flops.computed(flops.use(2.0))


def test_step_is_sum_of_its_parts():
    """The larger of compute and memory, the optimizer, and communication that nothing hides."""
    time = _time()
    parts = max(time.compute_s, time.memory_s) + time.optimizer_s
    assert time.total_s == pytest.approx(parts + time.exposed_communication_s)
    assert (
        time.exposed_communication_s == time.communication_s > 0
    )  # nothing overlaps at ZeRO 1
    assert time.tokens_per_s == pytest.approx(time.tokens / time.total_s)
    assert sum(value for _, _, value in time.chart_rows()) == pytest.approx(time.total_s)


def test_flops_run_at_ceiling_of_their_part():
    """Experts at the grouped ceiling, everything else at the dense one."""
    config = planned_run()
    flops = {"attention": 3e6, "routed experts": 5e6}
    sections = memory_sections(
        config, 2048, Topology(1, "cpu"), 2.0, flops_by_part=flops, ceilings=CEILINGS
    )
    tokens = config.train.micro_batch_size * config.model.seq_length
    time = sections[-1]
    assert time.compute_s == pytest.approx(tokens * (3e6 / 2e12 + 5e6 / 1e12))
    assert time.flops == pytest.approx(8e6 * tokens)


@pytest.mark.parametrize(
    "larger",
    [
        {"seq_length": 256},
        {"num_layers": 3},
        {"width": 256},
        {"micro_batches": 2},
        {"recompute": True},
    ],
    ids=str,
)
def test_time_grows_with_work(larger):
    """No part of the step gets shorter, and the step gets longer."""
    slow = replace(CEILINGS, dense_tflops=0.01, grouped_tflops=0.01)
    before = _time(slow)
    after = _time(slow, **larger)
    assert after.total_s > before.total_s
    assert after.compute_s > before.compute_s
    assert after.optimizer_s >= before.optimizer_s
    assert after.communication_s >= before.communication_s


def test_faster_hardware_takes_less_time():
    """Twice as fast in everything is half the time."""
    values = {name: 2 * value for name, value in CEILINGS.to_dict().items() if name != "source"}
    assert _time(Ceilings(**values)).total_s == pytest.approx(_time().total_s / 2)


def test_overlapping_communication_hides_behind_passes():
    """At ZeRO 3 weights and gradients are exchanged during the passes."""
    time = _time(zero_stage=3)
    assert time.exposed_communication_s < time.communication_s
    slow = _time(replace(CEILINGS, all_reduce_gb_s=1e-3), zero_stage=3)
    assert slow.exposed_communication_s == pytest.approx(
        slow.communication_s - slow.passes_s, rel=1e-6
    )


def test_unknown_network_is_not_counted():
    """The text says so where ranks communicate."""
    ceilings = Ceilings(2.0, 1.0, 100.0)
    time = _time(ceilings)
    assert time.communication_s == 0 < time.sent
    assert "collectives whose ceiling is 0 take no time" in time.text()
    assert "take no time" not in _time().text()
    assert "take no time" not in _time(ceilings, world_size=1).text()


def test_recomputation_repeats_blocks():
    """A forward pass more of every part but the output layer."""
    once = _flops(planned_run())
    again = _flops(planned_run(recompute=True))
    assert once.keys() == again.keys() >= {"attention", "routed experts", "router"}
    assert again["output layer"] == once["output layer"] == 6 * 2048 * 128
    assert again["attention"] * 6 == once["attention"] * 8
    assert again["routed experts"] * 6 == once["routed experts"] * 8


def test_sections_have_text_and_json():
    """Three sections with ceilings, two without."""
    config = planned_run(world_size=2, ep_size=2)
    topology = Topology(2, "cpu")
    flops = _flops(config)
    sections = memory_sections(
        config, 2048, topology, 2.0, flops_by_part=flops, ceilings=CEILINGS
    )
    names = [section.name for section in sections]
    assert names == ["memory", "communication", "step_time"]
    assert len(memory_sections(config, 2048, topology, 2.0, flops_by_part=flops)) == 2
    for section in sections:
        assert json.loads(json.dumps(section.to_dict()))
        assert section.chart_title
        assert section.chart_rows()
    for word in ("expected step", "assumed", "TFLOP/s", "memory traffic"):
        assert word in sections[-1].text()


def test_ceilings_are_measured_and_stored(tmp_path):
    """Positive rates of this device; a file keeps them."""
    ceilings = measure_ceilings(planned_run(seq_length=16), Groups())
    assert min(ceilings.dense_tflops, ceilings.grouped_tflops, ceilings.bandwidth_gb_s) > 0
    assert ceilings.all_reduce_gb_s == ceilings.all_to_all_gb_s == 0
    file = tmp_path / "ceilings.json"
    file.write_text(write_ceilings(ceilings))
    assert read_ceilings(str(file)) == ceilings


def _measure_in_rank() -> Ceilings:
    return measure_ceilings(planned_run("", zero_stage=0, seq_length=16), groups_for(1))


def test_ranks_agree_on_measured_ceilings(ranks2):
    """The slowest rank's rates, those of communication included."""
    first, second = ranks2.run(_measure_in_rank)
    assert first == second
    assert min(first.all_reduce_gb_s, first.all_to_all_gb_s) > 0
    assert "2 x CPU" in first.source


def test_given_numbers_replace_those_of_file(tmp_path):
    """--peak-tflops is for both kinds of products."""
    file = tmp_path / "ceilings.json"
    file.write_text(write_ceilings(CEILINGS))
    ceilings = given_ceilings(str(file), peak_tflops=7.0)
    assert (ceilings.dense_tflops, ceilings.grouped_tflops) == (7.0, 7.0)
    assert ceilings.bandwidth_gb_s == CEILINGS.bandwidth_gb_s
    assert given_ceilings(peak_tflops=7.0, bandwidth_gb_s=8.0) == Ceilings(7.0, 7.0, 8.0)
    assert given_ceilings(str(file), bandwidth_gb_s=8.0).bandwidth_gb_s == 8.0
    assert given_ceilings(str(file), network_gb_s=9.0) == replace(
        CEILINGS, all_reduce_gb_s=9.0, all_to_all_gb_s=9.0
    )
    assert given_ceilings() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "--ceilings"),
        ("{", "--ceilings.*cannot be read"),
        ('{"dense_tflops": 1, "grouped_tflops": 1}', "bandwidth_gb_s"),
        ('{"dense_tflops": 1, "grouped_tflops": 1, "bandwidth_gb_s": 1, "x": 1}', "--ceilings"),
        ('{"dense_tflops": 0, "grouped_tflops": 1, "bandwidth_gb_s": 1}', "dense_tflops is 0"),
        (
            '{"dense_tflops": 1, "grouped_tflops": true, "bandwidth_gb_s": 1}',
            "grouped_tflops is True",
        ),
        (
            '{"dense_tflops": 1, "grouped_tflops": 1, "bandwidth_gb_s": 1, "all_reduce_gb_s": -1}',
            "all_reduce_gb_s is -1",
        ),
    ],
)
def test_wrong_ceilings_are_refused(tmp_path, content, message):
    file = tmp_path / "ceilings.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ceilings(str(file))


def test_missing_ceilings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        given_ceilings(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="--bandwidth-gb-s.*Give the missing one"):
        given_ceilings(peak_tflops=7.0)
    with pytest.raises(ValueError, match="--bandwidth-gb-s.*Give the missing one"):
        given_ceilings(network_gb_s=7.0)


@pytest.mark.slow
def test_benchmark_compares_steps_with_expectation(tmp_path, repo):
    """Both shapes, in wall time and CPU time; a step is not faster than its bound."""
    file = tmp_path / "rows.json"
    program = repo / "benchmarks" / "step_time_model.py"
    done = subprocess.run(
        [sys.executable, str(program), "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    kinds = [row["name"].split(",")[0] for row in rows]
    assert kinds == ["step", "CPU time"] * 2
    assert "expected step" in done.stdout
    assert all(row["ratio"] > 0.5 for row in rows)
