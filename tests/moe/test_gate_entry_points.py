"""Entry points of the group moe_megatron.gates: gates of installed packages."""

import logging
import sys
from pathlib import Path

import pytest

from helpers.outside_gates import restored_registry, write_gate
from megatron.moe import create_gate
from megatron.moe.gate import available_gates, gate_class
from megatron.moe.gate_registry import REGISTRY, gate_origin, import_gate_files


def install(folder: Path, distribution: str, *entry_points: str) -> None:
    """Write the metadata of an installed distribution, version 1.5."""
    metadata = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n"
    )
    lines = "\n".join(entry_points)
    (metadata / "entry_points.txt").write_text(f"[moe_megatron.gates]\n{lines}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a folder on sys.path whose modules are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    with restored_registry():
        yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith("outside_"):
            del sys.modules[name]


@pytest.fixture
def messages(caplog, monkeypatch):
    """Import installed gates as a new process does, and return the log lines."""

    def import_installed():
        logger = logging.getLogger("megatron")
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "handlers", [])  # other tests may have left caplog's
        REGISTRY._has_imported_installed = False
        caplog.clear()
        REGISTRY.import_installed()
        return caplog.messages

    return import_installed


def test_installed_gate_is_available(site, messages):
    write_gate(site, "outside_a", file="outside_pkg/gate.py")
    (site / "outside_pkg/__init__.py").write_text("")
    install(site, "outside-demo", "outside_a = outside_pkg.gate")
    assert messages() == []
    assert "outside_a" in available_gates()
    assert create_gate("outside_a", hidden_size=4, num_experts=2, shift=1).config.shift == 1
    origin = gate_origin("outside_a")
    assert (origin.kind, origin.package) == ("package", "outside-demo 1.5")
    assert origin.path == str(site / "outside_pkg/gate.py")


def test_hash_is_that_of_the_file(site, messages):
    """In a package and alone, unless other modules of the package have code."""
    path = write_gate(site, "outside_a", file="outside_pkg/gate.py")
    (site / "outside_pkg/__init__.py").write_text("")
    install(site, "outside-demo", "outside_a = outside_pkg.gate")
    messages()
    hashed = gate_origin("outside_a").sha256
    REGISTRY.remove("outside_a")
    import_gate_files([str(path)])
    assert gate_origin("outside_a").sha256 == hashed


def test_two_entry_points_of_one_module(site, messages):
    write_gate(site, "outside_a", file="outside_mod.py")
    text = write_gate(site, "outside_b", file="outside_b.py").read_text()
    with open(site / "outside_mod.py", "a") as file:
        file.write(text.replace("OutsideGate", "OtherGate"))
    install(
        site,
        "outside-demo",
        "a = outside_mod:OutsideGate",
        "b = outside_mod:OtherGate",
        "c = sys",
    )
    (warning,) = messages()
    assert "entry point 'c'" in warning and "sys registers no gate; it is skipped" in warning
    assert {"outside_a", "outside_b"} <= set(available_gates())
    assert gate_origin("outside_b").package == "outside-demo 1.5"


@pytest.mark.parametrize("backport", [False, True])
def test_failing_entry_point_is_skipped(backport, site, messages):
    """Other gates work; a run that sets exactly this one gets the reason."""
    if backport:  # its import replaces Python's finder in this process
        pytest.importorskip("importlib_metadata")
    write_gate(site, "outside_a", file="outside_good.py")
    (site / "outside_bad.py").write_text("import nowhere_42\n")
    install(site, "outside-bad", "outside_b = outside_bad", "outside_c = outside_missing")
    install(site, "outside-demo", "outside_a = outside_good")
    what = "the entry point 'outside_b' of the package outside-bad 1.5 cannot be imported: "
    where = f"{site}/outside_bad.py:1 in <module>"
    reason = f"ModuleNotFoundError: No module named 'nowhere_42' ({where})"
    first, second = messages()
    assert first == f"{what}{reason}; it is skipped"
    assert "'outside_c'" in second and "No module named 'outside_missing'; it is" in second
    assert "outside_a" in available_gates() and "outside_b" not in available_gates()
    with pytest.raises(ValueError) as error:
        gate_class("outside_b")
    assert str(error.value) == f"--gate is 'outside_b', but {what}{reason}"


def test_failure_after_registration_leaves_nothing(site, messages):
    path = write_gate(site, "outside_a", file="outside_half.py")
    path.write_text(path.read_text() + "\nraise SystemExit(1)\n")
    install(site, "outside-demo", "outside_x = outside_half")
    (warning,) = messages()
    assert "SystemExit: 1" in warning and "outside_a" not in available_gates()


def test_taken_name_is_refused_when_set(site, messages):
    """The warning and the error of a run with that gate name both origins."""
    write_gate(site, "topk", file="outside_topk.py")
    install(site, "outside-demo", "outside_x = outside_topk")
    (warning,) = messages()
    assert f"two gates have the name 'topk': the built-in {gate_origin_path('topk')}" in warning
    assert f"and {site}/outside_topk.py of the package outside-demo 1.5; rename" in warning
    assert "topk" not in available_gates() and "threshold" in available_gates()
    with pytest.raises(
        ValueError, match="^--gate is 'topk', but the entry point 'outside_x' of"
    ):
        gate_class("topk")


def gate_origin_path(name):
    return REGISTRY.origins[name].path


def test_file_must_not_take_an_installed_name(site, messages, tmp_path):
    installed = write_gate(site, "outside_a", file="outside_mod.py")
    install(site, "outside-demo", "outside_a = outside_mod")
    messages()
    path = write_gate(tmp_path / "new", "outside_a")
    with pytest.raises(ValueError) as error:
        import_gate_files([str(path)])
    assert str(error.value) == (
        f"two gates have the name 'outside_a': {installed} of the package outside-demo 1.5, and "
        f"{path}; rename one"
    )
