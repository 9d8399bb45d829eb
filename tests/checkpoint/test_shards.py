"""Format on the disk: writer against the safetensors package, reader against full tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron.checkpoint.manifest import CorruptCheckpointError, write_manifest
from megatron.checkpoint.shards import (
    CheckpointReader,
    ShardRange,
    make_index,
    rank_file_name,
    write_tensors,
)
from megatron.io.safetensors_writer import (
    SAFETENSORS_DTYPES,
    SafetensorsWriter,
    TensorSpec,
    in_file_order,
    read_header,
)
from megatron.io.sha256 import FileDigest

REPO = Path(__file__).resolve().parents[2]
SHAPES = [(), (1,), (5,), (0,), (3, 0, 2), (3, 5), (2, 3, 4)]


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return random bits of a dtype; of bool, random values."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=g).to(
        torch.uint8
    )
    return raw.view(dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


def write(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> FileDigest:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    return write_tensors(path, specs, tensors.__getitem__, metadata)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit by bit, including NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and (
            a.numel() == 0
            or torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
        )
    )


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_package_reads_every_dtype(dtype, tmp_path):
    tensors = {f"a/{i} é": values(dtype, shape, i) for i, shape in enumerate(SHAPES)}
    write(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name


@pytest.mark.parametrize("more", range(8))
def test_file_is_aligned_with_metadata(more, tmp_path):
    """The alignment does not depend on the length of the header."""
    tensors = {
        f"{dtype}{'x' * more if i else ''}": values(dtype, (3,), i)
        for i, dtype in enumerate(reversed(SAFETENSORS_DTYPES))
    }
    nbytes, sha256 = write(tmp_path / "x", tensors, {"format": "pt", "what": "ü"})
    assert all(same_bits(t, tensors[name]) for name, t in load_file(tmp_path / "x").items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": "ü"}
    content = (tmp_path / "x").read_bytes()
    assert (nbytes, sha256) == (len(content), hashlib.sha256(content).hexdigest())
    header, data = read_header(tmp_path / "x")
    assert header.keys() == tensors.keys() and data % 8 == 0
    for name, entry in header.items():
        assert (data + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_file_without_tensors_is_readable(tmp_path):
    write(tmp_path / "x", {})
    assert load_file(tmp_path / "x") == {}


def test_header_of_package_is_readable(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    header, data = read_header(tmp_path / "x")
    assert {name: (e["dtype"], e["shape"]) for name, e in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("I64", [3]),
    }
    start, end = header["a"]["data_offsets"]
    assert (tmp_path / "x").read_bytes()[data + start : data + end] == tensors[
        "a"
    ].numpy().tobytes()


def test_tensors_may_be_strided_views(tmp_path):
    base = torch.arange(60.0).view(3, 4, 5)
    tensors = {
        "t": base.permute(2, 0, 1),
        "s": base[:, ::2, 1:],
        "g": torch.ones(3, requires_grad=True),
        "e": torch.ones(1).expand(7),
    }
    write(tmp_path / "x", tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "x").items())


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(list(SAFETENSORS_DTYPES)),
)
def test_tensor_may_be_written_in_parts(data, shape, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tensor = values(dtype, tuple(shape))
    cuts = [
        0,
        *sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=5))),
        tensor.numel(),
    ]
    spec = TensorSpec("a", dtype, tuple(shape))
    with SafetensorsWriter(folder / "parts", [spec]) as writer:
        writer.write_parts(tensor.flatten()[low:high] for low, high in zip(cuts, cuts[1:]))
        digest = writer.finish()
    assert digest == write(folder / "full", {"a": tensor})
    assert (folder / "parts").read_bytes() == (folder / "full").read_bytes()


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(3, 2), r"a tensor of shape \(3, 2\) does not match"),
        (torch.zeros(2, 3).double(), "torch.float64 does not match"),
    ],
)
def test_tensor_must_match_its_spec(tensor, message, tmp_path):
    spec = TensorSpec("a", torch.float32, (2, 3))
    with (
        SafetensorsWriter(tmp_path / "x", [spec]) as writer,
        pytest.raises(AssertionError, match=message),
    ):
        writer.write(tensor)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([torch.zeros(4), torch.zeros(3)], "a part of 3 elements .* does not match"),
        ([torch.zeros(4)], "2 elements of .* are missing"),
    ],
)
def test_parts_must_match_their_spec(parts, message, tmp_path):
    spec = TensorSpec("a", torch.float32, (2, 3))
    with (
        SafetensorsWriter(tmp_path / "x", [spec]) as writer,
        pytest.raises(AssertionError, match=message),
    ):
        writer.write_parts(parts)


def test_all_announced_tensors_must_be_written(tmp_path):
    spec = TensorSpec("a", torch.float32, (2, 3))
    with SafetensorsWriter(tmp_path / "x", [spec, TensorSpec("b", torch.int8, ())]) as writer:
        writer.write(torch.zeros(2, 3))
        with pytest.raises(AssertionError, match="1 announced tensors are missing"):
            writer.finish()
    with pytest.raises(AssertionError, match="two tensors have the name a"):
        SafetensorsWriter(tmp_path / "x", [spec, spec], {"format": "pt"})


def test_wide_dtypes_come_first():
    specs = [
        TensorSpec(str(i), dtype, ())
        for i, dtype in enumerate(
            [torch.int8, torch.float32, torch.int8, torch.float64, torch.bfloat16, torch.int32]
        )
    ]
    assert [e.name for e in in_file_order(specs)] == ["3", "1", "5", "4", "0", "2"]


# The reader


def store_shards(
    folder: Path, tensors: dict[str, torch.Tensor], shards: list[list[ShardRange]]
) -> CheckpointReader:
    """Write the rank files and the index of a checkpoint of fp32 weights."""
    for rank, owned in enumerate(shards):
        write(
            folder / rank_file_name(rank),
            {
                f"weight/{name}": tensors[name].flatten()[start : start + length]
                for name, start, length in owned
            },
        )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return with_index(folder, make_index(shards, shapes, ["weight"], []))


def with_index(folder: Path, index: dict) -> CheckpointReader:
    """Write the index and a manifest of the files of a checkpoint."""
    (folder / "index.json").write_text(json.dumps(index))
    files = dict.fromkeys(("run.json", "state.json", "index.json"), FileDigest(0, ""))
    files |= {path.name: FileDigest(0, "") for path in folder.glob("rank_*")}
    write_manifest(folder, 1, 1, files)
    return CheckpointReader(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_any_partition(data, tmp_path_factory):
    """Ranks may hold the shards of a tensor in any order, several of them, or none."""
    ranks = data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    tensors = {}
    shards = [[] for _ in range(ranks)]
    for i in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
        name, tensor = f"t{i}.weight", values(dtype, shape, i)
        tensors[name] = tensor
        cuts = sorted(
            {
                0,
                tensor.numel(),
                *data.draw(st.lists(st.integers(0, tensor.numel()), max_size=ranks - 1)),
            }
        )
        owners = data.draw(st.permutations(range(ranks)))
        for rank, low, high in zip(owners, cuts, cuts[1:]):
            shards[rank].append(ShardRange(name, low, high - low))
    reader = store_shards(tmp_path_factory.mktemp("shards"), tensors, shards)
    for name, tensor in tensors.items():
        assert reader.shapes[name] == tensor.shape
        assert reader.num_shards(name) == sum(s.name == name for owned in shards for s in owned)
        if not tensor.numel():
            assert reader.dtype("weight", name) == torch.float32 and reader.read(
                "weight", name
            ).shape == (0,)
            continue
        assert reader.dtype("weight", name) == dtype
        assert same_bits(reader.read("weight", name), tensor.flatten())
        start = data.draw(st.integers(0, tensor.numel()))
        length = data.draw(st.integers(0, tensor.numel() - start))
        found = reader.read("weight", name, start, length)
        assert found.shape == (length,)
        assert same_bits(found, tensor.flatten()[start : start + length]) or not length


def test_range_outside_is_refused(tmp_path):
    shards = [[ShardRange("a", 0, 4)], [ShardRange("a", 4, 2)]]
    reader = store_shards(tmp_path, {"a": torch.arange(6.0)}, shards)
    assert reader.read("weight", "a", 3).tolist() == [3, 4, 5]
    for start, length in ((-1, 2), (5, 2), (7, 0)):
        with pytest.raises(AssertionError, match="a has 6 elements"):
            reader.read("weight", "a", start, length)


def test_buffers_and_random_states_are_read(tmp_path):
    buffers = {
        "b": values(torch.int64, (2, 2)),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
    }
    write(
        tmp_path / rank_file_name(0),
        {
            **{f"buffer/{n}": t for n, t in buffers.items()},
            "rng/cpu": torch.arange(9, dtype=torch.uint8),
        },
    )
    write(
        tmp_path / rank_file_name(1),
        {
            "rng/cpu": torch.ones(3, dtype=torch.uint8),
            "rng/cuda": torch.zeros(2, dtype=torch.uint8),
        },
    )
    reader = with_index(tmp_path, make_index([[], []], {}, ["weight"], list(buffers)))
    for name, tensor in buffers.items():
        assert same_bits(reader.buffer(name), tensor)
        assert reader.buffer_spec(name) == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
    assert {d: t.tolist() for d, t in reader.rng(1).items()} == {
        "cpu": [1, 1, 1],
        "cuda": [0, 0],
    }
    assert reader.rng(0)["cpu"].tolist() == list(range(9))


def test_read_tensors_are_not_mapped(tmp_path):
    """A mapped file could change later, or end the process with SIGBUS when it shrinks."""
    reader = store_shards(tmp_path, {"a": torch.arange(6.0)}, [[ShardRange("a", 0, 6)]])
    found = reader.read("weight", "a")
    found += 1
    assert reader.read("weight", "a").tolist() == list(range(6))
    with open(tmp_path / rank_file_name(0), "r+b") as file:
        file.truncate(100)
    assert found.tolist() == [1, 2, 3, 4, 5, 6]


def test_truncated_file_is_named(tmp_path):
    reader = store_shards(tmp_path, {"a": torch.arange(6.0)}, [[ShardRange("a", 0, 6)]])
    path = tmp_path / rank_file_name(0)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert reader.read("weight", "a", 0, 5).tolist() == list(range(5))
    with pytest.raises(
        OSError, match=r"rank_00000\.safetensors ends inside weight/a: it is damaged"
    ):
        reader.read("weight", "a", 1)


@pytest.mark.parametrize(
    "shards, message",
    [
        ([[("a", 0, 4)], [("a", 3, 3)]], "of a overlap or leave a gap at element 4"),
        ([[("a", 0, 2)], [("a", 3, 3)]], "of a overlap or leave a gap at element 2"),
        ([[("a", 1, 5)]], "of a overlap or leave a gap at element 0"),
        ([[("a", 0, 3)], []], r"the ranks have 3 elements of a, \[2, 3\]"),
        ([[("a", 0, 3)], [("a", 3, 4)]], r"the ranks have 7 elements of a, \[2, 3\]"),
        ([[], []], r"the ranks have 0 elements of a, \[2, 3\]"),
    ],
)
def test_index_requires_a_partition(shards, message):
    with pytest.raises(AssertionError, match=message):
        make_index(shards, {"a": (2, 3)}, ["weight"], [])


# Full disks


def test_full_disk_is_named():
    spec = TensorSpec("a", torch.float32, (1000,))
    with pytest.raises(
        OSError,
        match=r"^/dev/full cannot be written: No space left on device\. Free some space",
    ):
        write_tensors("/dev/full", [spec], lambda name: torch.zeros(1000))


def test_file_size_limit_is_named(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from megatron.checkpoint.shards import TensorSpec, write_tensors\n"
        "specs = [TensorSpec('a', torch.float32, (50_000,))]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "for path in ('x', 'none/x'):\n"
        "    try: write_tensors(path, specs, lambda name: torch.zeros(50_000))\n"
        "    except OSError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
        env={"PYTHONPATH": str(REPO)},
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(
        "x cannot be written: File too large. Raise the limit of file sizes (ulimit -f)"
    )
    assert "No such file or directory: 'none/x'" in second


def test_finished_file_is_synced(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: synced.append(os.fstat(descriptor).st_ino) or sync(descriptor),
    )
    write(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert os.stat(tmp_path / "x.safetensors").st_ino in synced


def header_of(text: str, encoding: str = "utf-8") -> bytes:
    """Return a safetensors file that ends after its header."""
    raw = text.encode(encoding)
    return len(raw).to_bytes(8, "little") + raw


@pytest.mark.parametrize(
    "content, problem",
    [
        ((2**62).to_bytes(8, "little") + b"{}", "its header is longer than the file"),
        (b"\x02\x00\x00", "it has 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (header_of("{,"), "its header is not JSON: Expecting property name"),
        (header_of("\xff", "latin-1"), "its header is not JSON: 'utf-8' codec"),
        (header_of("[" * 500 + "]" * 500), "its header is not JSON: it is nested deeper"),
        (header_of("[]"), "its header is not a JSON object"),
    ],
)
def test_incomplete_header_is_refused(content, problem, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.safetensors is not a safetensors file: {problem}"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 2**65]},
    ],
)
def test_malformed_header_entry_names_tensor(entry, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(header_of(json.dumps({"weight/a": entry})))
    with pytest.raises(ValueError, match=r"x\.safetensors .* entry of tensor 'weight/a' is"):
        read_header(tmp_path / "x.safetensors")


def test_tensors_that_index_promises_are_required(tmp_path):
    """Each of them is missing from the file, or is other than the index says."""
    index = make_index([[ShardRange("a", 0, 6)]], {"a": (6,)}, ["weight", "exp_avg"], ["b"])
    stored = {"weight/a": torch.ones(6, dtype=torch.int64), "exp_avg/a": torch.ones(5)}
    write(tmp_path / rank_file_name(0), {**stored, "rng/cpu": torch.ones(3)})
    reader = with_index(tmp_path, index)
    for read, message in (
        (
            lambda: reader.read("weight", "a"),
            "weight/a has the dtype torch.int64; allowed: flo",
        ),
        (
            lambda: reader.read("exp_avg", "a"),
            r"'exp_avg/a' has the shape \[5\], but index.json",
        ),
        (lambda: reader.buffer("b"), "rank_00000.safetensors has no tensor 'buffer/b'"),
        (
            lambda: reader.rng(0),
            r"rng/cpu has the shape \[3\] of torch.float32; allowed: bytes",
        ),
        (lambda: reader.rng(1), "manifest.json does not name rank_00001.safetensors"),
    ):
        with pytest.raises(CorruptCheckpointError, match=message):
            read()
    (tmp_path / rank_file_name(0)).write_bytes(header_of("{,"))
    with pytest.raises(CorruptCheckpointError, match="rank_00000.* header is not JSON"):
        with_index(tmp_path, index).read("weight", "a")


def test_file_outside_manifest_is_not_read(tmp_path):
    """Its content was not verified."""
    tensors = {"a": torch.arange(6.0)}
    store_shards(tmp_path, tensors, [[ShardRange("a", 0, 3)], [ShardRange("a", 3, 3)]])
    files = dict.fromkeys(("run.json", "state.json", "index.json"), FileDigest(0, ""))
    write_manifest(tmp_path, 1, 1, files | {rank_file_name(0): FileDigest(0, "")})
    reader = CheckpointReader(tmp_path)
    assert reader.read("weight", "a", 0, 3).tolist() == [0, 1, 2]
    with pytest.raises(CorruptCheckpointError, match="does not name rank_00001.safetensors"):
        reader.read("weight", "a")
