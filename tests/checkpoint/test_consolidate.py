"""Consolidated checkpoints: values, files, choice of the checkpoint, memory and errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import engines, handmade
from megatron.checkpoint import consolidate as c
from megatron.checkpoint import directory, shards
from megatron.checkpoint.manifest import CorruptCheckpointError, read_manifest
from megatron.config.format_version import FORMAT_VERSION
from megatron.config.run_json import read_run_json
from megatron.io.safetensors_writer import TensorSpec
from megatron.model.builder import build_model
from megatron.parallel.groups import Groups

TOOL = "consolidate_checkpoint.py"
SHAPES = {"embed__weight": (31, 4), "experts__w1": (4, 6, 5), "norm__weight": (7,)}
BUFFERS = {
    "gate.bias": torch.tensor([0.1, 0.2]),
    "gate.count": torch.tensor(3),
    "gate.used": torch.tensor([True]),
}


@pytest.fixture
def made(tmp_path):
    """Return (checkpoint, its tensors)."""
    tensors = handmade.weights(**SHAPES)
    return handmade.checkpoint(tmp_path / "save", tensors, 3, buffers=BUFFERS), tensors


def consolidate(
    source: Path, output: Path, progress=lambda written: None, **options
) -> dict[str, torch.Tensor]:
    """Consolidate a checkpoint and return all tensors of the model's files."""
    found = c.find_verified_checkpoint(source)
    c.consolidate(found, output, c.ConsolidateOptions(**options), progress)
    return contents(output)


def contents(output: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """Return all tensors in the files of a stem."""
    tensors = {}
    for path in sorted(output.glob(f"{stem}*.safetensors")):
        tensors |= load_file(path)
    return tensors


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Values


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """Return checkpoints after three steps, by (ranks, expert-parallel size, ZeRO stage).

    The values are (directory, config, loss of the fourth step).
    """
    made = {}
    for ranks, ep_size, stage in ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 2, 1)):
        folder = tmp_path_factory.mktemp("trained")
        config = engines.config_of("deepseek_v3", ep_size, stage, save=str(folder))
        answers = request.getfixturevalue(f"ranks{ranks}").run(engines.train, config, 3, 1)
        made[ranks, ep_size, stage] = folder, config, answers[0][1][0]
    return made


