"""The registry of gates: built-in ones, those of installed packages, and those of files.

A gate registers itself when its module is imported. Modules come from three places, in
this order: `megatron/moe/gates/`; entry points of the group `moe_megatron.gates`, with
which an installed package names its modules; and files or package folders that the user
names with --gate-path. A path that a checkpoint or a run.json holds is never imported.
Packages and files may bring expert types, too (`megatron.moe.experts.expert_registry`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from megatron.config.gate_layers import DENSE, GATE_NAME
from megatron.config.gate_path import resolve_gate_paths
from megatron.config.option_class import check_option_class
from megatron.log import warn_on_rank0
from megatron.moe import gates
from megatron.moe.experts import types as types_of_experts
from megatron.moe.experts.expert_registry import EXPERT_TYPES, qualified_name

ENTRY_POINT_GROUP = "moe_megatron.gates"
_IMPORTERS = (str(Path(__file__)), str(Path(importlib.__file__).parent), "<frozen ")
"""Beginnings of the file names of Python's importer and of this one"""
_ENTRY_POINT_BACKPORT = "importlib_metadata"
"""Package whose import replaces Python's finder of entry points, as some libraries make it do"""
_FILE_MODULES = "moe_megatron_gates_"
"""Beginning of the module names of files of --gate-path"""
_MOST_FRAMES = 3
"""Frames of a traceback that an error message shows"""


class _NameTakenError(ValueError):
    """Two gates have one name; the message names both origins."""

    def __init__(self, name: str, known: GateOrigin, new: GateOrigin):
        super().__init__(f"two gates have the name {name!r}: {known}, and {new}; rename one")
        self.name = name


@dataclass(frozen=True)
class GateOrigin:
    """Where the code of a gate comes from; recorded in checkpoints."""

    kind: str
    """built-in, package (of an entry point), file (of --gate-path), or module (imported by
    a program of the user)"""
    path: str = ""
    """the file that defines the class; empty if there is none, as in a Python session"""
    package: str = ""
    """name and version of the distribution with the entry point"""
    sha256: str = ""
    """of the file, and of the other files that belong to the gate; see `_hash_of`"""

    def __str__(self) -> str:
        where = self.path or "a Python session"
        if self.kind == "built-in":
            return f"the built-in {where}"
        if self.package:
            return f"{where} of the package {self.package}"
        return where


