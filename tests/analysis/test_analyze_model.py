"""tools/analyze_model.py: costs of models of flags, runs, checkpoints and Hugging Face folders."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from helpers import runs
from helpers.hf_folders import save_model
from helpers.outside_gates import restored_registry, write_gate
from megatron.analysis import cost_chart
from megatron.analysis.model_cost import AnalysedModel, ExpertAssumption
from megatron.analysis.model_source import find_model_source
from megatron.config import cli
from megatron.model.builder import build_run_config_model
from megatron.model.flops import ExpertUse, ModelFlops
from megatron.moe.gate import available_gates, gate_config_class
from megatron.moe.gate_registry import import_gate_files
from tools import analyze_model

SHAPE = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --vocab-size 300 "
    "--make-vocab-size-divisible-by 64"
)
MOE = "--num-experts 8 --moe-ffn-hidden-size 24"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def analyse(folder, capsys, *words):
    """Run the tool; returns its text and its JSON file."""
    path = folder / "costs.json"
    assert analyze_model.main([*words, "--json", str(path)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out, json.loads(path.read_text())


def error_of(capsys, *words):
    """Run the tool, which has to refuse; returns the message."""
    assert analyze_model.main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of a run's folder that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--swiglu --num-query-groups 2 --untie-embeddings-and-output-weights",
        "--position-embedding-type learned --normalization LayerNorm --attention-sinks",
        "--attention mla --q-lora-rank 12 --kv-lora-rank 8",
        f"{MOE} --gate topk --topk 3 --moe-shared-experts 2 --moe-shared-expert-gate",
        f"{MOE} --gate moepp --moe-latent-size 16 --moe-first-k-dense 1",
        f"{MOE} --gate hash@0,cosine@1+2 --expert-type swiglu_clamped",
        "--gate peer --peer-num-experts 64",
    ],
)
def test_parameters_equal_the_built_model(flags, tmp_path, capsys):
    words = f"{SHAPE} {flags}".split()
    _, found = analyse(tmp_path, capsys, *words)
    config = cli.parse(words, gate_config_class, available_gates)
    model = build_run_config_model(config, 300)
    size = found["parameters"]
    assert size["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(size["parts"].values()) == size["total"]
    in_attention = [p.numel() for n, p in model.named_parameters() if "self_attn" in n]
    assert size["parts"]["attention"] == sum(in_attention)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_hf_folder_counts_as_in_transformers(family, tmp_path, capsys):
    """The weights are not needed."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model", family)
    expected = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    text, found = analyse(tmp_path, capsys, str(folder), "--seq-length", "48")
    assert found["parameters"]["total"] == expected
    assert found["flops"]["seq_length"] == 48
    assert "routed experts per token: 2 (the gates leave no choice)" in text


def test_run_has_its_measured_experts(finished, data, tmp_path, capsys):
    """The costs are those that the last training row has, for the steps of the run."""
    row = runs.metrics(finished)[-1]
    text, found = analyse(tmp_path, capsys, str(finished))
    flops = found["flops"]["most_experts"]
    assert flops == found["flops"]["fewest_experts"]
    assert flops["flops_per_token"] == pytest.approx(row["flops_per_token"], rel=1e-8)
    assert flops["routed_experts_per_token_by_layer"] == row["experts_per_token_by_layer"]
    assert flops["flops_per_step"] == pytest.approx(row["flops_per_token"] * 8 * 32, rel=1e-8)
    assert found["flops"]["tokens_of_run"] == 20 * 8 * 32
    assert f"(measured at iteration 20 in {finished / 'metrics.jsonl'})" in text
    size = found["parameters"]
    share = row["experts_per_token"] / 4
    inactive = round(size["parts"]["routed experts"] * (1 - share))
    assert size["active_min"] == size["active_max"]
    assert size["active_max"] == pytest.approx(size["total"] - inactive, abs=2)


def test_checkpoint_has_the_experts_of_its_time(
    finished, run_folder, tmp_path, capsys, monkeypatch
):
    """Rows that the run logged after the checkpoint are not used, also of a relative path."""
    row = runs.metrics(finished)[-1]
    later = row | {"iteration": 25, "experts_per_token_by_layer": [1.0]}
    with open(run_folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(later) + "\n")
    checkpoint = run_folder / "checkpoints/iter_0000020"
    monkeypatch.chdir(run_folder)
    for path in (checkpoint, checkpoint.relative_to(run_folder)):
        _, found = analyse(tmp_path, capsys, str(path))
        used = found["flops"]["most_experts"]["routed_experts_per_token_by_layer"]
        assert used == row["experts_per_token_by_layer"]
    for path in (run_folder, run_folder / "checkpoints"):
        _, found = analyse(tmp_path, capsys, str(path))
        assert found["flops"]["most_experts"]["routed_experts_per_token_by_layer"] == [1.0]


