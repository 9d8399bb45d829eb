"""YAML files whose errors name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config.fields import shortened
from megatron.io.untrusted import read_text_file
from megatron.optional_packages import import_optional

YamlPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file to a value"""

_LONGEST_FILE = 1 << 22  # bytes


class YamlFile:
    """The content of a YAML file, and the line of each of its values.

    Raises:
        ValueError: the file is not UTF-8 text, not YAML, names a key twice, or contains itself;
            or the package PyYAML is missing.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._lines: dict[YamlPath, int] = {}
        self._yaml = import_optional("yaml", "analysis", f"the study {path}")
        self.content = self._load(self._read())
        """mappings, lists and scalars of the file; None: it is empty"""

    def _read(self) -> str:
        try:
            return read_text_file(self.path, _LONGEST_FILE)
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is not UTF-8 text; allowed: a YAML file") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; allowed: a YAML file") from None

    def _load(self, text: str) -> Any:
        yaml = self._yaml
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if node is None:
                return None
            self._check_nodes(node, (), set())
            content = self._construct(loader, node)
            self._note_lines(loader, node, (), set())
            return content
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise ValueError(
                f"{self.path}:{mark.line + 1}: not YAML: {error.problem or error.context}"
            ) from None
        except yaml.YAMLError as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"{self.path}: not YAML: {first_line}") from None
        except RecursionError:
            raise ValueError(f"{self.path} is nested too deeply; allowed: a study") from None

    def require(
        self, ok: bool, path: YamlPath, value: Any, allowed: str, advice: str = ""
    ) -> None:
        """Raise ValueError about the value at `path` unless `ok`.

        The message has the form of `megatron.config.fields.require`, after the file and line.
        """
        if ok:
            return
        message = f"{self.where(path)} is {shortened(value)}; allowed: {allowed}"
        if advice:
            message += f". {advice}"
        raise ValueError(message)

    def where(self, path: YamlPath) -> str:
        """Return the file, the line and the name of a value, for messages."""
        known = path
        while known and _as_text(known) not in self._lines:
            known = known[:-1]
        line = self._lines.get(_as_text(known), 1)
        return f"{self.path}:{line}: {_dotted(path) or 'the file'}"

    def _construct(self, loader: Any, node: Any) -> Any:
        try:
            return loader.construct_document(node)
        except ValueError as error:  # of a date or a number that does not exist
            raise ValueError(f"{self.path}: not YAML: {error}") from None

    def _check_nodes(self, node: Any, above: tuple[int, ...], done: set[int]) -> None:
        """Raise ValueError for a key that a mapping names twice, and for a node inside itself.

        Args:
            above: ids of the nodes that contain this one.
            done: ids of checked nodes: aliases may refer to a node many times.
        """
        if id(node) in above:
            line = node.start_mark.line + 1
            raise ValueError(f"{self.path}:{line}: an alias refers to what contains it")
        if id(node) in done:
            return
        done.add(id(node))
        above = (*above, id(node))
        children = []
        if node.id == "sequence":
            children = node.value
        elif node.id == "mapping":
            self._check_keys(node)
            children = [value for _, value in node.value]
        for child in children:
            self._check_nodes(child, above, done)

    def _check_keys(self, mapping: Any) -> None:
        seen = set()
        for key, _ in mapping.value:
            where = f"{self.path}:{key.start_mark.line + 1}"
            if key.id != "scalar":
                raise ValueError(f"{where}: a key is a list or a mapping; allowed: a name")
            if key.value in seen:
                raise ValueError(f"{where}: {key.value} is set twice; leave one of them out")
            seen.add(key.value)

    def _note_lines(self, loader: Any, node: Any, path: YamlPath, done: set[int]) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in done:
            return
        done.add(id(node))
        if node.id == "sequence":
            for i, child in enumerate(node.value):
                self._note_lines(loader, child, (*path, str(i)), done)
        elif node.id == "mapping":
            for key, value in node.value:
                # As it is read: `on` is the key True.
                inner = (*path, str(loader.construct_object(key)))
                self._lines[inner] = key.start_mark.line + 1
                self._note_lines(loader, value, inner, done)


def _as_text(path: YamlPath) -> YamlPath:
    return tuple(str(step) for step in path)


def _dotted(path: YamlPath) -> str:
    """Format a path as `axes.gate[1].topk`."""
    text = ""
    for step in path:
        if isinstance(step, int) and not isinstance(step, bool):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text
