#!/usr/bin/env python3
"""Cut dated text into increments, each with a training and a held-out part."""

import tyro

from megalrps.commandline import run_tool
from megalrps.data.split import SplitOptions, split_increments
from megalrps.data.text_increments import describe_increments

PROGRAM = "split_increments.py"


def main() -> None:
    """Parse the command line, split, say what was made."""
    options = tyro.cli(SplitOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    result = split_increments(options)
    print(f"{options.output}: {'up to date' if result.up_to_date else 'made'}")
    print(describe_increments(result.increments))
    duplicates = f"{result.duplicates:,} duplicates dropped; " if options.deduplicate else ""
    print(f"  {duplicates}{result.bad_lines_summary}")


if __name__ == "__main__":
    run_tool(main, PROGRAM)
