#!/usr/bin/env python3
"""Turn text into an increment: token ids in Megatron's indexed format, and a manifest of them."""

from megalrps.commandline import run_tool
from megalrps.data.preprocess import describe_result, preprocess
from megalrps.data.preprocess_options import PreprocessOptions

PROGRAM = "preprocess_data.py"


def main() -> None:
    """Parse the command line, preprocess, say what was made."""
    import tyro  # here: a worker, which runs this file as a module, has no command line

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    options = tyro.cli(PreprocessOptions, prog=PROGRAM, config=config)
    for line in describe_result(preprocess(options)):
        print(line)


if __name__ == "__main__":
    run_tool(main, PROGRAM)
