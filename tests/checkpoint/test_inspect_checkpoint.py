"""Summaries of checkpoints, their faults, and differences between two of them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import engines, handmade
from megatron.checkpoint import directory, inspect, shards
from megatron.checkpoint.inspect_text import format_checkpoint
from megatron.checkpoint.manifest import CorruptCheckpointError, read_manifest
from megatron.config.schema import MoEConfig, RunConfig
from megatron.io import sha256
from megatron.model.builder import build_model
from megatron.model.parameter_count import count_parameters
from megatron.parallel.groups import Groups

TOOL = "inspect_checkpoint.py"
SHAPES = {
    "embed_tokens__weight": (11, 4),
    "layers__0__mlp__experts__w1": (4, 3, 4),
    "layers__0__mlp__gate__r": (4, 4),
    "layers__0__self_attn__q_proj__weight": (4, 4),
    "norm__weight": (4,),
    "strange": (2,),
}
BUFFERS = {
    "gate.bias": torch.tensor([0.5, -2.0]),
    "gate.count": torch.tensor(3),
    "gate.used": torch.tensor([True]),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a directory of three checkpoints, completed in the order 2, 5, 4.

    The weights of the n-th are n times those of the first.
    """
    for i, iteration in enumerate((2, 5, 4)):
        tensors = {name: t * (i + 1) for name, t in handmade.weights(**SHAPES).items()}
        handmade.checkpoint(tmp_path / "save", tensors, 3, iteration=iteration, buffers=BUFFERS)
    return tmp_path / "save"


def lines(done: SimpleNamespace) -> list[str]:
    """Return the lines of stdout, with single spaces."""
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_summary_describes_run_and_files(folder):
    path = folder / "iter_0000005"
    found = inspect.summarize_checkpoint(path, verify=True)
    assert json.loads(json.dumps(found)) == found
    assert (found["iteration"], found["serial"], found["kinds"]) == (
        5,
        2,
        ["weight", "exp_avg", "exp_avg_sq"],
    )
    assert found["progress"] == {
        "iteration": 5,
        "consumed_samples": 40,
        "consumed_tokens": 10240,
    }
    assert found["config"] == json.loads(json.dumps(handmade.CONFIG.to_dict()))
    assert found["topology"] == {
        "ranks": 3,
        "expert_parallel_size": 1,
        "zero_stage": 2,
        "precision": "bf16",
    }
    assert found["identity"] == handmade.IDENTITY and found["faults"] == []
    parts = {part: number for part, number in found["parameters"]["parts"].items() if number}
    assert parts == {
        "embedding": 44,
        "routed experts": 48,
        "router": 16,
        "attention": 16,
        "norms": 4,
        "other": 2,
    }
    assert found["parameters"]["total"] == 130
    names = {p.name for p in path.iterdir()} - {"manifest.json"}
    assert found["files"] == {
        n: {"bytes": (path / n).stat().st_size, "sha256": sha256.file_sha256(path / n)}
        for n in names
    }
    assert found["bytes"] == sum(f["bytes"] for f in found["files"].values())
    assert found["tensors"]["strange"] == {"shape": [2], "pieces": 2}
    assert found["buffers"]["gate.count"] == {"shape": [], "pieces": 1}