def test_measured_experts_are_after_capacity():
    """A capacity drops assignments also of gates that leave no choice."""
    words = f"{SHAPE} {MOE} --gate topk --topk 2 --moe-train-capacity-factor 1.0".split()
    config = cli.parse(words, gate_config_class, available_gates)
    use = ExpertUse((1.5,) * 3, (0.0,) * 3)
    analysed = AnalysedModel(config, 300, measured=use, measured_in="a run")
    assert analysed.experts == ExpertAssumption((use,), "a run")
    assert AnalysedModel(config, 300).experts.most.routed == (2, 2, 2)


def test_other_routing_is_not_as_measured(finished, tmp_path, capsys):
    """The measurement is of the run's gate, whatever the other flags are."""
    text, _ = analyse(tmp_path, capsys, str(finished), "--seq-length", "64")
    assert "measured at iteration 20" in text
    text, found = analyse(tmp_path, capsys, str(finished), "--threshold", "0.5")
    assert "routed experts per token: 1 to 4 (the fewest and the most" in text
    fewest, most = (found["flops"][name] for name in ("fewest_experts", "most_experts"))
    assert fewest["flops_per_token"] < most["flops_per_token"]


def test_run_without_checkpoints_has_its_config(run_folder, finished, data, tmp_path, capsys):
    """The row that a start writes describes the model."""
    config = cli.parse(
        runs.flags(data, finished, 20, *runs.EP2), gate_config_class, available_gates
    )
    start = {"kind": "run", "iteration": 0, "world_size": 2, "config": config.to_dict()}
    metrics = run_folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    rows = "".join(line for line in lines if json.loads(line)["kind"] != "run")
    metrics.write_text(rows)
    shutil.rmtree(run_folder / "checkpoints")
    assert "has no row of kind run with a configuration" in error_of(capsys, run_folder)
    metrics.write_text(json.dumps(start) + "\n" + rows)
    _, found = analyse(tmp_path, capsys, str(run_folder))
    _, expected = analyse(tmp_path, capsys, str(finished))
    assert found["parameters"] == expected["parameters"]
    assert found["flops"]["most_experts"] == expected["flops"]["most_experts"]
    assert find_model_source(str(run_folder)).ranks == 2


def test_gate_file_of_a_run_is_named_by_the_user(tmp_path, capsys):
    """What a run recorded does not decide which code is executed."""
    gate_file = write_gate(tmp_path, "outside_cost")
    words = f"{SHAPE} {MOE} --gate outside_cost --gate-path {gate_file}".split()
    with restored_registry():
        config = cli.parse(words, gate_config_class, available_gates, import_gate_files)
    start = {"kind": "run", "iteration": 0, "config": config.to_dict()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    with restored_registry():
        assert "--gate is 'outside_cost'; allowed: " in error_of(capsys, tmp_path)
        _, found = analyse(tmp_path, capsys, str(tmp_path), "--gate-path", str(gate_file))
    parts = found["flops"]["most_experts"]["parts"]
    assert parts["router"] == {"forward": 3 * 2 * 8 * 32, "backward": 3 * 4 * 8 * 32}


def test_run_json_is_a_model(finished, tmp_path, capsys):
    path = finished / "checkpoints/iter_0000020/run.json"
    _, found = analyse(tmp_path, capsys, str(path), "--vocab-size", "300")
    assert found["parameters"]["parts"]["embedding"] == 300 * 32


def test_checkpoint_needs_no_tokenizer(run_folder, tmp_path, capsys):
    """The size of the vocabulary is recorded; files of tokenizers may be elsewhere."""
    manifest = next(run_folder.glob("checkpoints/iter_*/run.json"))
    content = json.loads(manifest.read_text())
    content["tokenizer"] = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "missing.json",
    }
    text = json.dumps(content)
    source = find_model_source(str(run_folder))
    assert source.vocab_size == 257
    other = tmp_path / "run.json"
    other.write_text(text)
    assert "missing.json" in error_of(capsys, other)


def test_assumed_experts_replace_others(finished, tmp_path, capsys):
    _, measured = analyse(tmp_path, capsys, str(finished))
    text, found = analyse(tmp_path, capsys, str(finished), "--experts-per-token", "2.5")
    assert "routed experts per token: 2.5 (--experts-per-token)" in text
    assert found["flops"]["most_experts"]["routed_experts_per_token_by_layer"] == [2.5]
    assert found["flops"] != measured["flops"]
    words = f"{SHAPE} {MOE} --gate topk@0,threshold@1+2 --topk 3 --experts-per-token 1.5"
    _, found = analyse(tmp_path, capsys, *words.split())
    used = found["flops"]["most_experts"]["routed_experts_per_token_by_layer"]
    assert used == [3, 1.5, 1.5], "only gates with a choice follow"


