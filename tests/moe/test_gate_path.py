"""--gate-path: files and package folders whose gates are imported before flags are parsed."""

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from helpers.outside_gates import restored_registry, write_gate
from megatron.config import cli
from megatron.config.run_json import read_run_json, write_run_json
from megatron.moe import create_gate, gate_registry
from megatron.moe.gate import available_gates, gate_class, gate_config_class
from megatron.moe.gate_registry import gate_origin, import_gate_files

REPO = Path(__file__).resolve().parents[2]
EXPERTS = ("--num-experts", "4")


@pytest.fixture(autouse=True)
def registry():
    with restored_registry():
        yield


def parse(*words):
    argv = [*EXPERTS, *map(str, words)]
    return cli.parse(argv, gate_config_class, available_gates, import_gate_files)


def test_options_of_a_file_are_flags(tmp_path):
    path = write_gate(tmp_path, "outside_a")
    config = parse("--gate-path", path, "--gate", "outside_a", "--shift", "3")
    assert config.gate_options["outside_a"]["shift"] == 3
    assert config.moe.gate_path == (str(path),)
    assert "outside_a" in available_gates()
    gate = create_gate("outside_a", hidden_size=4, num_experts=2, shift=1)
    assert gate.config.shift == 1


def test_relative_path_is_stored_absolute(tmp_path, monkeypatch):
    path = write_gate(tmp_path, "outside_a")
    monkeypatch.chdir(tmp_path)
    config = parse("--gate_path=outside_a.py", "--gate", "outside_a")
    assert config.moe.gate_path == (str(path),)


def test_several_files_are_imported_once(tmp_path, monkeypatch):
    """Words of one flag and repeated flags add up; two files may have one name."""
    line = "import helpers.outside_gates as h; h.count = getattr(h, 'count', 0) + 1\n"
    import helpers.outside_gates

    monkeypatch.setattr(helpers.outside_gates, "count", 0, raising=False)
    a = write_gate(tmp_path / "a", "outside_a", file="gate.py", before=line)
    b = write_gate(tmp_path / "b", "outside_b", file="gate.py", before=line)
    c = write_gate(tmp_path / "c", "outside_c", file="my-gate.v2.py", before=line)
    words = ("--gate-path", a, b, "--gate", "outside_b", "--gate-path", c, a)
    for _ in range(2):
        assert parse(*words).moe.gate_path == (str(a), str(b), str(c))
    assert {"outside_a", "outside_b", "outside_c"} <= set(available_gates())
    assert gate_class("outside_a").__module__ != gate_class("outside_b").__module__
    assert helpers.outside_gates.count == 3


def test_neighbours_are_imported_relatively(tmp_path):
    """A file imports files next to it with a dot, also when they have the names of modules."""
    (tmp_path / "random.py").write_text("SHIFT = 5\n")
    line = "from .random import SHIFT\nimport random; random.random()\n"
    path = write_gate(tmp_path, "outside_a", before=line)
    import_gate_files([str(path)])
    module = sys.modules[gate_class("outside_a").__module__]
    assert module.SHIFT == 5 and gate_origin("outside_a").path == str(path)


def test_package_folder_is_imported(tmp_path):
    write_gate(tmp_path / "package", "outside_a", file="first.py")
    write_gate(tmp_path / "package", "outside_b", file="second.py")
    (tmp_path / "package/__init__.py").write_text("from . import first, second\n")
    parse("--gate-path", tmp_path / "package", "--gate", "outside_b")
    assert {"outside_a", "outside_b"} <= set(available_gates())


def test_origin_names_kind_and_hash(tmp_path):
    path = write_gate(tmp_path, "outside_a")
    import_gate_files([str(path)])
    origin = gate_origin("outside_a")
    assert (origin.kind, origin.path, origin.package) == ("file", str(path), "")
    assert origin.sha256 == sha256(path.read_bytes()).hexdigest()
    built_in = gate_origin("topk")
    file = REPO / "megatron/moe/gates/topk.py"
    assert (built_in.kind, built_in.path) == ("built-in", str(file))
    assert built_in.sha256 == sha256(file.read_bytes()).hexdigest()


