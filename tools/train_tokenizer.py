#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on JSON lines, usually those of the first increment alone."""

import tyro

from megalrps.commandline import run_tool
from megalrps.data.tokenizer_training import TokenizerTrainingOptions, train_tokenizer

PROGRAM = "train_tokenizer.py"


def main() -> None:
    """Parse the command line, train, say what was made."""
    options = tyro.cli(TokenizerTrainingOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    result = train_tokenizer(options)
    print(
        f"{options.output}: {'up to date' if result.up_to_date else 'made'}, {options.vocab_size:,} tokens from "
        f"{result.documents:,} documents, {result.text_bytes:,} bytes of text; {result.bad_lines_summary}; "
        f"{result.wall_seconds:.1f} s"
    )


if __name__ == "__main__":
    run_tool(main, PROGRAM)
