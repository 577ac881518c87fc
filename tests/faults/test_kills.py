"""F1: kill -9 in a save loses nothing that was acknowledged, shows nothing torn, and the next launch goes on at once.

A victim makes checkpoints as training does: store, references, leases, pruning. It dies at a random byte of its shard,
at a step of the protocol, or at any file operation; alone, or as either of two ranks.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import count, record, seed
from deaths import POINTS, DiesAtByte, DiesAtOperation, die_at
from distributed_harness import RankFailedError, processes
from small_runs import acknowledge, acknowledged, check_survivors, launched

from megalrps.checkpoint.manifest import read_manifest

KILLS = count("F1", small=24, full=200)
STRIDE = {True: 9, False: 1}[KILLS < 200]
"""Every so many-th file operation is one to die at."""
LAST = 7
ONLY_FIRST = frozenset(POINTS) - {"after the shard"}
"""What rank 0 alone does."""
SECONDS_TO_TAKE_OVER = 5.0
"""The lease has 60 s to run; a dead holder on this host is seen at once. Reading and a loaded machine take the rest."""


@dataclass(frozen=True)
class Kill:
    """In the save of ``step``: at ``point``, or after ``fraction`` of the shard's bytes; of one of ``ranks``."""

    ranks: int
    victim: int
    step: int
    point: str | None
    fraction: float

    @property
    def place(self) -> str:
        """In words."""
        return self.point or "within the shard"


def draw(number: int) -> Kill:
    chance = random.Random(f"{seed()} F1 {number}")
    ranks = 1 + number % 2
    victim = chance.randrange(ranks)
    points = [point for point in POINTS if victim == 0 or point not in ONLY_FIRST]
    point = chance.choice(points) if chance.random() < 0.5 else None
    # forks have a reference of their own, and from the fourth periodic one on something is pruned at each save
    step = {"after the references of forks and releases": chance.choice((3, 6)), "after a removal's rename": 5}
    return Kill(ranks, victim, step.get(str(point), chance.randint(2, LAST)), point, chance.random())


def save_and_die(rank: int, root: Path, log: Path, kill: Kill) -> None:
    """Make checkpoints until the kill; each one that is acknowledged is noted in ``log``."""
    torch.set_num_threads(1)
    byte = DiesAtByte()
    with launched(root) as launch:
        for step in range(1, LAST + 1):
            if step == kill.step and rank == kill.victim:
                if kill.point is None:
                    mine = read_manifest(root / "checkpoints" / f"main-{step - 1:08d}").shards[rank]
                    byte.arm(int(kill.fraction * mine.bytes))
                else:
                    die_at(kill.point)
            launch.save(step)
            if rank == 0:
                acknowledge(log, step)
            launch.prune()


def run_to_death(root: Path, function: Callable[..., None], *args: Any) -> int | None:
    """The exit status of ``function(*args)`` in a process of its own."""
    root.parent.mkdir(parents=True, exist_ok=True)
    process = processes().Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def one_kill(place: Path, kill: Kill, run_ranks: Callable[..., Any]) -> float:
    """Let the victim die and check what is left; returns the seconds that the next launch took to open the run."""
    root, log = place / "run", place / "log"
    if kill.ranks == 1:
        status = run_to_death(root, save_and_die, 0, root, log, kill)
        assert status == -signal.SIGKILL, f"the victim lived through {kill}: {status}"
    else:
        place.mkdir(parents=True)
        with pytest.raises((RankFailedError, RuntimeError)):
            run_ranks(2, save_and_die, root, log, kill)
    done = acknowledged(log)
    assert done == list(range(1, len(done) + 1)) and len(done) >= kill.step - 1
    return check_survivors(root, done).seconds


def test_kills_in_a_save(tmp_path: Path, run_ranks: Callable[..., Any]):
    places: dict[str, int] = {}
    slowest = 0.0
    for number in range(KILLS):
        kill = draw(number)
        places[kill.place] = places.get(kill.place, 0) + 1
        try:
            slowest = max(slowest, one_kill(tmp_path / str(number), kill, run_ranks))
        except AssertionError as error:
            error.add_note(f"kill {number}: {kill}")
            raise
    assert len(places) >= 5, f"the kills fell on the same place: {places}"
    assert slowest < SECONDS_TO_TAKE_OVER
    record("F1", kills=KILLS, places=places, lost=0, torn=0, slowest_take_over_seconds=round(slowest, 3))


def save_and_die_at(root: Path, log: Path, step: int, operation: int, after: bool) -> None:
    """Make the checkpoints up to ``step``, and die at an operation of the last one's save or of the pruning then."""
    torch.set_num_threads(1)
    death = DiesAtOperation()
    with launched(root) as launch:
        for made in range(1, step + 1):
            if made == step:
                death.arm(operation, after)
            launch.save(made)
            with death.pausing():
                acknowledge(log, made)
            launch.prune()
        death.arm(0, after)


@pytest.mark.parametrize("step", [5, 6], ids=["periodic", "release"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_kill_at_every_file_operation(tmp_path: Path, step: int, after: bool):
    first, kills = 1 + (seed() + step + 5 * after) % STRIDE, 0
    for operation in range(first, 400, STRIDE):
        place = tmp_path / str(operation)
        root, log = place / "run", place / "log"
        status = run_to_death(root, save_and_die_at, root, log, step, operation, after)
        assert status in (0, -signal.SIGKILL)
        check_survivors(root, acknowledged(log))
        if status == 0:
            break
        kills += 1
    assert kills >= 40 // STRIDE, "the operations are no longer seen: the test tests nothing"
    record("F1", **{f"kills_{'after' if after else 'before'}_operations_of_{step}": kills})