@pytest.mark.parametrize("elements", [1, 5, 1 << 20])
def test_summary_has_statistics_of_tensors(elements, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SLICE_ELEMENTS", elements)
    tensors = handmade.weights(**SHAPES, empty=(0, 3))
    tensors["norm.weight"][1:3] = torch.tensor([float("nan"), float("-inf")])
    tensors["strange"][:] = float("nan")
    path = handmade.checkpoint(tmp_path / "save", tensors, 3, buffers=BUFFERS)
    read = []
    found = inspect.summarize_checkpoint(path, tensors=True, progress=read.append)
    for name, tensor in (tensors | BUFFERS).items():
        entry = (found["tensors"] | found["buffers"])[name]
        finite = tensor[tensor.isfinite()].double()
        assert entry["dtype"] == str(tensor.dtype).removeprefix("torch.") and entry[
            "shape"
        ] == list(tensor.shape)
        assert entry["min"] == (finite.min() if len(finite) else None), name
        assert entry["max"] == (finite.max() if len(finite) else None), name
        assert entry["norm"] == pytest.approx(finite.norm().item()) and math.isfinite(
            entry["norm"]
        )
        assert entry["not_finite"] == tensor.numel() - len(finite)
    assert found["faults"] == [
        f"{path}: 2 values of norm.weight are not finite",
        f"{path}: 2 values of strange are not finite",
    ]
    assert sum(read) == found["bytes"] + sum(t.nbytes for t in (tensors | BUFFERS).values())


def test_summary_of_trained_checkpoint(ranks2, tmp_path):
    """Experts that are sharded over ranks are counted in full."""
    config = engines.config_of("deepseek_v3", 2, 3, "bf16", save=str(tmp_path))
    ranks2.run(engines.train, config, 1)
    found = inspect.summarize_checkpoint(
        inspect.resolve_checkpoint(tmp_path), verify=True, tensors=True
    )
    model = build_model(
        config.model, config.moe, config.gate_options, vocab_size=61, seed=0, groups=Groups()
    )
    size = count_parameters(model)
    assert (
        found["parameters"]
        == {"total": size.total, "trainable": size.total, "parts": size.parts}
        and found["faults"] == []
    )
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert {n: t["shape"] for n, t in (found["tensors"] | found["buffers"]).items()} == shapes
    assert {t["dtype"] for t in found["tensors"].values()} == {"float32"}
    text = "\n".join(format_checkpoint(found))
    assert (
        "2 ranks, experts shared by 2, ZeRO 3, bf16" in text
        and "bias_update_speed 0.07" in text
    )


def test_printed_summary(folder):
    done = handmade.run(TOOL, folder, "--tensors")
    text = lines(done)
    saved = {}
    sizes = set()
    for i in (2, 4, 5):
        summary = inspect.summarize_checkpoint(folder / directory.checkpoint_name(i))
        saved[i] = summary["saved_at"]
        sizes.add(f"{summary['bytes'] / 1e6:,.1f} MB")
    (size,) = sizes
    assert text[:4] == [
        f"{folder}: 3 checkpoints",
        f"newest iter_0000004 {saved[4]} {size}",
        f"iter_0000005 {saved[5]} {size}",
        f"iter_0000002 {saved[2]} {size}",
    ]
    manifest = read_manifest(folder / "iter_0000004")
    versions = json.loads((folder / "iter_0000004/state.json").read_text())["versions"]
    assert text[4:] == [
        "",
        f"{folder}/iter_0000004",
        "iteration 4 of 100",
        "seen 32 samples, 8,192 tokens",
        "optimizer 4 steps, 8 samples each",
        f"saved {saved[4]}",
        "made with 3 ranks, experts shared by 1, ZeRO 2, bf16",
        f"holds weights and moments of 6 parameters, {size} in 6 files",
        "parameters",
        "embedding 44",
        "attention 16",
        "routed experts 48",
        "router 16",
        "norms 4",
        "other 2",
        "total 130",
        "gate, for 4 experts",
        "threshold threshold 0.8",
        "expert type",
        "mlp",
        "tokenizer",
        "name ByteTokenizer",
        "vocab_size 257",
        "fingerprint f00d",
        "data",
        "corpus bin_bytes 10, idx_bytes 20",
        "versions",
        *(f"{name} {version}" for name, version in versions.items()),
        "files (--verify compares their hashes)",
        *(f"{name} {nbytes:,} {sha}" for name, (nbytes, sha) in manifest["files"].items()),
        "",
        "tensor shape pieces dtype min max norm",
        *text[-9:],
    ]
    assert text[-4].startswith("strange [2] 2 float32 ")
    assert text[-3:] == [
        "gate.bias [2] 1 float32 -2 0.5 2.062",
        "gate.count [] 1 int64 3 3 3",
        "gate.used [1] 1 bool 1 1 1",
    ]


def test_printed_summary_of_untrained_dense_model(tmp_path):
    config = replace(handmade.CONFIG, moe=replace(handmade.CONFIG.moe, num_experts=0))
    path = handmade.checkpoint(
        tmp_path, handmade.weights(norm__weight=(3,)), config=config, moments=False, data={}
    )
    text = [
        " ".join(line.split()) for line in format_checkpoint(inspect.summarize_checkpoint(path))
    ]
    assert "none on record" in text and not [line for line in text if line.startswith("gate")]
    assert any(line.startswith("holds weights of 1 parameters, ") for line in text)


def test_gate_without_stored_options_is_named(tmp_path):
    """Up to version 2, a run with the gate hash stored none."""
    config = RunConfig(moe=MoEConfig(num_experts=4, gate="hash"))
    path = handmade.checkpoint(tmp_path, handmade.weights(norm__weight=(3,)), config=config)
    text = [line.strip() for line in format_checkpoint(inspect.summarize_checkpoint(path))]
    start = text.index("gate, for 4 experts")
    assert text[start + 1 : start + 3] == ["hash", "expert type"]


def test_json_output_is_the_summary(folder):
    found = json.loads(handmade.run(TOOL, folder, "--json", "--verify", "--tensors").stdout)
    assert [(row["name"], row["newest"]) for row in found["checkpoints"]] == [
        ("iter_0000004", True),
        ("iter_0000005", False),
        ("iter_0000002", False),
    ]
    assert found["newest"] == inspect.summarize_checkpoint(
        folder / "iter_0000004", verify=True, tensors=True
    )
    path = folder / "iter_0000002"
    assert json.loads(
        handmade.run(TOOL, path, "--json").stdout
    ) == inspect.summarize_checkpoint(path)
    found = json.loads(handmade.run(TOOL, path, folder, "--json").stdout)
    assert found["progress"]["iteration"] == [2, 4] and "values" not in found["tensors"]


# Faults


def test_broken_checkpoints_are_listed(folder):
    handmade.damage(folder / "iter_0000004/rank_00002.safetensors")
    (folder / "iter_0000002/rank_00000.safetensors").write_bytes(b"short")
    (folder / "iter_0000007").mkdir()
    newest = {}
    for flags in ((), ("--verify",)):
        done = handmade.run(TOOL, folder, *flags, code=1)
        newest[flags] = next(
            line.split()[1] for line in lines(done) if line.startswith("newest")
        )
        faults = [line for line in lines(done) if line.startswith("BROKEN")]
        assert len(faults) == 2 + len(flags) == len(done.stderr.splitlines())
        assert lines(done)[0].endswith(f": 4 checkpoints, {len(faults)} of them broken")
        assert (
            f"BROKEN {folder}/iter_0000002/rank_00000.safetensors has 5 bytes, "
            in "\n".join(faults)
        )
        assert f"BROKEN {folder}/iter_0000007/manifest.json is missing" in faults
        damaged = [
            line
            for line in faults
            if f"{folder}/iter_0000004/rank_00002.safetensors is corrupt" in line
        ]
        assert len(damaged) == len(flags)
    assert newest == {(): "iter_0000004", ("--verify",): "iter_0000005"}
    shutil.rmtree(folder / "iter_0000004")
    shutil.rmtree(folder / "iter_0000005")
    assert (
        lines(handmade.run(TOOL, folder, code=1))[0]
        == f"{folder}: 2 checkpoints, 2 of them broken"
    )
    done = handmade.run(TOOL, folder, folder, code=2)
    assert f"{folder} has no valid checkpoint: " in done.stderr
    assert f"{folder}/iter_0000002/rank_00000.safetensors has 5 bytes" in done.stderr


def test_verify_finds_changed_byte(folder):
    path = folder / "iter_0000005"
    handmade.damage(path / "rank_00001.safetensors")
    assert "files (--verify compares their hashes)" in lines(handmade.run(TOOL, path))
    done = handmade.run(TOOL, path, "--verify", "--tensors", code=1)
    assert done.stderr == (
        f"fault: {path}/rank_00001.safetensors is corrupt: its SHA-256 is not the one in "
        "manifest.json\n"
    )
    assert "strange [2] 2" in lines(done), "shapes, but no values"
    done = handmade.run(TOOL, path, folder, "--verify", "--tensors", code=1)
    assert (
        "rank_00001.safetensors is corrupt" in done.stderr
        and "none differs in name or shape" in lines(done)
    )
    assert not [line for line in lines(done) if line.startswith("values")]


@pytest.mark.parametrize("name", ["run.json", "state.json", "index.json", "manifest.json"])
def test_damaged_json_is_found_without_verify(name, folder):
    path = folder / "iter_0000004"
    handmade.damage(path / name)
    with pytest.raises(CorruptCheckpointError, match=name):
        inspect.summarize_checkpoint(path)
    done = handmade.run(TOOL, path, code=2)
    assert (
        len(done.stderr.splitlines()) == 1 and f"{TOOL}: error: {path}/{name} " in done.stderr
    )
    assert inspect.resolve_checkpoint(folder).name == "iter_0000005"


def test_non_finite_values_are_faults(tmp_path):
    path = handmade.checkpoint(tmp_path, {"a": torch.tensor([1.0, float("nan"), 2.0])})
    handmade.run(TOOL, path)
    done = handmade.run(TOOL, path, "--tensors", code=1)
    assert lines(done)[-1] == "a [3] 2 float32 1 2 2.236 1 NOT FINITE"
    assert done.stderr == f"fault: {path}: 1 values of a are not finite\n"
    assert handmade.run(TOOL, tmp_path, "--tensors", code=1).stderr == done.stderr


@pytest.mark.parametrize(
    "path, problem",
    [("nothing", "is not a directory of checkpoints"), ("empty", "has no valid checkpoint")],
)
def test_missing_checkpoints_are_an_error(path, problem, tmp_path):
    (tmp_path / "empty").mkdir()
    done = handmade.run(TOOL, path, code=2, cwd=tmp_path)
    assert done.stderr == (
        f"{TOOL}: error: {path} {problem}. Give the directory of --save of a run, or one "
        "checkpoint in it\n"
    )


# Differences


def test_checkpoint_equals_itself(folder):
    found = inspect.summarize_checkpoint(folder / "iter_0000002")
    differences = inspect.compare_checkpoints(found, found, tensors=True)
    assert (
        set(differences.pop("tensors")["values"].values()) == {0.0}
        and differences.pop("paths") == [found["path"]] * 2
    )
    assert differences and not any(differences.values())


def make_different(folder: Path) -> None:
    """Commit a checkpoint that differs from those of the fixture in every section."""
    tensors = handmade.weights(**SHAPES)
    del tensors["strange"]
    tensors["norm.weight"] = torch.zeros(5)
    tensors["new"] = torch.zeros(3)
    config = replace(
        handmade.CONFIG,
        model=replace(handmade.CONFIG.model, num_layers=7),
        gate_options={"threshold": {"other": 1}},
    )
    handmade.checkpoint(
        folder,
        tensors,
        2,
        iteration=9,
        config=config,
        versions={"torch": "0.1"},
        identity={**handmade.IDENTITY, "tokenizer_name": "Other"},
        data={"corpus": {"bin_bytes": 11}},
        global_batch_size=16,
        iterations=50,
        saved_at="then",
    )


def test_every_difference_is_listed(folder, tmp_path):
    make_different(tmp_path / "b")
    first = inspect.summarize_checkpoint(folder / "iter_0000002")
    differences = inspect.compare_checkpoints(
        first, inspect.summarize_checkpoint(tmp_path / "b/iter_0000009"), tensors=True
    )
    missing = inspect.ABSENT
    assert differences["configuration"] == {
        "model.num_layers": [4, 7],
        "gate_options.threshold.threshold": [0.8, missing],
        "gate_options.threshold.other": [missing, 1],
    }
    assert differences["progress"] == {
        "iteration": [2, 9],
        "consumed_samples": [16, 72],
        "consumed_tokens": [4096, 18432],
    }
    assert differences["run"] == {
        "samples per step": [8, 16],
        "steps of the full run": [100, 50],
        "optimizer steps": [2, 9],
        "saved at": [first["saved_at"], "then"],
        "parameters": [130, 132],
        "trainable parameters": [130, 132],
    }
    assert differences["topology"] == {"ranks": [3, 2]} and differences["tokenizer"] == {
        "tokenizer_name": ["ByteTokenizer", "Other"]
    }
    assert differences["data"] == {
        "corpus.bin_bytes": [10, 11],
        "corpus.idx_bytes": [20, missing],
    }
    assert differences["versions"]["torch"] == [torch.__version__, "0.1"]
    assert differences["versions"]["numpy"] == [first["versions"]["numpy"], missing]
    values = differences["tensors"].pop("values")
    assert set(values) == {name.replace("__", ".") for name in SHAPES} - {
        "norm.weight",
        "strange",
    }
    assert differences["tensors"] == {
        "only_first": ["strange", *BUFFERS],
        "only_second": ["new"],
        "shapes": {"norm.weight": [[4], [5]]},
    }


def test_differences_are_printed(folder, tmp_path):
    make_different(tmp_path / "b")
    text = lines(handmade.run(TOOL, folder / "iter_0000002", tmp_path / "b"))
    assert text[:2] == [f"first {folder}/iter_0000002", f"second {tmp_path}/b/iter_0000009"]
    for line in (
        "model.num_layers 4 -> 7",
        "gate_options.threshold.other (not there) -> 1",
        "ranks 3 -> 2",
        "strange only in the first",
        "new only in the second",
        "norm.weight [4] -> [5]",
        "corpus.bin_bytes 10 -> 11",
    ):
        assert line in text


@pytest.mark.parametrize("elements", [3, 1 << 20])
def test_distances_of_weights(elements, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SLICE_ELEMENTS", elements)
    a, b = (handmade.weights(w=(5, 4), same=(3,), zero=(2,), strange=(2,)) for _ in range(2))
    b["w"] = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))
    a["zero"], b["zero"], b["strange"] = (
        torch.zeros(2),
        torch.ones(2),
        torch.tensor([float("nan"), 1.0]),
    )
    paths = [
        handmade.checkpoint(
            tmp_path / name, tensors, ranks, buffers={"flag": torch.tensor([name == "a", True])}
        )
        for name, tensors, ranks in (("a", a, 3), ("b", b, 2))
    ]
    read = []
    differences = inspect.compare_checkpoints(
        *map(inspect.summarize_checkpoint, paths), tensors=True, progress=read.append
    )["tensors"]["values"]
    expected = (
        (a["w"] - b["w"]).double().norm() / max(a["w"].double().norm(), b["w"].double().norm())
    ).item()
    assert differences == {
        "w": pytest.approx(expected, rel=1e-6),
        "same": 0.0,
        "zero": 1.0,
        "strange": None,
        "flag": pytest.approx(math.sqrt(1 / 2)),
    }
    assert sum(read) == 2 * sum(t.nbytes for t in a.values()) + 4
    text = lines(handmade.run(TOOL, *paths, "--tensors"))
    assert f"w {expected:.3e}" in text and {
        "same equal",
        "strange not finite",
        "zero 1.000e+00",
    } <= set(text)


def test_tool_needs_no_deepspeed(folder):
    done = handmade.program(
        TOOL, folder, "--tensors", cwd=folder, before="sys.modules['deepspeed'] = None"
    )
    assert done.returncode == 0 and "3 checkpoints" in done.stdout, done.stderr
