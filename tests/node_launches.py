"""Launches as a user makes them, on one node or several: none outlives its test, and one that hangs says where."""

import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pytest

LAUNCH_SECONDS = 120.0  # 25 were seen on two busy cores
SECONDS_TO_FOLLOW = 5.0  # how long the nodes beside one that failed may take to say why they do too
PORTS = range(20_000, 30_000)  # what examples/slurm.sbatch makes of a job's number
_MARK = "MEGALRPS_TEST_LAUNCH"


@dataclass(frozen=True)
class Ended:
    """How the launch of one node ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def free_port() -> int:
    """A port of PORTS that nobody listens at; the system gives none of them to a socket that asks for any."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port
    raise AssertionError(f"no port of {PORTS} is free")


def launch_nodes(
    *command: str | Path, environments: list[dict[str, str]], folder: Path, seconds: float = LAUNCH_SECONDS
) -> list[Ended]:
    """Run ``command`` once in each environment, all at a time, and return how they ended.

    When one fails, or ``seconds`` have passed, every process that any of them has started is killed. Time that is up
    fails the test with what all nodes printed and, last, where their Python threads stood.
    """
    arguments, launch = [str(part) for part in command], secrets.token_hex(16)
    own = {_MARK: launch, "PYTHONFAULTHANDLER": "1"}
    with ExitStack() as stack:
        nodes = []
        stack.callback(_end, launch, nodes)
        for environment in environments:
            out, err = (stack.enter_context(TemporaryFile("w+", errors="replace")) for _ in range(2))
            process = subprocess.Popen(
                arguments, env=environment | own, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
            nodes.append((process, out, err))
        in_time = _wait([process for process, _, _ in nodes], time.monotonic() + seconds)
        if not in_time:
            _send(signal.SIGABRT, launch)  # at which Python prints its threads
            time.sleep(1)
        _end(launch, nodes)
        ended = [Ended(process.returncode, _text(out), _text(err)) for process, out, err in nodes]
    if not in_time:
        told = "\n".join(f"node {place}: {node.stdout}{node.stderr}" for place, node in enumerate(ended))
        pytest.fail(f"{' '.join(arguments[:2])} has not ended after {seconds:.0f} s\n{told}", pytrace=False)
    return ended


@contextmanager
def launched(*command: str | Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``command``, running, for a test that signals it; ``log`` gets its words. Nothing of it outlives the block."""
    launch = secrets.token_hex(16)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment | {_MARK: launch, "PYTHONFAULTHANDLER": "1"},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        _end(launch, [(process,)])


def _wait(processes: list[subprocess.Popen[str]], deadline: float) -> bool:
    """Wait until all have ended, or one has failed and the others had time to follow; False where time is up."""
    failed = False
    while None in (statuses := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(statuses) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + SECONDS_TO_FOLLOW)
        time.sleep(0.05)
    return None not in statuses or any(statuses)


def _end(launch: str, nodes: list[tuple[subprocess.Popen[str], ...]]) -> None:
    _send(signal.SIGKILL, launch)
    for process, *_ in nodes:
        process.wait()


def _send(number: signal.Signals, launch: str) -> None:
    """Signal every process of ``launch``, told by its environment: torchrun's workers have sessions of their own, and
    what an ended process leaves behind is nobody's child.
    """
    mark = f"{_MARK}={launch}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), number)


def _text(file) -> str:
    file.seek(0)
    return file.read()