class GateRegistry:
    """Classes of gates by name, with their origins."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}
        self.origins: dict[str, GateOrigin] = {}
        self.failures: dict[str, str] = {}
        """by entry point, why it was skipped"""
        self.conflicts: dict[str, str] = {}
        """by name of a gate, which entry point has another gate of that name"""
        self._files: dict[str, tuple[str, ...]] = {}
        """by imported path, the names of its gates"""
        self._source = GateOrigin("module")
        """kind and package of the gates that are being imported"""
        self._has_imported_installed = False

    def register(self, name: str, cls: type) -> None:
        """Add a class; a later definition of the same class replaces it.

        Raises:
            ValueError: another gate has the name, or no flag can begin with it.
        """
        if name == DENSE or not GATE_NAME.fullmatch(name):
            raise ValueError(
                f"gate name {name!r} of {qualified_name(cls)}; allowed: letters, digits, _ and "
                f"-, but not {DENSE!r}, which --gate uses for dense layers"
            )
        origin = dataclasses.replace(self._source, path=_source_file(cls))
        if cls.__module__.startswith(f"{gates.__name__}."):
            origin = dataclasses.replace(origin, kind="built-in")
        known = self.classes.get(name)
        if known is not None and qualified_name(known) != qualified_name(cls):
            raise _NameTakenError(name, self.origins[name], origin)
        self.classes[name] = cls
        self.origins[name] = dataclasses.replace(origin, sha256=_hash_of(cls, origin.kind))

    def remove(self, name: str) -> None:
        """Forget a gate, so that another may take its name."""
        del self.classes[name]
        del self.origins[name]

    def import_installed(self) -> None:
        """Import built-in gates and those of installed packages, once.

        An entry point that fails is skipped with a warning: another gate may be used.
        """
        if self._has_imported_installed:
            return
        self._has_imported_installed = True
        for module in pkgutil.iter_modules(gates.__path__):
            importlib.import_module(f"{gates.__name__}.{module.name}")
        found = {(point.name, point.value): point for point in _entry_points()}
        for _, point in sorted(found.items()):
            self._import_entry_point(point)

    def import_file(self, path: str) -> tuple[str, ...]:
        """Import a file or package folder, once, and return the names of its gates.

        It may register expert types (`megatron.moe.experts.expert_type`) as well, or only.

        Args:
            path: absolute.
        Raises:
            ValueError: it cannot be imported, registers nothing, or a gate whose name is
                taken or whose Config is wrong.
        """
        self.import_installed()
        if path in self._files:
            return self._files[path]
        file = Path(path)
        before = set(self.classes)
        expert_types = dict(EXPERT_TYPES.classes)
        with self._importing(GateOrigin("file")):
            try:
                _execute_file(file)
                names = tuple(name for name in self.classes if name not in before)
                self._finish(names)
            except _NameTakenError:
                raise
            except (Exception, SystemExit) as error:
                folder = file if file.is_dir() else file.parent
                raise ValueError(
                    f"--gate-path {path} cannot be imported: {type(error).__name__}: {error}"
                    f"{_own_frames(error, folder)}{_absolute_import_advice(error, folder)}"
                ) from None
        if not names and EXPERT_TYPES.classes == expert_types:
            raise ValueError(
                f"--gate-path {path} registers no gate; define a subclass of "
                'megatron.moe.Gate with a name in it: class MyGate(Gate, name="my_gate")'
            )
        self._files[path] = names
        return names

    def available(self) -> list[str]:
        """Return the names of all gates that can be chosen, sorted."""
        self.import_installed()
        return sorted(self.classes.keys() - self.conflicts.keys())

    def find(self, name: str) -> type:
        """Return the class of a gate.

        Raises:
            ValueError: there is none, or more than one; the message says why.
        """
        self.import_installed()
        if name in self.conflicts:
            raise ValueError(f"--gate is {name!r}, but {self.conflicts[name]}")
        if name in self.classes:
            return self.classes[name]
        if name in self.failures:
            raise ValueError(f"--gate is {name!r}, but {self.failures[name]}")
        raise ValueError(
            f"--gate is {name!r}; allowed: {' '.join(self.available())}. A gate outside the "
            "tree needs --gate-path FILE.py, or its package installed"
        )

    @contextlib.contextmanager
    def _importing(self, source: GateOrigin) -> Iterator[None]:
        """Record the source of gates that register; after an error all of them are removed."""
        outer = self._source
        classes = dict(self.classes)
        origins = dict(self.origins)
        expert_types = dict(EXPERT_TYPES.classes)
        self._source = source
        try:
            yield
        except BaseException:
            self.classes = classes
            self.origins = origins
            EXPERT_TYPES.classes = expert_types
            raise
        finally:
            self._source = outer

    def _import_entry_point(self, point: EntryPoint) -> None:
        package = f"{point.dist.name} {point.dist.version}"
        what = f"the entry point {point.name!r} of the package {package}"
        before = set(self.classes)
        expert_types = dict(EXPERT_TYPES.classes)
        try:
            with self._importing(GateOrigin("package", package=package)):
                point.load()
                names = []
                for name, cls in self.classes.items():
                    # The module may have been imported before, as by a second entry point.
                    is_of_module = f"{cls.__module__}.".startswith(f"{point.module}.")
                    if name not in before or is_of_module:
                        names.append(name)
                if not names and EXPERT_TYPES.classes == expert_types:
                    raise ValueError(f"{point.value} registers no gate")
                self._finish(names, package)
        except _NameTakenError as error:
            self.conflicts[error.name] = f"{what} is skipped: {error}"
            warn_on_rank0("%s", self.conflicts[error.name])
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}{_own_frames(error)}"
            self.failures[point.name] = f"{what} cannot be imported: {reason}"
            warn_on_rank0("%s; it is skipped", self.failures[point.name])

    def _finish(self, names: Iterable[str], package: str = "") -> None:
        """Check the options of imported gates, and hash all files that belong to them.

        Raises:
            ValueError: an option cannot be a flag.
        """
        for name in names:
            cls = self.classes[name]
            check_option_class(cls.Config, f"gate {name!r}", "gate_options")
            kind = "package" if package else self.origins[name].kind
            self.origins[name] = GateOrigin(
                kind, self.origins[name].path, package, _hash_of(cls, kind)
            )


REGISTRY = GateRegistry()
"""The gates of this process"""


def import_gate_files(paths: Iterable[str]) -> None:
    """Import the files and package folders of --gate-path; each registers its gates.

    Raises:
        ValueError: one does not exist, or as `GateRegistry.import_file`.
    """
    for path in resolve_gate_paths(paths):
        REGISTRY.import_file(path)


def gate_origin(name: str) -> GateOrigin:
    """Return where the code of a registered gate comes from."""
    REGISTRY.find(name)
    return REGISTRY.origins[name]


def expert_type_origin(name: str) -> GateOrigin:
    """Return where the code of an expert type comes from.

    A type of an installed package counts as a module; its hash includes the package's others.
    """
    cls = EXPERT_TYPES.find(name)
    if cls.__module__.startswith(f"{types_of_experts.__name__}."):
        return GateOrigin("built-in", _source_file(cls), "", _hash_of(cls, "built-in"))
    if cls.__module__.startswith(_FILE_MODULES):
        return GateOrigin("file", _source_file(cls), "", _hash_of(cls, "file"))
    return GateOrigin("module", _source_file(cls), "", _hash_of(cls, "package"))


def _entry_points() -> Iterable[EntryPoint]:
    return entry_points(group=ENTRY_POINT_GROUP)


def _execute_file(path: Path) -> None:
    """Execute a file, or the __init__.py of a folder, as a module of a unique name.

    A file becomes the only module of a package of its own whose folder is the file's:
    `from .neighbour import x` finds the files next to it, and two files of one name do
    not replace each other. A folder becomes a package.
    """
    unique = f"{_FILE_MODULES}{sha256(str(path).encode()).hexdigest()[:12]}"
    if path.is_dir():
        _execute(unique, path / "__init__.py", [str(path)])
        return
    package = types.ModuleType(unique)
    package.__path__ = [str(path.parent)]
    sys.modules[unique] = package
    _execute(f"{unique}.{path.stem.replace('.', '_')}", path, None)


def _execute(name: str, file: Path, folders: list[str] | None) -> None:
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=folders
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    spec.loader.exec_module(module)


def _own_frames(error: BaseException, folder: Path | None = None) -> str:
    """Return the lines of a gate's own code that an error passed, as ` (file:line in name)`.

    Args:
        folder: the gate's, which may hold this program, too; None: all but the importer is
            its own code, and that of libraries is at the end, which is cut.
    """
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        is_own = not frame.filename.startswith(_IMPORTERS)
        is_own = is_own and Path(frame.filename).parent.name != _ENTRY_POINT_BACKPORT
        if folder is not None:
            is_own = is_own and Path(frame.filename).is_relative_to(folder)
        if is_own:
            frames.append(f"{frame.filename}:{frame.lineno} in {frame.name}")
    if not frames:
        return ""
    shown = frames[:_MOST_FRAMES] if folder is None else frames[-_MOST_FRAMES:]
    return f" ({' > '.join(shown)})"


def _absolute_import_advice(error: BaseException, folder: Path) -> str:
    """Return how a file next to the gate's is imported, if that was the error, or ""."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    name = error.name.partition(".")[0]
    if not (folder / f"{name}.py").is_file() and not (folder / name).is_dir():
        return ""
    return f". A file next to it is imported with 'from .{name} import ...'"