def test_result_is_equal_for_every_topology(trained, tmp_path):
    """It has the bits of the checkpoint, and one rank's values but for the order of sums."""
    first = None
    for i, (folder, _, _) in enumerate(trained.values()):
        found = consolidate(folder, tmp_path / str(i))
        stored = engines.full_tensors(folder)
        check_equal(
            found,
            {
                name.split("/", 1)[1]: tensor
                for name, tensor in stored.items()
                if name.startswith(("weight/", "buffer/"))
            },
        )
        first = first or found
        assert found.keys() == first.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, first[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("topology", [(1, 1, 1), (4, 2, 1), (2, 2, 3)])
def test_model_with_result_has_same_loss(topology, trained, tmp_path):
    folder, config, expected = trained[topology]
    tensors = consolidate(folder, tmp_path / "out")
    config = read_run_json(tmp_path / "out/run.json")
    model = build_model(
        config.model, config.moe, config.gate_options, vocab_size=61, seed=99, groups=Groups()
    )
    model.load_state_dict(tensors)
    with torch.no_grad():
        losses = [
            model(b.tokens_BS, b.labels_BS).lm_loss.item()
            for b in engines.micro_batches(3, Groups())
        ]
    assert sum(losses) / len(losses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("elements", [1, 7, 1 << 20])
def test_slices_of_any_size_are_joined(elements, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SLICE_ELEMENTS", elements)
    check_equal(consolidate(made[0], tmp_path / "out"), made[1] | BUFFERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_parameters_are_cast(dtype, made, tmp_path):
    found = consolidate(made[0], tmp_path / "out", dtype=dtype)
    check_equal(found, {name: t.to(dtype) for name, t in made[1].items()} | BUFFERS)


def test_routers_have_their_own_dtype(tmp_path):
    """They stay fp32 under --dtype; dense layers with similar names do not."""
    tensors = handmade.weights(
        layers__0__mlp__gate__router__weight=(4, 8),
        layers__1__mlp__gate_proj__weight=(4, 8),
        layers__2__mlp__experts__w1=(4, 6, 5),
    )
    source = handmade.checkpoint(tmp_path / "save", tensors)
    router, *others = tensors
    found = consolidate(source, tmp_path / "out", dtype=torch.bfloat16)
    check_equal(found, {router: tensors[router]} | {n: tensors[n].bfloat16() for n in others})
    flags = ("--dtype", "bfloat16", "--router-dtype", "float16")
    handmade.run(TOOL, source, tmp_path / "two", *flags)
    check_equal(
        contents(tmp_path / "two"),
        {router: tensors[router].half()} | {n: tensors[n].bfloat16() for n in others},
    )
    about = json.loads((tmp_path / "two/consolidated.json").read_text())
    assert about["dtype"] == "bfloat16" and about["router_dtype"] == "float16"
    large = {router: torch.full((4, 8), 1e6)}
    with pytest.raises(ValueError, match="^--router-dtype float16 holds values up to 65504"):
        consolidate(
            handmade.checkpoint(tmp_path / "large", large),
            tmp_path / "three",
            router_dtype=torch.float16,
        )


def test_moments_are_never_cast(made, tmp_path):
    found = consolidate(made[0], tmp_path / "out", dtype=torch.bfloat16, optimizer=True)
    assert found["embed.weight"].dtype == torch.bfloat16 and len(found) == 6
    check_equal(
        contents(tmp_path / "out", "optimizer"),
        {
            f"{key}/{name}": t * factor
            for key, factor in (("exp_avg", 10.0), ("exp_avg_sq", 100.0))
            for name, t in made[1].items()
        },
    )


def test_weight_too_large_for_dtype_is_named(tmp_path):
    tensors = {
        "a.weight": torch.tensor([1.0, -7e4]),
        "b.weight": torch.tensor([float("inf"), float("nan"), 1.0]),
    }
    source = handmade.checkpoint(tmp_path / "save", tensors)
    with pytest.raises(
        ValueError,
        match=r"float16 holds values up to 65504, and a.weight has one of size 70000. Use "
        r"bfloat16 or float32",
    ):
        consolidate(source, tmp_path / "out", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["save"]
    source = handmade.checkpoint(tmp_path / "huge", {"a.weight": torch.tensor([3.4e38])}, 1)
    with pytest.raises(
        ValueError, match=r"bfloat16 holds values up to 3.3895e\+38, .* 3.4e\+38. Use float32$"
    ):
        consolidate(source, tmp_path / "out", dtype=torch.bfloat16)
    del tensors["a.weight"]  # values that are not finite before may be cast
    consolidate(
        handmade.checkpoint(tmp_path / "other", tensors), tmp_path / "out", dtype=torch.float16
    )
    assert contents(tmp_path / "out")["b.weight"].isfinite().tolist() == [False, False, True]


# Files


def test_files_are_split_by_size(made, tmp_path):
    """Sizes: embed 31 * 4 * 4 = 496 bytes, experts 480, norm 28, buffers 8 + 8 + 1."""
    check_equal(
        consolidate(made[0], tmp_path / "out", max_shard_bytes=525, optimizer=True),
        made[1] | BUFFERS,
    )
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == [
        *names,
        "model.safetensors.index.json",
    ]
    for stem, total in (("model", 496 + 480 + 28 + 17), ("optimizer", 2 * (496 + 480 + 28))):
        index = json.loads((tmp_path / f"out/{stem}.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": total}
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert name in set(opened.keys())
                assert opened.metadata() == {"format": "pt"}
        assert index["weight_map"].keys() == contents(tmp_path / "out", stem).keys()
    assert list(index["weight_map"])[0] == "exp_avg/embed.weight"


@given(sizes=st.lists(st.integers(0, 10), max_size=12), limit=st.integers(1, 15))
def test_files_are_as_full_as_allowed(sizes, limit):
    specs = [TensorSpec(str(i), torch.int8, (size,)) for i, size in enumerate(sizes)]
    files = c.split_into_files(specs, limit)
    assert [spec for file in files for spec in file] == specs
    totals = [sum(spec.nbytes for spec in file) for file in files]
    assert all(total <= limit or len(file) == 1 for total, file in zip(totals, files))
    assert all(total + file[0].nbytes > limit for total, file in zip(totals, files[1:]))
    assert all(files) or files == [[]]


def test_single_file_has_hash_and_no_index(made, tmp_path):
    consolidate(made[0], tmp_path / "out", optimizer=True)
    names = {"model.safetensors", "optimizer.safetensors", "run.json", "consolidated.json"}
    assert set(os.listdir(tmp_path / "out")) == {*names, "SHA256SUMS"}
    lines = (tmp_path / "out/SHA256SUMS").read_text().splitlines()
    sums = {name: sha256 for sha256, name in (line.split("  ") for line in lines)}
    assert sums == {
        n: hashlib.sha256((tmp_path / "out" / n).read_bytes()).hexdigest() for n in names
    }
    about = json.loads((tmp_path / "out/consolidated.json").read_text())
    assert (
        about["checkpoint"] == "iter_0000003"
        and about["dtype"] == "float32"
        and about["optimizer"] is True
    )
    assert about["manifest_checksum"] == read_manifest(made[0])["checksum"]
    assert {"version": FORMAT_VERSION, **about["state"]} == json.loads(
        (made[0] / "state.json").read_text()
    )
    assert read_run_json(tmp_path / "out/run.json") == handmade.CONFIG
    assert sorted(os.listdir(tmp_path)) == ["out", "save"], "no staging directory is left"


def test_progress_counts_every_byte(made, tmp_path):
    planned = []
    written = []
    read = []
    found = c.find_verified_checkpoint(made[0], progress=read.append)
    c.consolidate(
        found,
        tmp_path / "out",
        c.ConsolidateOptions(optimizer=True),
        written.append,
        planned.append,
    )
    assert planned == [sum(written)] == [3 * (496 + 480 + 28) + 17]
    assert sum(read) == sum(
        p.stat().st_size for p in found.path.iterdir() if p.name != "manifest.json"
    )


@given(
    number=st.integers(1, 10**6),
    unit=st.sampled_from(["", "B", "kb", "KB", "MB", "GB", "TB", "KiB", "MiB", "gib"]),
    space=st.sampled_from(["", " "]),
)
def test_sizes_are_parsed(number, unit, space):
    base = 1024 if "i" in unit else 1000
    power = " kmgt".index(unit[0].lower()) if unit[:1].lower() in tuple("kmgt") else 0
    assert c.parse_size(f"{number}{space}{unit}") == number * base**power


@pytest.mark.parametrize("text", ["", "GB", "5 potatoes", "-1", "0", "0.1", "1e9", "5GB5"])
def test_invalid_size_is_refused(text):
    with pytest.raises(
        ValueError,
        match=f"--max-shard-size is '{text}'; allowed: a number of bytes, such as 5GB",
    ):
        c.parse_size(text)
    assert c.parse_size("0.5GB") == 500_000_000


# Which checkpoint


@pytest.fixture
def several(tmp_path):
    """Return a directory of three checkpoints, completed in the order 2, 5, 4."""
    for iteration in (2, 5, 4):
        handmade.checkpoint(
            tmp_path / "save", {"a": torch.full((9,), float(iteration))}, iteration=iteration
        )
    return tmp_path / "save"


def test_newest_is_the_last_completed(several):
    assert c.find_verified_checkpoint(several).path.name == "iter_0000004"
    assert c.find_verified_checkpoint(several, 5).path.name == "iter_0000005"
    (several / "link").symlink_to(several / "iter_0000002")
    assert c.find_verified_checkpoint(several / "link").path == several / "iter_0000002"


def test_corrupt_checkpoints_are_passed_over(several):
    handmade.damage(several / "iter_0000004/rank_00001.safetensors")
    (several / "iter_0000002/manifest.json").unlink()
    found = c.find_verified_checkpoint(several)
    assert found.path.name == "iter_0000005" and found.manifest["iteration"] == 5
    assert len(found.problems) == 2
    assert "iter_0000002/manifest.json is missing" in found.problems[0]
    assert "iter_0000004/rank_00001.safetensors is corrupt" in found.problems[1]
    for step, reason in (
        (4, "rank_00001.safetensors is corrupt"),
        (2, "manifest.json is missing"),
    ):
        with pytest.raises(
            FileNotFoundError,
            match=f"no valid checkpoint of iteration {step}, [^;]*: [^;]*{reason}",
        ):
            c.find_verified_checkpoint(several, step)
        with pytest.raises(CorruptCheckpointError, match=reason):
            c.find_verified_checkpoint(several / directory.checkpoint_name(step))
    shutil.rmtree(several / "iter_0000005")
    with pytest.raises(
        FileNotFoundError, match="has no valid checkpoint: .*missing; .*corrupt"
    ):
        c.find_verified_checkpoint(several)


def test_missing_checkpoint_is_an_error(several, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="nowhere is not a directory of checkpoints. Give the directory of --save",
    ):
        c.find_verified_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"has no valid checkpoint\. Give the directory of --save"
    ):
        c.find_verified_checkpoint(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"has no valid checkpoint of iteration 3, .* iterations 2, 4, 5\. Give",
    ):
        c.find_verified_checkpoint(several, 3)
    with pytest.raises(
        ValueError,
        match="--load-step is 5; allowed: only with the directory of a run's checkpoints",
    ):
        c.find_verified_checkpoint(several / "iter_0000005", 5)


def test_checkpoint_without_moments(tmp_path):
    source = handmade.checkpoint(
        tmp_path / "save", handmade.weights(**SHAPES), iteration=0, moments=False
    )
    with pytest.raises(
        ValueError,
        match="--optimizer is True; allowed: only with a checkpoint that has moments",
    ):
        consolidate(source, tmp_path / "out", optimizer=True)
    assert len(consolidate(source, tmp_path / "out")) == len(SHAPES)


# The output directory


def test_output_may_be_empty_or_new(made, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for output in (
        tmp_path / "empty",
        tmp_path / "link",
        tmp_path / "a/b/c",
        tmp_path / "save/model",
    ):
        check_equal(consolidate(made[0], output), made[1] | BUFFERS)
    assert (tmp_path / "elsewhere/model.safetensors").exists()


def test_existing_output_is_refused(made, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    for name in ("file", "full", "save"):
        with pytest.raises(
            ValueError, match=f"{name} exists; allowed: a new or an empty directory"
        ):
            consolidate(made[0], tmp_path / name)
    for output in (tmp_path / "save/iter_0000009", made[0] / "model"):
        with pytest.raises(
            ValueError,
            match="belongs to the checkpoints of a run; allowed: any other directory",
        ):
            consolidate(made[0], output)
    assert (tmp_path / "file").read_text() == (tmp_path / "full/file").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "save"]


def test_disk_space_is_checked_first(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(
        OSError,
        match=rf"out needs 1.0 MB, but the disk of {tmp_path} has 0.0 MB free. Free some",
    ):
        consolidate(made[0], tmp_path / "new/out")
    assert os.listdir(tmp_path) == ["save"]


def test_interrupted_program_leaves_no_output(made, tmp_path):
    def interrupt(written: int) -> None:
        assert (tmp_path / "out.partial/folder/model.safetensors").exists() and not (
            tmp_path / "out"
        ).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(made[0], tmp_path / "out", interrupt)
    assert os.listdir(tmp_path) == ["save"]
    (tmp_path / "out.partial/folder").mkdir(parents=True)
    (tmp_path / "out.partial/lock").write_text("")
    (tmp_path / "out.partial/folder/model-00007-of-00009.safetensors").write_text("half")
    check_equal(consolidate(made[0], tmp_path / "out"), made[1] | BUFFERS)
    assert sorted(os.listdir(tmp_path)) == ["out", "save"]


# The program

MEMORY = """
from pathlib import Path
from safetensors.torch import load_file
from megatron.checkpoint import consolidate as c

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

def consolidate(name):
    c.consolidate(c.find_verified_checkpoint(Path(name)), name + "/out", c.ConsolidateOptions())

consolidate("small")  # imports that happen at first use
before = peak()
consolidate("large")
ours = peak() - before
everything = load_file("large/out/model.safetensors")
sum(t.sum() for t in everything.values())
print(ours, peak() - before)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """There are 24 tensors of 8 MB; loading all 192 MB is seen by the same measurement."""
    tensors = {f"layers.{i}.weight": torch.full((2_000_000,), float(i)) for i in range(24)}
    handmade.checkpoint(tmp_path / "large", tensors, 4, moments=False)
    handmade.checkpoint(tmp_path / "small", {"a": torch.zeros(4)}, 2, moments=False)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path,
        timeout=200,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(handmade.REPO)},
    )
    assert done.returncode == 0, done.stderr
    ours, everything = map(int, done.stdout.split())
    assert everything > 150e6 and ours < 24e6, (
        f"{ours / 1e6:.1f} MB, everything {everything / 1e6:.1f} MB"
    )


def test_program_passes_over_corrupt_checkpoint(several, tmp_path):
    handmade.damage(several / "iter_0000004/rank_00000.safetensors")
    flags = ("--dtype", "bfloat16", "--optimizer", "--max-shard-size", "1KB")
    done = handmade.run(TOOL, several, tmp_path / "out", *flags)
    assert done.stdout.startswith(
        f"{several}/iter_0000005 -> {tmp_path}/out: 1 tensors in bfloat16, "
    )
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(
        f"{TOOL}: warning: {several}/iter_0000004/rank_00000.safetensors is corrupt"
    )
    assert warning.endswith("; not used")
    check_equal(contents(tmp_path / "out"), {"a": torch.full((9,), 5.0).bfloat16()})
    handmade.run(TOOL, several, tmp_path / "two", "--load-step", "2")
    check_equal(contents(tmp_path / "two"), {"a": torch.full((9,), 2.0)})


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["save", "save"], "save exists; allowed: a new or an empty directory"),
        (["save", "out", "--load-step", "-1"], "--load-step is -1; allowed: 0 or more"),
        (["save", "out", "--load-step", "9"], "save has no valid checkpoint of iteration 9"),
        (["save", "out", "--max-shard-size", "big"], "--max-shard-size is 'big'"),
        (["nothing", "out"], "nothing is not a directory"),
    ],
)
def test_user_errors_are_one_line(arguments, reason, several, tmp_path):
    done = handmade.run(TOOL, *arguments, code=2, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{TOOL}: error: ") and reason in line and done.stdout == ""
    assert os.listdir(tmp_path) == ["save"]


def test_full_disk_while_writing(tmp_path):
    handmade.checkpoint(tmp_path / "save", {"a": torch.zeros(300_000)})
    done = handmade.program(
        TOOL,
        "save",
        "out",
        cwd=tmp_path,
        before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
    )
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 2
        and "folder/model.safetensors cannot be written: File too large. Raise the" in line
    )
    assert os.listdir(tmp_path) == ["save"]


def test_tool_needs_no_deepspeed(several, tmp_path):
    done = handmade.program(
        TOOL, "save", "out", cwd=tmp_path, before="sys.modules['deepspeed'] = None"
    )
    assert done.returncode == 0 and (tmp_path / "out/model.safetensors").exists(), done.stderr
