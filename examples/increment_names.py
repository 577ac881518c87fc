"""Print the names of the increments in a folder made by make_corpus.py or split_increments.py, oldest first."""

import sys

from megalrps.commandline import run_tool
from megalrps.data.text_increments import read_increments


def main() -> None:
    for increment in read_increments(sys.argv[1]):
        sys.stdout.write(increment.name + "\n")


if __name__ == "__main__":
    run_tool(main, "increment_names.py")
