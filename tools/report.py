#!/usr/bin/env python3
"""Write the report of a run, or of several runs compared: one HTML page, PNG files beside it, tables on the terminal.

tools/report.py --run runs/quickstart
tools/report.py --compare runs/compare/ptfs runs/compare/cpt runs/compare/lrps --output runs/compare/report.html
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.evaluation.compare import compared, write_comparison
from megalrps.evaluation.report import PAGE_FILE, Report, write_report
from megalrps.evaluation.run_files import read_run
from megalrps.evaluation.tables import terminal_table


def main() -> None:
    """Write the report and print its tables and its path."""
    options = parser().parse_args()
    if options.run:
        report = write_report(read_run(options.run), options.output or options.run / PAGE_FILE)
    else:
        output = options.output or _shared_parent(options.compare) / PAGE_FILE
        report = write_comparison(compared([read_run(run) for run in options.compare]), output)
    _show(report, Console())


def parser() -> argparse.ArgumentParser:
    """The command line; tools/reference.py documents it."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="RUN", help="directory of one run")
    what.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN", help="directories of two runs or more, one a paradigm"
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="PAGE",
        help=f"the page to write [RUN/{PAGE_FILE}; for --compare, {PAGE_FILE} in the directory that holds the runs]",
    )
    return made


def _shared_parent(runs: Sequence[Path]) -> Path:
    parents = {run.resolve().parent for run in runs}
    if len(parents) > 1:
        raise InputError("--output is required: the runs of --compare do not lie in one directory")
    return runs[0].parent if runs[0].name else parents.pop()


def _show(report: Report, console: Console) -> None:
    for warning in report.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False)
    for table in report.tables:
        console.print(terminal_table(table))
        console.print()
    for name, value in report.facts:
        console.print(f"{name}: {value}", markup=False, highlight=False)
    # soft_wrap: a path cut by the console's width cannot be clicked or copied
    console.print(f"report: {report.page}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_tool(main, "report.py")
