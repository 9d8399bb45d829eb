"""Write a report of runs as one HTML file: curves, loads of experts, final losses, commands.

    python tools/report.py runs/demo
    python tools/report.py runs/topk runs/threshold --output gates.html
    python tools/report.py studies/balancing --title "Balancing rules"

The file needs no network. docs/report.md says what it shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEFAULT_NAME = "report.html"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folder (OUTPUT_DIR of run.sh), metrics.jsonl, or output folder of a comparison "
        "of gates; LABEL=RUN names it, and runs with the same label are one group. Runs without a "
        "label that differ in the seed only are one group, too",
    )
    p.add_argument(
        "--output",
        metavar="FILE",
        default="",
        help="the HTML file (default: report.html in RUN's folder for one RUN, else in the "
        "current folder)",
    )
    p.add_argument("--title", default="", help="title of the report (default: from the runs)")
    return p


def run(args: argparse.Namespace) -> None:
    """Write the report, and print where it is."""
    from megatron.analysis.report.report import ReportOptions, write_report
    from megatron.analysis.report.sources import find_runs

    output = Path(args.output or default_output(args.runs))
    if output.is_dir():
        raise ValueError(f"--output is {args.output!r}, a folder; allowed: the path of a file")
    from tqdm import tqdm

    sources = find_runs(args.runs)
    with tqdm(
        desc="read", total=len(sources), unit="run", disable=not sys.stderr.isatty()
    ) as bar:
        runs = write_report(sources, output, ReportOptions(title=args.title), bar.update)
    empty = [run.name for run in runs if run.is_empty]
    note = f"; without metrics: {', '.join(empty)}" if empty else ""
    size = output.stat().st_size / 1e6
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{number} -> {output} ({size:.1f} MB){note}")


def default_output(runs: list[str]) -> Path:
    """Return where the report is written without --output."""
    from megatron.analysis.report.sources import label_and_path

    path = label_and_path(runs[0])[1]
    if len(runs) > 1 or not path.exists():
        return Path(DEFAULT_NAME)
    return (path if path.is_dir() else path.parent) / DEFAULT_NAME


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.log import run_tool

    p = parser()
    args = p.parse_args(argv)
    return run_tool(p.prog, lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
