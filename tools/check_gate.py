"""Checks a gate in about a minute: contract, gradients, ranks, ZeRO, resume, a short training.

    python tools/check_gate.py threshold --threshold 0.8
    python tools/check_gate.py my_gate.py --num-experts 8 --html card.html

The first argument is the name of a gate, or a file that registers gates, each of which is checked.
The others are the gate's own flags, --num-experts (4), and --html FILE, which also writes the
report card as a page. The exit code is 0 if no check failed, 1 if one failed, and 2 for wrong
arguments.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig
    from megatron.gate_checks.card import CheckResult
    from megatron.gate_checks.cases import GateCase


NUM_EXPERTS = 4
USED_FIELDS = ("num_experts", "gate_path")
"""Fields of the run's configuration that the checks use, apart from the gate's options"""


@dataclass(frozen=True)
class CheckOptions:
    """Options of the report card."""

    html: str = ""
    """file for the report card as an HTML page"""


def run(argv: list[str]) -> bool:
    """Check the gates that the arguments name; return whether all passed.

    Raises:
        ValueError: an unknown gate or flag, a file that registers no gate, or a refused option.
    """
    import torch

    from megatron.gate_checks.report import html_page
    from megatron.io.atomic_write import write_text

    torch.set_num_threads(1)  # two ranks share two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    target, *flags = argv
    names, paths = find_gates(target)
    pages = []
    passed = True
    for name in names:
        case, options = parse_case(name, paths, flags)
        title = f"Gate {name} with {case.num_experts} experts"
        results = check(case, title)
        passed = passed and all(result.outcome != "fail" for result in results)
        pages.append(html_page(title, results))
        if options.html:
            write_text(options.html, "\n".join(pages))
    return passed


def find_gates(target: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the gates that the first argument names, and the paths of their files.

    Raises:
        ValueError: it is neither the name of a gate nor a file that registers gates.
    """
    from megatron.config.gate_path import resolve_gate_paths
    from megatron.moe.gate import gate_class
    from megatron.moe.gate_registry import REGISTRY

    if not target.endswith(".py") and not Path(target).is_dir():
        gate_class(target)
        return (target,), ()
    (path,) = resolve_gate_paths([target])
    return REGISTRY.import_file(path), (path,)


def parse_case(
    name: str, paths: tuple[str, ...], flags: list[str]
) -> tuple[GateCase, CheckOptions]:
    """Return the case of a gate and its flags.

    Raises:
        ValueError: a flag is unknown or has no effect, or the gate refuses its value.
    """
    from megatron.config import cli
    from megatron.config.fields import require
    from megatron.gate_checks.cases import GateCase
    from megatron.moe.gate import available_gates, gate_config_class
    from megatron.moe.gate_registry import import_gate_files

    gates = (gate_config_class, available_gates, import_gate_files)
    words = ["--gate", name, "--num-experts", str(NUM_EXPERTS)]
    config, options = cli.parse_with(CheckOptions, [*words, *flags], *gates)
    refuse_other_flags(cli.parse(words, *gates), config)
    has_folder = Path(options.html).absolute().parent.is_dir()
    require(has_folder, "--html", options.html, "a file in an existing folder")
    paths = tuple(dict.fromkeys([*paths, *config.moe.gate_path]))
    chosen = config.gate_options[config.moe.gate]
    return GateCase(name, chosen, config.moe.num_experts, paths), options


def refuse_other_flags(default: RunConfig, config: RunConfig) -> None:
    """Refuse flags of a training run, which would have no effect on the checks.

    Args:
        default: the configuration without flags.
        config: that with the flags.
    Raises:
        ValueError: another field than those of `USED_FIELDS` differs.
    """
    from megatron.config.fields import flag_name, require
    from megatron.config.schema import SECTIONS

    for section in SECTIONS:
        for field in fields(getattr(default, section)):
            values = [getattr(getattr(c, section), field.name) for c in (default, config)]
            has_effect = values[0] == values[1] or field.name in USED_FIELDS
            allowed = "left out, because it has no effect on the checks"
            advice = "The gate's own flags, --num-experts, --gate-path and --html have"
            require(has_effect, flag_name(field.name), values[1], allowed, advice)


def check(case: GateCase, title: str) -> list[CheckResult]:
    """Run all checks of a gate, and print each result when it is known."""
    from megatron.gate_checks import report
    from megatron.gate_checks.card import run_card

    results = []
    print("\n".join(report.header_lines(title)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for result in run_card(case, Path(folder)):
            print(report.result_line(result), flush=True)
            results.append(result)
    for result in results:
        if result.curve is not None:
            print("\n".join(report.curve_lines(result.curve)))
    print(report.summary_line(results), flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: check_gate.py NAME|FILE [flags]\n\n{(__doc__ or '').strip()}")
        return 0 if arguments else 2
    passed = []
    code = exit_code(lambda: passed.append(run(arguments)))
    if code:
        return code
    return 0 if passed == [True] else 1


if __name__ == "__main__":
    raise SystemExit(main())
