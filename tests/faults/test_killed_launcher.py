"""A launcher that is killed takes its ranks along, and a launch that others have taken over commits nothing (F8)."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from counts import count, record, seed
from entry_ranks import (
    UPDATE,
    Fault,
    children_of,
    finished,
    is_alive,
    started,
    torchrun,
    wait,
    wait_for,
    wait_until,
)
from tiny_job import TinyData, checkpoints, command, differing, files_of, make_data, results, tensors

from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.references import References
from megalrps.errors import EXIT_HELD

STEPS = 8
SECONDS_TO_END = 10.0
LEASE_SECONDS = 1.0
AGREEMENT = "megalrps.training.control.Control.agree"
SAVE = "megalrps.checkpoint.storage.CheckpointWriter.finish"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    whole = make_data(tmp_path_factory.mktemp("data"), (STEPS,))
    return TinyData(whole.increments, ())


def arguments_of(data: TinyData, run: Path) -> list[str]:
    return command(data, run, "--save-interval", "2", "--lease-seconds", str(LEASE_SECONDS))


@pytest.fixture(scope="module")
def undisturbed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [rank.status for rank in finished(arguments_of(data, folder / "run"), 1, folder)] == [0]
    return folder / "run"


def check_undisturbed(run: Path, undisturbed: Path) -> None:
    assert results(run) == results(undisturbed)
    for name in checkpoints(undisturbed):
        assert differing(tensors(run, name), tensors(undisturbed, name)) == [], name


def wait_here(noted: Path, woken: Path) -> None:
    """Stand still where the fault is until woken; meanwhile the process is stopped, and another takes its path."""
    noted.touch()
    while not woken.exists():
        time.sleep(0.01)


def drawn(number: int) -> list[tuple[str, int]]:
    """Before which call of what a run of one rank is stopped: these two in every session, the others anywhere."""
    draw = random.Random(seed())
    places = [(UPDATE, 4), (SAVE, 2)]
    while len(places) < number:
        where, calls = draw.choice([(UPDATE, STEPS), (AGREEMENT, STEPS), (SAVE, 3)])
        places.append((where, draw.randint(1, calls)))
    return places


PLACES = drawn(count("F8", 2, 10))


def stop(process: int, run: Path) -> None:
    """Stop it while it does not hold the lineage's lock, which its heartbeat takes: who waits for a lock whose holder
    sleeps waits as long as it does.
    """
    with References(run / "lineage").locked():
        os.kill(process, signal.SIGSTOP)
        while not is_stopped(process):
            time.sleep(0.01)


def is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def move_to_another_host(run: Path) -> None:
    """Say in the leases that their holder runs where it cannot be looked up: its beats alone can tell of it."""
    leases = Leases(References(run / "lineage"))
    with leases.references.locked() as locked:
        for lease in leases.all():
            leases._write(locked, replace(lease, place=replace(lease.place, host="elsewhere")))


@pytest.mark.parametrize("case", range(len(PLACES)))
def test_a_launch_that_was_taken_over_in_its_sleep_commits_nothing(
    data: TinyData, undisturbed: Path, tmp_path: Path, case: int
):
    (where, call), run = PLACES[case], tmp_path / "run"
    noted, woken = tmp_path / "there", tmp_path / "woken"
    fault = Fault(where, partial(wait_here, noted, woken), call)
    with started(arguments_of(data, run), 1, tmp_path, fault) as sleeping:
        wait_for(noted.exists, sleeping)
        stop(sleeping[0].process.pid, run)
        move_to_another_host(run)
        (second,) = finished(arguments_of(data, run), 1, tmp_path)
        assert second.status == 0 and "watching" in second.text, f"{fault}\n{second.text}"
        left = {name: files_of(run / name) for name in ("checkpoints", "lineage")}
        told = (run / "run_state.json").read_text()
        woken.touch()
        sleeping[0].signal(signal.SIGCONT)
        wait(sleeping, 30.0)
    assert sleeping[0].status == EXIT_HELD, f"{fault}\n{sleeping[0].text}"
    assert "was taken over by another launch" in sleeping[0].text
    changed = [file for name, files in left.items() for file in differing_files(files, files_of(run / name))]
    assert changed == [], fault
    assert (run / "run_state.json").read_text() == told and json.loads(told)["state"] == "finished"
    check_undisturbed(run, undisturbed)
    record("F8", **{f"files that the launch taken over has changed, case {case}": len(changed)})


def differing_files(before: dict, after: dict) -> list[str]:
    """The files that are not the same bytes."""
    old, new = ({name: value for name, (_, value) in files.items()} for files in (before, after))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


@pytest.mark.parametrize("case", range(count("F8 of torchrun", 1, 10)))
def test_kill_9_of_torchrun_ends_its_ranks_before_the_next_launch_commits(
    data: TinyData, undisturbed: Path, tmp_path: Path, case: int
):
    """The kernel ends them with it, so that a launch started at once on the same directory takes the paths over."""
    run, log = tmp_path / "run", tmp_path / "log"
    with torchrun(arguments_of(data, run), tmp_path, size=1, seconds_an_update=0.2) as launch:
        wait_until(lambda: bool(list(run.glob("checkpoints/*/manifest.json"))), launch, log)
        time.sleep(random.Random(seed() + case).uniform(0.0, 0.3))
        workers = children_of(launch.pid)
        launch.kill()
        killed = time.monotonic()
        with started(arguments_of(data, run), 1, tmp_path) as second:
            while any(is_alive(worker) for worker in workers):
                assert time.monotonic() - killed < SECONDS_TO_END
                time.sleep(0.01)
            seconds = time.monotonic() - killed
            wait(second, 60.0)
    assert workers and second[0].status == 0, second[0].text
    check_undisturbed(run, undisturbed)
    record("F8", **{f"seconds to the ranks' end, case {case}": round(seconds, 2)})
