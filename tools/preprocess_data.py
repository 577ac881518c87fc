#!/usr/bin/env python3
"""Turn JSON lines into an increment: token ids in Megatron's indexed format, and a manifest of them."""

import tyro

from megalrps.commandline import run_tool
from megalrps.data.preprocess import PreprocessOptions, describe_result, preprocess

PROGRAM = "preprocess_data.py"


def main() -> None:
    """Parse the command line, preprocess, say what was made."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    options = tyro.cli(PreprocessOptions, prog=PROGRAM, config=config)
    for line in describe_result(preprocess(options)):
        print(line)


if __name__ == "__main__":
    run_tool(main, PROGRAM)
