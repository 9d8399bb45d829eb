"""tools/analyze_model.py: memory, communication and time of a step on a rank."""

from __future__ import annotations

import json
import shutil

import pytest

from helpers import runs
from helpers.hf_folders import save_model
from megatron.analysis import ceilings
from megatron.analysis.ceilings import Ceilings, read_ceilings, write_ceilings
from megatron.analysis.communication import estimate_communication
from megatron.analysis.cost_chart import cost_png
from megatron.analysis.memory import estimate_memory
from megatron.analysis.model_cost import AnalysedModel, model_sections
from megatron.analysis.rank_parameters import Topology
from megatron.analysis.step_time import estimate_step_time
from megatron.config import cli
from megatron.moe.gate import available_gates, gate_config_class
from megatron.parallel.groups import Groups
from tools import analyze_model

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 300 --seq-length 64 "
    "--make-vocab-size-divisible-by 64 --micro-batch-size 2"
)
MOE = "--num-experts 8 --moe-ffn-hidden-size 24"
PEER = "--gate peer --peer-num-experts 64 --peer-num-heads 2 --peer-topk 4"
CEILINGS = Ceilings(2.0, 1.0, 100.0, 10.0, 5.0)


def analyse(folder, capsys, *words):
    """Run the tool; returns its text and its JSON file."""
    path = folder / "costs.json"
    assert analyze_model.main([*words, "--json", str(path)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out, json.loads(path.read_text())


def plain(section) -> dict:
    """What the JSON file has of an estimate."""
    return json.loads(json.dumps(section.to_dict()))


def only(found: dict, name: str) -> dict:
    """The costs of a section where the experts per token are known."""
    section = found[name]
    assert section["fewest_experts"] == section["most_experts"]
    return section["most_experts"]


def planned(flags: str):
    """The configuration of these flags."""
    return cli.parse(flags.split(), gate_config_class, available_gates)


def error_of(capsys, flags: str) -> str:
    """Run the tool, which has to refuse; returns the message."""
    assert analyze_model.main(f"{SHAPE} {flags}".split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("flags", "ranks", "experts_per_token"),
    [
        ("--zero-stage 2 --bf16", 4, 0.0),
        (f"{MOE} --gate topk --topk 3 --moe-expert-parallel-size 2 --bf16", 4, 3.0),
        (f"{MOE} --gate topk --topk 2 --zero-stage 3 --recompute-activations", 2, 2.0),
        (PEER, 2, 8.0),
    ],
)
def test_json_has_what_the_functions_return(flags, ranks, experts_per_token, tmp_path, capsys):
    """By shape: a dense model, sharded experts, ZeRO 3 with recomputation, and PEER."""
    flags = f"{SHAPE} {flags} --global-batch-size 16"
    file = tmp_path / "ceilings.json"
    file.write_text(write_ceilings(CEILINGS))
    words = f"{flags} --ranks {ranks} --device cpu --ceilings {file}"
    text, found = analyse(tmp_path, capsys, *words.split())
    config = planned(flags)
    arguments = (config, 300, Topology(ranks, "cpu"))
    memory = estimate_memory(*arguments, experts_per_token)
    communication = estimate_communication(*arguments, experts_per_token)
    assert only(found, "memory") == plain(memory)
    assert only(found, "communication") == plain(communication)
    flops = {}
    costs = found["flops"]["most_experts"]
    for part, operations in costs["parts"].items():
        flops[part] = operations["forward"] + operations["backward"]
        if config.train.recompute_activations and part != "output layer":
            flops[part] += operations["forward"]
    time = estimate_step_time(
        *arguments, flops, CEILINGS, memory=memory, communication=communication
    )
    step = only(found, "step_time")
    assert step == plain(time)
    per_token = costs["flops_per_token"] + costs["recomputed_flops_per_token"]
    assert step["flops"] == pytest.approx(per_token * 16 * 64 / ranks, rel=1e-9)
    for summary in (memory.summary, communication.summary, "expected step: "):
        assert summary in text


def test_costs_have_both_ends_of_a_range(tmp_path, capsys):
    """A gate that chooses the number: the fewest, and the most, as of the FLOPs."""
    flags = f"{SHAPE} {MOE} --gate threshold"
    words = f"{flags} --ranks 2 --device cpu --peak-tflops 1 --bandwidth-gb-s 10"
    text, found = analyse(tmp_path, capsys, *words.split())
    for name, end in (("fewest_experts", 1.0), ("most_experts", 8.0)):
        memory = estimate_memory(planned(flags), 300, Topology(2, "cpu"), end)
        assert found["memory"][name] == plain(memory)
    fewest = found["memory"]["fewest_experts"]["peak"]
    assert fewest < found["memory"]["most_experts"]["peak"]
    ends = [found["step_time"][end]["total_s"] for end in ("fewest_experts", "most_experts")]
    assert ends[0] < ends[1]
    assert text.count("with 8 routed experts per token, the most\n") == 3
    assert text.count("with 1, the fewest: ") == 3
    text, found = analyse(tmp_path, capsys, *words.split(), "--experts-per-token", "2.5")
    assert "the fewest" not in text
    assumed = estimate_memory(planned(flags), 300, Topology(2, "cpu"), 2.5)
    assert only(found, "memory") == plain(assumed)


def test_run_has_its_ranks_and_measured_experts(finished, data, tmp_path, capsys):
    """The run had two ranks on CPUs; --ranks and --device plan others."""
    _, found = analyse(tmp_path, capsys, str(finished))
    config = cli.parse(
        runs.flags(data, finished, 20, *runs.EP2), gate_config_class, available_gates
    )
    row = runs.metrics(finished)[-1]
    arguments = (config, 257, Topology(2, "cpu"), row["experts_per_token_by_layer"][0])
    assert only(found, "memory") == plain(estimate_memory(*arguments))
    assert only(found, "communication") == plain(estimate_communication(*arguments))
    assert "step_time" not in found
    _, found = analyse(tmp_path, capsys, str(finished), "--ranks", "4", "--device", "cuda")
    arguments = (config, 257, Topology(4, "cuda"), arguments[-1])
    assert only(found, "memory") == plain(estimate_memory(*arguments))


def test_checkpoint_without_metrics_is_planned_for_gpus(finished, tmp_path, capsys):
    """Nothing records its device."""
    checkpoints = shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    words = (str(checkpoints), "--experts-per-token", "2")
    _, found = analyse(tmp_path, capsys, *words)
    assert only(found, "memory")["allowance"] > 0
    assert only(found, "memory")["assumptions"][0].startswith("2 rank(s) on cuda, ZeRO 1, ")


def test_default_ranks_hold_the_experts(tmp_path, capsys):
    words = f"{SHAPE} {MOE} --gate topk --moe-expert-parallel-size 4".split()
    text, _ = analyse(tmp_path, capsys, *words)
    assert "assumed: 4 rank(s) on cuda, ZeRO 1, experts over 4 rank(s), fp32, micro" in text


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_hf_folder_has_rank_costs(family, tmp_path, capsys):
    folder = save_model(tmp_path / "model", family)
    words = (str(folder), "--seq-length", "48", "--ranks", "2", "--zero-stage", "2")
    text, found = analyse(tmp_path, capsys, *words, "--bf16")
    parameters = found["parameters"]["total"]
    weights = only(found, "memory")["phases"]["forward pass"]["weights"]
    assert 2 * parameters <= weights <= 2.5 * parameters, "bf16, and routers in fp32"
    transfers = only(found, "communication")["transfers"]
    reduced = sum(t["size"] for t in transfers if t["purpose"].endswith(" gradients"))
    assert reduced == 4 * parameters
    assert "communication of a rank in a step" in text


@pytest.mark.parametrize("flags", ["", f"{MOE} --gate topk", PEER])
def test_ceilings_are_measured_and_read_again(flags, tmp_path, capsys):
    """What a measurement wrote gives the same time later."""
    file = tmp_path / "ceilings.json"
    words = f"{SHAPE} {flags}".split()
    measured = ("--measure-ceilings", "--save-ceilings", str(file), "--device", "cpu")
    text, found = analyse(tmp_path, capsys, *words, *measured)
    stored = read_ceilings(str(file))
    assert only(found, "step_time")["ceilings"] == stored.to_dict()
    assert stored.source.startswith("measured on 1 x ")
    assert stored.text() in text
    _, again = analyse(tmp_path, capsys, *words, "--ceilings", str(file), "--device", "cpu")
    assert again["step_time"] == found["step_time"]


@pytest.mark.parametrize(
    ("flags", "is_grouped"), [("", 0), (f"{MOE} --gate topk", 1), (PEER, 0)]
)
def test_only_grouped_products_have_their_ceiling(flags, is_grouped, monkeypatch):
    """Others count at the dense ceiling, which no product exceeds."""
    calls = []

    def count(x_MD, weight_EFD, ends_E):
        calls.append(len(weight_EFD))

    monkeypatch.setattr(ceilings, "grouped_linear", count)
    measured = ceilings.measure_ceilings(planned(f"{SHAPE} {flags}"), Groups())
    assert measured.grouped_tflops > 0
    assert bool(calls) == bool(is_grouped)


def _measure_in_rank(words: list[str]) -> None:
    runs.set_rank_variables()
    analyze_model.run(words)


def test_ranks_measure_their_network(ranks2, tmp_path):
    """The started ranks are those of the plan; one of them writes."""
    file = tmp_path / "costs.json"
    words = f"{SHAPE} {MOE} --gate topk --measure-ceilings --json {file}".split()
    ranks2.run(_measure_in_rank, words)
    step = only(json.loads(file.read_text()), "step_time")
    assert step["ceilings"]["all_reduce_gb_s"] > 0 < step["communication_s"]
    assert step["ceilings"]["source"].startswith("measured on 2 x CPU")
    assert step["tokens"] == 2 * 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ranks -1", "--ranks is -1; allowed: 0 or more"),
        ("--device tpu", "--device is 'tpu'; allowed: cuda or cpu"),
        ("--peak-tflops -1", "--peak-tflops is -1.0; allowed: 0 or more"),
        ("--peak-tflops 1", "allowed: both, or --ceilings FILE.json. Give the missing one"),
        ("--network-gb-s 1", "allowed: both, or --ceilings FILE.json. Give the missing one"),
        ("--ceilings missing.json", "--ceilings: missing.json cannot be read"),
        ("--measure-ceilings --peak-tflops 1", "allowed: only without --measure-ceilings"),
        ("--model-only --peak-tflops 1", "--peak-tflops is 1.0; allowed: only without"),
        ("--measure-ceilings --ceilings x", "--ceilings is 'x'; allowed: only without"),
        ("--save-ceilings x", "--save-ceilings is 'x'; allowed: only with --measure-ceilings"),
        ("--measure-ceilings --save-ceilings missing/x", "allowed: a file in an existing"),
        (
            f"{MOE} --gate topk --moe-expert-parallel-size 4 --ranks 2",
            "--moe-expert-parallel-size is 4; allowed: a divisor of the 2 ranks",
        ),
        ("--global-batch-size 6 --ranks 2", "--global-batch-size is 6; allowed: a multiple of"),
    ],
)
def test_wrong_plans_are_refused(flags, message, capsys):
    assert message in error_of(capsys, flags)


def test_chart_has_a_panel_for_each_section():
    """One rank communicates nothing, which is no panel."""
    heights = []
    for ranks, known in ((1, None), (2, None), (2, CEILINGS)):
        config = planned(f"{SHAPE} {MOE} --gate topk")
        analysed = AnalysedModel(config, 300, Topology(ranks))
        sections = model_sections(analysed, known)
        content = cost_png(sections, "title")
        heights.append(int.from_bytes(content[20:24], "big"))
    assert heights == sorted(set(heights))