def test_hash_includes_imported_neighbours(tmp_path):
    """A change of a neighbour changes the hash, one of a file that is not imported does not."""
    hashes = []
    for i, (neighbour, other) in enumerate([("x = 1", ""), ("x = 1", "y"), ("x = 2", "y")]):
        folder = tmp_path / str(i)
        path = write_gate(folder, "outside_a", before="from .neighbour import x\n")
        (folder / "neighbour.py").write_text(neighbour)
        (folder / "other.py").write_text(other)
        with restored_registry():
            import_gate_files([str(path)])
            hashes.append(gate_origin("outside_a").sha256)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("import nowhere_42\n", r"ModuleNotFoundError: No module named 'nowhere_42' \({}:1 in"),
        ("\nx =\n", r"SyntaxError: invalid syntax \(gate.py, line 2\)$"),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            r"ZeroDivisionError: division by zero \({0}:4 in <module> > {0}:2 in f\)$",
        ),
        ("import json\njson.loads('[')\n", r"JSONDecodeError: .* \({}:2 in <module>\)$"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \({}:1 in <module>\)$"),
        ("from neighbour import x\n", r"next to it is imported with 'from .neighbour import"),
    ],
)
def test_failing_file_is_one_line(tmp_path, text, message):
    """The error has the path and the frames of the file, but not those of libraries."""
    path = tmp_path / "gate.py"
    path.write_text(text)
    (tmp_path / "neighbour.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=f"^--gate-path {path} cannot be imported: ") as error:
        parse("--gate-path", path)
    error.match(message.format(path))
    assert "\n" not in str(error.value) and "importlib" not in str(error.value)


def test_frames_of_the_importer_are_left_out(tmp_path):
    """The gate's folder may hold this program, as when the file lies next to pretrain_gpt.py."""
    path = tmp_path / "gate.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError) as error:
        gate_registry._execute_file(path)
    frames = gate_registry._own_frames(error.value, Path(path.anchor))
    assert f"{path}:1 in <module>" in frames and "gate_registry.py" not in frames


CLASS = "from dataclasses import dataclass\nfrom megatron.moe import Gate\n\n\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", r"gate.py registers no gate; define a subclass of megatron.moe.Gate"),
        (
            f'{CLASS}class A(Gate, name="topk"):\n    pass\n',
            r"two gates have the name 'topk': the built-in \S+/topk.py, and \S+/gate.py; rename",
        ),
        (
            f'{CLASS}class A(Gate, name="outside_a"):\n    Config = dict\n',
            "the Config of gate 'outside_a' is no dataclass",
        ),
        (
            f'{CLASS}class A(Gate, name="outside_a"):\n'
            "    @dataclass\n    class Config:\n        x: list = 0\n",
            "A.Config.x has the type <class 'list'>; a flag can be",
        ),
        (
            f'{CLASS}class A(Gate, name="outside_a"):\n'
            "    @dataclass\n    class Config:\n        x = 0.5\n",
            "Config of gate 'outside_a' has 'x' without a type, .* write x: float = 0.5",
        ),
        (
            f'{CLASS}from megatron.moe import LossConfig\n\n\nclass A(Gate, name="outside_a"):\n'
            "    class Config(LossConfig):\n        x: int = 0\n",
            "Config of gate 'outside_a' adds 'x', but is no dataclass; write @dataclass",
        ),
    ],
)
def test_unusable_gate_is_refused(tmp_path, text, message):
    """Nothing of a refused file stays registered."""
    before = available_gates()
    path = tmp_path / "gate.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--gate-path", path)
    assert available_gates() == before
    assert gate_origin("topk").kind == "built-in"


def test_config_may_have_constants(tmp_path):
    """Class variables, names in capitals and methods are no options."""
    path = tmp_path / "gate.py"
    path.write_text(
        f"from typing import ClassVar\n{CLASS}"
        'class A(Gate, name="outside_a"):\n    @dataclass\n    class Config:\n'
        "        MOST = 3\n        few: ClassVar[int] = 1\n        x: int = 2\n"
    )
    config = parse("--gate-path", path, "--gate", "outside_a")
    assert config.gate_options == {"outside_a": {"x": 2}}


