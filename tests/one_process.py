"""A program launched several times in one process: what it imports, seconds where torch is among it, is paid once."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_LAUNCHES = """
import contextlib, io, json, pathlib, runpy, sys

program, launches = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = str(pathlib.Path(program).parent)
ended = []
for arguments in launches:
    sys.argv = [program, *arguments]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    ended.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""


def launched_in_turn(
    program: Path, *launches: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """How each launch of ``program`` with these arguments ended; an exception that passes through fails the test."""
    arguments = [[str(argument) for argument in launch] for launch in launches]
    result = subprocess.run(
        [sys.executable, "-c", _LAUNCHES, str(program), json.dumps(arguments)],
        env=dict(os.environ if environment is None else environment),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [
        subprocess.CompletedProcess([str(program), *launch], *ended)
        for launch, ended in zip(arguments, json.loads(result.stdout), strict=True)
    ]
