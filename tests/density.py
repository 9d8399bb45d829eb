"""Print how dense the code of a folder is: `python tests/density.py [FOLDER]` (default: megatron).

Measures: the 90th percentile of the width of non-empty lines, and tuple assignments
(`a, b = x, y`) and conditional expressions per 1,000 lines. `tests/test_structure.py` holds
megatron/ to the bars below.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

BARS = {"width_p90": 88.0, "tuple_assignments": 3.0, "conditional_expressions": 12.0}


def tuple_assignments(tree: ast.AST) -> Iterator[ast.Assign]:
    """Assignments of several values to several names in one statement."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple | ast.List) and isinstance(node.value, ast.Tuple):
            yield node


def measure(folder: Path) -> dict[str, float]:
    """The measures of all Python files below `folder`, by name."""
    widths = []
    lines = 0
    tuples = 0
    conditionals = 0
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        widths += [len(line) for line in text.splitlines() if line.strip()]
        tree = ast.parse(text)
        tuples += sum(1 for _ in tuple_assignments(tree))
        conditionals += sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))
    widths.sort()
    return {
        "lines": lines,
        "width_p90": widths[int(0.9 * len(widths))],
        "tuple_assignments": 1000 * tuples / lines,
        "conditional_expressions": 1000 * conditionals / lines,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "megatron"
    for name, value in measure(folder).items():
        bar = f" (bar: {BARS[name]:g})" if name in BARS else ""
        unit = (
            " per 1,000 lines"
            if name in ("tuple_assignments", "conditional_expressions")
            else ""
        )
        print(f"{name}: {value:.4g}{unit}{bar}")
