"""Ranks of the entry without torchrun's seconds: real processes, forked from the clean server, to be signalled.

Each does what ``python pretrain_gpt.py`` does under torchrun, and this process holds the store of the launch, as
torchrun does. What goes wrong in a rank is said beforehand: a :class:`Fault` reaches it before one of its calls of a
function.
"""

import itertools
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
from distributed_harness import processes
from node_launches import LAUNCH_SECONDS, free_port, launched
from tiny_job import launch

UPDATE = "megalrps.training.loop.train_step"


@dataclass(frozen=True)
class Fault:
    """``act`` of a test's module, called before the ``call``-th call of ``where`` on each of ``ranks``."""

    where: str
    act: Callable[[], None]
    call: int = 1
    ranks: tuple[int, ...] = (0,)

    @contextmanager
    def waits(self, noted: Path) -> Iterator[None]:
        """Let it wait while the block runs; the moment at which it has come is ``noted``."""
        original, calls = pkgutil.resolve_name(self.where), itertools.count(1)

        def reach(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                noted.write_text(f"{time.time()}")
                self.act()
            return original(*args, **kwargs)

        with mock.patch(self.where, reach):
            yield


@dataclass(frozen=True)
class Rank:
    """A rank, what it prints, and where it notes its updates and its fault."""

    process: BaseProcess
    log: Path
    updates: Path
    noted: Path

    @property
    def status(self) -> int | None:
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@contextmanager
def started(arguments: Sequence[str], size: int, folder: Path, *faults: Fault) -> Iterator[list[Rank]]:
    """The ranks of the command line, running; those that have not ended with the block are killed."""
    place = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    place.mkdir()
    port, ranks = free_port(), []
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    try:
        for rank in range(size):
            files = [place / f"{rank}.{name}" for name in ("log", "updates", "noted")]
            process = processes().Process(target=_main, args=(rank, size, port, list(arguments), files, faults))
            process.start()
            ranks.append(Rank(process, *files))
        yield ranks
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()
        del store


def finished(arguments: Sequence[str], size: int, folder: Path, *faults: Fault, seconds: float = 90.0) -> list[Rank]:
    """The ranks of the command line after they have ended by themselves."""
    with started(arguments, size, folder, *faults) as ranks:
        wait(ranks, seconds)
    return ranks


def wait(ranks: Sequence[Rank], seconds: float) -> None:
    """Until all ``ranks`` have ended by themselves."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    left = [rank.log.stem for rank in ranks if rank.status is None]
    assert not left, f"ranks {left} have not ended after {seconds} s:\n" + "\n".join(rank.text for rank in ranks)


def wait_for(condition: Callable[[], bool], ranks: Sequence[Rank], seconds: float = 60.0) -> None:
    """Until ``condition`` holds; it must before any of ``ranks`` ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(rank.status is None for rank in ranks), [r.text for r in ranks]
        time.sleep(0.01)


_TORCHRUN_SCRIPT = """
import sys, time
from types import SimpleNamespace
sys.path[:0] = {paths}
from megalrps.evaluation import report
from megalrps.training import loop
from tiny_job import launch
report.write_report = lambda run, page: SimpleNamespace(page=page)
original = loop.train_step
def update(*args, **kwargs):
    time.sleep({seconds})
    return original(*args, **kwargs)
loop.train_step = update
sys.exit(launch(sys.argv[1:]))
"""


@contextmanager
def torchrun(
    arguments: Sequence[str], folder: Path, *, size: int = 2, seconds_an_update: float
) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with ``size`` ranks of the command line, slow enough to be reached in between; ``folder/log`` its words.

    ``launched`` by it ends with the block, whatever has become of torchrun.
    """
    script = folder / "entry.py"
    script.write_text(_TORCHRUN_SCRIPT.format(paths=sys.path[:], seconds=seconds_an_update))
    program = Path(sys.executable).with_name("torchrun")
    command = (program, "--nproc-per-node", str(size), "--master-port", str(free_port()), script, *arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with launched(*command, environment=environment, log=folder / "log") as process:
        yield process


def wait_until(condition: Callable[[], bool], launch: subprocess.Popen[bytes], log: Path) -> None:
    """Until ``condition`` holds; it must before ``launch`` ends."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    while not condition():
        assert time.monotonic() < deadline and launch.poll() is None, log.read_text()
        time.sleep(0.02)


def children_of(launcher: int) -> list[int]:
    """The processes that ``launcher`` has started."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def rank_of(process: int) -> int:
    """The rank that torchrun has made of a process."""
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    (rank,) = (variable for variable in variables if variable.startswith(b"RANK="))
    return int(rank.removeprefix(b"RANK="))


def is_alive(process: int) -> bool:
    """Whether there is such a process, and not only its corpse."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _main(
    rank: int, size: int, port: int, arguments: list[str], files: Sequence[Path], faults: Sequence[Fault]
) -> None:
    log, updates, noted = files
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    original = pkgutil.resolve_name(UPDATE)

    def update(*args: Any, **kwargs: Any) -> Any:
        with updates.open("a") as file:
            file.write(".")
        return original(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch(UPDATE, update))
        drawn = stack.enter_context(mock.patch("megalrps.evaluation.report.write_report"))
        drawn.side_effect = lambda run, page: SimpleNamespace(page=page)  # it costs more than all else
        for fault in faults:
            if rank in fault.ranks:
                stack.enter_context(fault.waits(noted))
        status = launch(arguments)
    os._exit(status)
