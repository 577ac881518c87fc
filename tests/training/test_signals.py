"""A rank dies with its launcher, also when the launcher had no time to say goodbye."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(60)
"""
RANK = """
import time
from pathlib import Path

import pytest
from megalrps.training.signals import die_with_launcher
if {asks}: die_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def lives_on(asks: bool) -> bool:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK.format(asks=asks)], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 2.0
        while is_alive(rank) and time.monotonic() < deadline:
            time.sleep(0.02)
        return is_alive(rank)
    finally:
        if is_alive(rank):
            os.kill(rank, signal.SIGKILL)


def test_a_rank_that_asks_dies_with_its_launcher():
    assert not lives_on(asks=True)


def test_a_rank_that_does_not_ask_lives_on():
    """What the other test would not notice if it killed the rank itself."""
    assert lives_on(asks=False)


def test_a_rank_that_asks_too_late_dies_too():
    """It was adopted before it asked: what adopted it is no Python program, as every launcher is."""
    with open("/proc/1/cmdline", "rb") as file:
        if b"python" in file.read().split(b"\0")[0]:
            pytest.skip("process 1, which adopts orphans here, is a Python program itself")
    late = "import os, time\nwhile os.getppid() != 1: time.sleep(0.01)\n"
    rank = late + RANK.format(asks=True).replace('print("ready", flush=True)', "open({path!r}, 'w').close()")
    script = LAUNCHER.replace("time.sleep(60)", "pass")
    with tempfile.TemporaryDirectory() as directory:
        survived = f"{directory}/survived"
        done = subprocess.run(
            [sys.executable, "-c", script, rank.format(path=survived)], capture_output=True, text=True, check=True
        )
        deadline = time.monotonic() + 10.0
        while is_alive(int(done.stdout)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(int(done.stdout)) and not Path(survived).exists()