def test_option_named_like_help_is_refused(tmp_path):
    path = tmp_path / "gate.py"
    path.write_text(
        f'{CLASS}class A(Gate, name="outside_a"):\n'
        "    @dataclass\n    class Config:\n        help: int = 0\n"
    )
    with pytest.raises(ValueError, match="the flag --help of gate_options.help is taken by"):
        parse("--gate-path", path, "--gate", "outside_a")


def test_two_files_with_one_gate_name(tmp_path):
    a = write_gate(tmp_path / "a", "outside_a")
    b = write_gate(tmp_path / "b", "outside_a")
    with pytest.raises(ValueError, match=f"the name 'outside_a': {a}, and {b}; rename one"):
        parse("--gate-path", a, b)


def test_file_may_bring_only_an_expert_type(tmp_path):
    from megatron.moe.experts import expert_type

    path = tmp_path / "experts.py"
    path.write_text(
        "from megatron.moe.experts.expert_type import ExpertType\n\n\n"
        'class MyExperts(ExpertType, name="outside_experts"):\n    pass\n'
    )
    import_gate_files([str(path)])
    assert "outside_experts" in expert_type.available_expert_types()


def test_gate_without_options_needs_no_config(tmp_path):
    path = tmp_path / "gate.py"
    path.write_text(f'{CLASS}class A(Gate, name="outside_a"):\n    pass\n')
    assert parse("--gate-path", path, "--gate", "outside_a").gate_options == {"outside_a": {}}


@pytest.mark.parametrize("name", ["missing.py", "folder", "gate.txt"])
def test_missing_file_is_refused_early(tmp_path, name):
    """Before torch is imported, as other mistakes."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "gate.txt").write_text("")
    code = (
        "import sys\nfrom megatron.config.cli import refuse_early\n"
        "try:\n    refuse_early(['--gate-path', sys.argv[1]])\n"
        "except ValueError as error:\n    print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=True,
    )
    assert done.stdout == (
        f"--gate-path is {str(tmp_path / name)!r}; allowed: an existing file that ends in .py, "
        "or a folder with __init__.py False\n"
    )


def test_program_without_gates_refuses_files(tmp_path):
    path = write_gate(tmp_path, "outside_a")
    with pytest.raises(
        ValueError, match="--gate-path is .* only in programs that import gates"
    ):
        cli.parse([*EXPERTS, "--gate-path", str(path)], gate_config_class, available_gates)


def test_path_of_run_json_is_not_imported(tmp_path):
    """A run.json may come from elsewhere: its path is named in the error, and given again."""
    path = write_gate(tmp_path, "outside_a")
    stored = tmp_path / "run.json"
    with restored_registry():
        write_run_json(parse("--gate-path", path, "--gate", "outside_a", "--shift", 2), stored)
    assert read_run_json(stored).moe.gate_path == (str(path),)
    with pytest.raises(ValueError) as error:
        parse("--config", stored)
    error.match("^--gate is 'outside_a'; allowed: base .*needs --gate-path FILE.py")
    error.match(
        f"The run of {stored} had --gate-path {path}; a path in a file is never imported"
    )
    assert "outside_a" not in available_gates()
    config = parse("--config", stored, "--gate", "topk")
    assert config.moe.gate_path == () and config.moe.gate == "topk"
    copy = write_gate(tmp_path / "copy", "outside_a")
    config = parse("--config", stored, "--gate-path", copy)
    assert config.gate_options["outside_a"]["shift"] == 2 and config.moe.gate_path == (
        str(copy),
    )


def test_flags_of_a_config_import_again(tmp_path):
    path = write_gate(tmp_path, "outside_a")
    config = parse("--gate-path", path, "--gate", "outside_a", "--shift", 2)
    words = cli.to_flags(config, gate_config_class)
    assert cli.parse(words, gate_config_class, available_gates, import_gate_files) == config


def test_dense_model_drops_the_path(tmp_path):
    path = write_gate(tmp_path, "outside_a")
    config = parse("--gate-path", path, "--num-experts", 0)
    assert config.moe.gate_path == ()