def _source_file(cls: type) -> str:
    try:
        return str(Path(inspect.getsourcefile(cls)).resolve())
    except (TypeError, OSError):
        return ""


def _hash_of(cls: type, kind: str) -> str:
    """Return the SHA-256 of a gate's code, "" if it is in no file.

    That is the hash of the file that defines the class. If other modules of its package
    have been imported, they belong to a gate of a --gate-path or of an installed package:
    then it is the hash of the names and hashes of all these files. Empty ones do not
    count, so that the same file has one hash in a package and alone.
    """
    package = ""
    if kind == "file":
        package = cls.__module__.partition(".")[0]
    elif kind == "package":
        package = sys.modules[cls.__module__].__package__
    paths = {_source_file(cls)}
    if package:
        for name, module in list(sys.modules.items()):
            if f"{name}.".startswith(f"{package}."):
                paths.add(getattr(module, "__file__", None) or "")
    hashes = {}
    for path in sorted(map(Path, paths - {""})):
        if path.is_file() and path.stat().st_size:
            hashes[path] = sha256(path.read_bytes()).hexdigest()
    if len(hashes) <= 1:
        return "".join(hashes.values())
    lines = [f"{path.name} {hashed}\n" for path, hashed in hashes.items()]
    return sha256("".join(lines).encode()).hexdigest()
