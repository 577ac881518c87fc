"""Warm interpreters run a program as a cold one does, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_interpreter import warm_interpreter, warmed

PROGRAM = """
import os, sys
from beside import NAME
print(sys.argv, os.getcwd(), os.environ.get("WORD"), __name__, NAME, flush=True)
print(sys.stdin.read(), file=sys.stderr)
if sys.argv[1] == "raise":
    raise KeyError("lost")
sys.exit(sys.argv[1] if sys.argv[1].startswith("because") else int(sys.argv[1]))
"""
ASLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_interpreter(tmp_path_factory.mktemp("warm") / "warm", {**os.environ}, preloaded=()) as folder:
        yield folder


@pytest.mark.parametrize("argument", ["0", "3", "raise", "because of this"])
def test_a_program_does_what_it_does_in_a_cold_interpreter(warm: Path, tmp_path: Path, argument: str) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "WORD": "said"}

    def run(python: str, environment: dict[str, str]) -> tuple[int, str, str]:
        done = subprocess.run(
            [python, "-u", str(tmp_path / "program.py"), argument, "and more"],
            env=environment, cwd="/", input="read", capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr.splitlines()[0] + done.stderr.splitlines()[-1]

    found, expected = run(f"{warm}/bin/python", environment), run(sys.executable, environment)
    assert found == expected
    assert "'and more'] / said __main__ beside" in found[1]


def test_modules_are_found_from_the_directory_and_torchrun_is_one(warm: Path, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import sys; print(sys.argv[1:], __name__)")
    environment = warmed({**os.environ}, warm)
    command = ["bash", "-c", "python -m one a && torchrun --standalone --nproc-per-node 2 -m one b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["['a'] __main__", "['b'] __main__", "['b'] __main__"]


def gone(process: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_is_killed_takes_its_fork_along(warm: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "asleep.py").write_text(ASLEEP)
    with subprocess.Popen([warm / "bin" / "python", tmp_path / "asleep.py"], stdout=subprocess.PIPE) as asker:
        assert asker.stdout is not None
        fork = int(asker.stdout.readline())
        assert Path(f"/proc/{fork}").exists()
        asker.send_signal(number)
        assert asker.wait(10) == -number
    assert gone(fork)


def test_the_end_of_the_server_is_that_of_its_forks(tmp_path: Path) -> None:
    (tmp_path / "asleep.py").write_text(ASLEEP)
    with warm_interpreter(tmp_path / "warm", {**os.environ}, preloaded=()) as folder:
        asker = subprocess.Popen([folder / "bin" / "python", tmp_path / "asleep.py"], stdout=subprocess.PIPE)
        assert asker.stdout is not None
        fork = int(asker.stdout.readline())
    assert gone(fork)
    assert asker.wait(10) != 0
    asker.stdout.close()
