"""Compares gates: runs all cells of a study, resumes it, and summarises the results.

    python tools/compare_gates.py STUDY.yaml --plan
    python tools/compare_gates.py STUDY.yaml --output runs/gates --devices cpu,cpu
    python tools/compare_gates.py STUDY.yaml --seeds 1 2 --gate topk threshold

STUDY is a YAML file with axes of flags of pretrain_gpt.py; docs/comparing-gates.md describes it.
Everything is checked before anything starts: flags, data, parameters that have to match, space.
The same command continues a study that was stopped: a finished cell is never run again, and a
killed one continues from its checkpoint. Each axis of the file is a flag: --AXIS LABEL ... selects
its values. The exit code is 0 if all cells have finished, 1 if some failed, 2 for a mistake in the
file or the flags, and 128 + n after the signal n.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPO = Path(__file__).resolve().parent.parent
PROGRAM = REPO / "pretrain_gpt.py"
sys.path.insert(0, str(REPO))

if TYPE_CHECKING:
    from megatron.analysis.compare.plan import StudyPlan
    from megatron.analysis.compare.runner import RunSummary
    from megatron.analysis.compare.study import Study


def parser(study: Study | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        study: the study whose axes are flags, too; None: the flags of every study.
    """
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("study", metavar="STUDY", help="YAML file of the study; the first argument")
    p.add_argument(
        "--output",
        metavar="DIR",
        default="",
        help="folder of the results (default: runs/NAME, with the name of the study)",
    )
    p.add_argument("--plan", action="store_true", help="check and print the plan, and end")
    p.add_argument(
        "--summarize",
        action="store_true",
        help="summarise what has finished in --output, and end; no other flag goes with it",
    )
    p.add_argument(
        "--devices",
        metavar="LIST",
        default="",
        help="where cells run at the same time: cpu,cpu or cuda:0,cuda:1, or cuda:0+1,cuda:2+3 for "
        "cells of two ranks (default: the first GPU, or else the CPU)",
    )
    p.add_argument(
        "--rerun",
        nargs="*",
        metavar="CELL",
        help="run these cells again, or those that match a pattern such as 'gate-topk_*'; without "
        "a name, the cells whose flags have changed. Their earlier results are deleted",
    )
    p.add_argument(
        "--remove-checkpoints",
        action="store_true",
        help="delete the checkpoints of each cell that has finished",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FLAG=VALUE",
        help="flags of pretrain_gpt.py without dashes that are added to base",
    )
    p.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="N", help="instead of the file's"
    )
    if study is not None:
        add_axes(p, study)
    return p


def add_axes(p: argparse.ArgumentParser, study: Study) -> None:
    """Add a flag for each axis of the study.

    Raises:
        ValueError: an axis has the name of another flag.
    """
    from megatron.config.fields import require

    group = p.add_argument_group("axes of the study")
    for axis in study.axes:
        flag = f"--{axis.name}"
        is_free = flag not in p._option_string_actions
        allowed = "a name that is no flag of this program"
        require(is_free, f"an axis of {study.path}", axis.name, allowed, "Rename it.")
        labels = " ".join(axis.labels()).replace("%", "%%")
        group.add_argument(
            flag, nargs="+", default=[], metavar="LABEL", dest=f"axis {axis.name}", help=labels
        )


def run(argv: list[str]) -> int:
    """Run the tool and return its exit code.

    Raises:
        ValueError: a mistake in the study or the flags.
        OSError: a file is missing or cannot be written.
    """
    from megatron.analysis.compare.overrides import override
    from megatron.analysis.compare.study_file import read_study

    if not argv or argv[0].startswith("-"):
        parser().parse_known_args([*argv, "STUDY"] if argv else [])  # ends after --help
        parser().error("the first argument is the file of the study, and flags follow it")
    study = read_study(argv[0])
    command_line = parser(study)
    command_line.allow_abbrev = False
    args = command_line.parse_args(argv)
    refuse_ignored(command_line, args)
    selection = {axis.name: getattr(args, f"axis {axis.name}") for axis in study.axes}
    study = override(study, selection, args.seeds, args.set)
    output = Path(args.output or f"runs/{study.name}")
    if args.summarize:
        summarize(output)
        return 0
    return compare(study, output, args)


def refuse_ignored(command_line: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that --summarize and --plan would ignore.

    Raises:
        ValueError: a flag is set together with one of them.
    """
    from megatron.config.fields import require

    if not (args.summarize or args.plan):
        return
    mode = "--summarize" if args.summarize else "--plan"
    for action in command_line._actions:
        if args.summarize:
            is_used = action.dest in ("study", "output", "summarize", "help")
        else:
            is_used = action.dest not in ("rerun", "remove_checkpoints")
        if is_used:
            continue
        value = getattr(args, action.dest)
        is_unset = value == action.default
        require(is_unset, action.option_strings[0], value, f"not with {mode}")


def compare(study: Study, output: Path, args: argparse.Namespace) -> int:
    """Plan the study, and run it unless --plan is set; return the exit code."""
    from megatron.analysis.compare.cell_folders import CellFolders
    from megatron.analysis.compare.devices import parse_devices
    from megatron.analysis.compare.output import check_study_folder
    from megatron.analysis.compare.plan import plan_study
    from megatron.analysis.compare.plan_table import plan_text
    from megatron.pretrain import parse_flags

    devices = parse_devices(args.devices, study.ranks)
    plan = plan_study(study, parse_flags)
    folders = CellFolders(output)
    print(plan_text(plan, folders, len(devices)), flush=True)
    plan.require_matched()
    if args.plan:
        check_study_folder(plan, folders)
        return 0
    summary = run_cells(plan, folders, devices, args)
    if not summary.stop_signal:
        summarize(output)
    for cell_id, error in summary.failed.items():
        print(f"failed: {cell_id}: {error}", file=sys.stderr)
    for cell_id in summary.interrupted:
        print(f"interrupted: {cell_id}; the same command continues it", file=sys.stderr)
    if summary.stop_signal:
        return 128 + summary.stop_signal
    return 1 if summary.failed or summary.interrupted else 0


def run_cells(plan: StudyPlan, folders, devices, args: argparse.Namespace) -> RunSummary:
    """Run the cells, with the output folder locked against other runners."""
    from megatron.analysis.compare.output import prepare_output, require_space
    from megatron.analysis.compare.results import CELLS_FOLDER
    from megatron.analysis.compare.runner import RunnerOptions, StudyRunner
    from megatron.io.staging_dir import StagingDir

    with StagingDir(folders.root / CELLS_FOLDER):
        require_space(plan, folders, len(devices), remove_checkpoints=args.remove_checkpoints)
        prepare_output(plan, folders, args.rerun)
        options = RunnerOptions(PROGRAM, devices, args.remove_checkpoints)
        return StudyRunner(plan, folders, options).run()


def summarize(output: Path) -> None:
    """Print the results of a study's folder.

    Raises:
        ValueError: the folder has no results of a study.
    """
    from megatron.analysis.compare.results import StudyResults
    from megatron.analysis.compare.results_table import results_text
    from megatron.analysis.compare.summary import write_summary

    results = StudyResults.read(output)
    print(f"{results_text(results)}\n\n{write_summary(results, output)}", end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    codes = []
    arguments = sys.argv[1:] if argv is None else argv
    code = exit_code(lambda: codes.append(run(arguments)))
    return code or codes[0]


if __name__ == "__main__":
    raise SystemExit(main())
