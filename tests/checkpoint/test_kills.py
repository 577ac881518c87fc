"""kill -9 at every file operation and at random moments: what was acknowledged stays, nothing is seen by halves."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import RankFailedError, processes

from megalrps.checkpoint.store import Store

SEED = 20260
OPERATIONS = ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "close")


class KillAt:
    """Ends the process before its ``operation``-th file operation, or after it (of a write, half-way through)."""

    def __init__(self, operation: int, when: str) -> None:
        self.operation, self.when, self.done = operation, when, 0
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            self.done += 1
            if self.done != self.operation:
                return original(*args, **kwargs)
            if self.when == "after" and name == "write":
                original(args[0], args[1][: max(1, len(args[1]) // 2)])
            elif self.when == "after":
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        return operate


def state_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return {f"x{size}": torch.randn(size, generator=generator) for size in (3, 200, 5000)}


def acknowledge(log: Path, name: str) -> None:
    with open(log, "a") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())


def acknowledged(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def check_survivors(directory: Path, log: Path) -> None:
    """The guarantee, after whatever has happened to a writer."""
    store = Store(directory)
    names = store.names()
    assert set(acknowledged(log)) <= set(names), "an acknowledged checkpoint is lost"
    for name in names:
        state = state_of(name)
        loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        store.load(name, loaded)
        assert all(torch.equal(state[key], loaded[key]) for key in state), "a torn checkpoint is visible"
    store.prepare()
    assert sorted(entry.name for entry in directory.iterdir()) == sorted(names), "a leftover stays"
    store.save("next", state_of("next"), {})
    store.verify("next")


def _save_and_die(directory: Path, log: Path, operation: int, when: str) -> None:
    torch.set_num_threads(1)
    store = Store(directory)
    store.prepare()
    store.save("first", state_of("first"), {"step": 1})
    acknowledge(log, "first")
    kill = KillAt(operation, when)
    store.save("second", state_of("second"), {"step": 2})
    kill.operation = -1
    acknowledge(log, "second")


def _remove_and_die(directory: Path, log: Path, operation: int, when: str) -> None:
    store = Store(directory)
    store.prepare()
    for name in ("first", "second"):
        store.save(name, state_of(name), {})
    acknowledge(log, "first")
    kill = KillAt(operation, when)
    store.remove("second")
    kill.operation = -1
    acknowledge(log, "first")


def _save_until_killed(directory: Path, log: Path) -> None:
    torch.set_num_threads(1)
    store = Store(directory)
    store.prepare()
    for number in range(10_000):
        store.save(f"main-{number:08d}", state_of(f"main-{number:08d}"), {"step": number})
        acknowledge(log, f"main-{number:08d}")


def run_to_death(function: Callable[..., None], *args: Any) -> int | None:
    process = processes().Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(("function", "fewest"), [(_save_and_die, 15), (_remove_and_die, 4)])
def test_kill_at_every_file_operation(tmp_path: Path, function: Callable[..., None], fewest: int):
    kills = 0
    for when in ("before", "after"):
        for operation in range(1, 200):
            directory, log = tmp_path / f"{when}-{operation}", tmp_path / f"{when}-{operation}.log"
            status = run_to_death(function, directory, log, operation, when)
            assert status in (0, -signal.SIGKILL)
            check_survivors(directory, log)
            if status == 0:
                break
            kills += 1
    assert kills >= 2 * fewest, "the operations are no longer seen: the test tests nothing"


def test_kill_at_random_moments(tmp_path: Path):
    chance = random.Random(SEED)
    seen: set[int] = set()
    for case in range(30):
        directory, log = tmp_path / str(case), tmp_path / f"{case}.log"
        process = processes().Process(target=_save_until_killed, args=(directory, log))
        process.start()
        deadline = time.monotonic() + 60
        while not acknowledged(log) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        check_survivors(directory, log)
        seen.add(len(acknowledged(log)))
    assert len(seen) > 3, f"the kills fell on the same moment (seed {SEED})"


def _save_among_ranks_and_die(rank: int, directory: Path, log: Path, victim: int, operation: int) -> None:
    store = Store(directory)
    store.prepare()
    store.save("first", state_of("first"), {})
    if rank == 0:
        acknowledge(log, "first")
    if rank == victim:
        KillAt(operation, "after")
    store.save("second", state_of("second"), {})
    if rank == 0:
        acknowledge(log, "second")


@pytest.mark.parametrize(("victim", "operation"), [(0, k) for k in range(1, 12, 2)] + [(1, k) for k in range(1, 4)])
def test_kill_of_one_rank_of_two_in_a_save(run_ranks, tmp_path: Path, victim: int, operation: int):
    with pytest.raises((RankFailedError, RuntimeError)):
        run_ranks(2, _save_among_ranks_and_die, tmp_path / "store", tmp_path / "log", victim, operation)
    assert "first" in acknowledged(tmp_path / "log")
    check_survivors(tmp_path / "store", tmp_path / "log")