@pytest.mark.parametrize(
    "flags, message",
    [
        (f"{MOE} --gate threshold --experts-per-token 9", "9.0; allowed: up to 8, the most"),
        (f"{MOE} --gate topk --experts-per-token 1", "allowed: left out, because the gates"),
        ("--experts-per-token 1", "allowed: left out, because the gates"),
        (
            f"{MOE} --gate threshold --experts-per-token -1",
            "--experts-per-token is -1.0; allow",
        ),
        ("--json missing/costs.json", "--json is 'missing/costs.json'; allowed: a file in an"),
        ("--png .", "--png is '.'; allowed: a file in an existing folder"),
        ("--num-expert 3", "--num-expert is no flag; did you mean --num-experts?"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    assert message in error_of(capsys, *f"{SHAPE} {flags}".split())


def test_path_without_a_model_is_refused(tmp_path, capsys):
    assert "allowed: a run folder with metrics.jsonl" in error_of(capsys, tmp_path)
    assert "allowed: a run folder" in error_of(capsys, tmp_path / "missing")


def test_broken_checkpoint_is_refused(run_folder, capsys):
    next(run_folder.glob("checkpoints/iter_*/rank_00000.safetensors")).unlink()
    assert "no valid checkpoint" in error_of(capsys, run_folder)


def test_vocabulary_of_gpt2_is_assumed(capsys):
    """Planning a run needs no files of the tokenizer."""
    assert analyze_model.main(["--num-layers", "1", "--hidden-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "(vocabulary taken as 50257: " in out
    assert "output layer" in out


def test_text_names_every_part_with_flops(tmp_path, capsys):
    words = f"{SHAPE} {MOE} --gate threshold --moe-shared-experts 1 --recompute-activations"
    text, found = analyse(tmp_path, capsys, *words.split())
    lines = text.splitlines()
    assert lines[0].split() == ["parameters", "all", "active", "per", "token"]
    (header,) = [i for i, line in enumerate(lines) if line.startswith("FLOPs per token")]
    assert lines[header].split()[3:] == ["forward", "training", "share"]
    shares = []
    for line in lines[header + 1 :]:
        if line.startswith("total"):
            break
        shares.append(float(line.split()[-1].removesuffix("%")))
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    most = found["flops"]["most_experts"]
    assert len(shares) == sum(part["forward"] > 0 for part in most["parts"].values()) == 6
    assert "recomputation: " in text and most["recomputed_flops_per_token"] > 0
    assert "step of 4 samples x 256 tokens: " in text


def test_chart_is_a_png(tmp_path, capsys):
    path = tmp_path / "costs.png"
    words = f"{SHAPE} {MOE} --gate threshold --png {path}"
    analyse(tmp_path, capsys, *words.split())
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > 1000 and height > 400


def test_chart_without_its_package_is_refused(tmp_path, capsys, monkeypatch):
    """Before the analysis: nothing is printed or written."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "vl_convert" else find_spec(n)
    )
    path = tmp_path / "costs.png"
    message = error_of(capsys, *SHAPE.split(), "--png", path)
    assert "--png needs the package vl_convert" in message
    assert "pip install 'moe-megatron[analysis]'" in message
    assert not path.exists()
    with pytest.raises(ValueError, match="needs the package vl_convert"):
        cost_chart.require_chart_packages("--png")


def test_help_lists_own_flags(capsys):
    with pytest.raises(SystemExit) as end:
        analyze_model.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert (
        "--experts-per-token" in out
        and "--png" in out
        and "tools/analyze_model.py runs/x" in out
    )


def test_formula_is_that_of_training(finished, data):
    """The tool and the training rows share one count."""
    config = cli.parse(runs.flags(data, finished), gate_config_class, available_gates)
    flops = ModelFlops.of(build_run_config_model(config, 257))
    row = runs.metrics(finished)[0]
    assert flops.training_metrics(row, 1.0)["flops_per_token"] == pytest.approx(
        row["flops_per_token"], rel=1e-8
    )


def test_model_only_leaves_out_ranks(tmp_path, capsys):
    text, costs = analyse(tmp_path, capsys, *SHAPE.split(), "--model-only")
    assert costs.keys() == {"parameters", "flops"} and "memory" not in text
    _, everything = analyse(tmp_path, capsys, *SHAPE.split())
    assert costs.items() < everything.items()
