#!/usr/bin/env python3
"""Make three increments of text out of what this Python installation carries; nothing is downloaded."""

import tyro

from megalrps.commandline import run_tool
from megalrps.data.corpus import CorpusOptions, make_corpus
from megalrps.data.text_increments import describe_increments

PROGRAM = "make_corpus.py"


def main() -> None:
    """Parse the command line, make the increments, say what was made."""
    options = tyro.cli(CorpusOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    result = make_corpus(options)
    print(f"{options.output}: {'up to date' if result.up_to_date else 'made'}")
    print(describe_increments(result.increments))


if __name__ == "__main__":
    run_tool(main, PROGRAM)
