"""F2: power loss at any moment of saves, publication and pruning; and every fsync is needed.

What a run tells the disk is recorded once. Each state in which a POSIX disk may come back (disk_model.py) is made in a
directory, and the next launch must find there all that was acknowledged. The same enumeration without one kind of fsync
must find something broken: that part tests the test.
"""

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from counts import count, record, seed
from disk_model import Change, Recorder, Recording, State, Synced
from small_runs import ViolationError, check_survivors, launched

from megalrps.checkpoint import leases

STATES = count("F2", small=40, full=1_000_000)
"""At most so many states are made: all of them in a full run."""
WITHOUT = count("F2 without an fsync", small=200, full=400)
"""At most so many states are made that an fsync left out makes possible."""
NOTICED = count("F2 noticed", small=1, full=400)
"""So many violations are enough to show that an fsync is needed."""
STEPS = count("F2 steps", small=4, full=5)

KINDS = (
    "shard",
    "manifest",
    "directory of a checkpoint",
    "directory of checkpoints, after a commit",
    "directory of checkpoints, before a removal",
    "reference",
    "directory of references",
    "lease",
    "directory of leases",
    "directory of the lineage",
    "run directory",
    "directory of the run directory",
    "metrics",
)


def what_is(path: str, last: Change | None) -> str:
    """The kind of fsync, by the path under the directory of the run and the last change made in it."""
    parts = Path(path).parts[1:]
    words = {
        (): "run directory",
        ("lineage",): "directory of the lineage",
        ("lineage", "leases"): "directory of leases",
        ("metrics.jsonl",): "metrics",
    }
    if not path:
        return "directory of the run directory"
    if parts in words:
        return words[parts]
    if parts == ("checkpoints",):
        hidden = last is not None and any(name.endswith(".trash") and inode for name, inode in last.sets)
        return f"directory of checkpoints, {'before a removal' if hidden else 'after a commit'}"
    if parts[0] == "checkpoints":
        kinds = {2: "directory of a checkpoint", 3: "shard" if path.endswith(".bin") else "manifest"}
        return kinds[len(parts)]
    if parts[0] == "lineage":
        if parts[1] == "leases":
            return "lease"
        return "reference" if len(parts) == 3 else "directory of references"
    return f"settings ({parts[0]})"


@contextmanager
def without_power_nobody_lives() -> Iterator[None]:
    """This process stands for many: the holder of every lease is one that is gone when the next launch looks."""
    place = leases.this_place()
    gone = leases.Place(place.host, place.boot, place.namespace, place.pid, place.started - 1)
    with mock.patch.object(leases, "this_place", lambda: gone):
        yield


def recorded(root: Path, steps: int = STEPS) -> Recording:
    """A new run that makes ``steps`` checkpoints (a fork among them) and prunes; then a second launch, of one more."""
    root.mkdir()
    recorder = Recorder(root, what_is)
    with without_power_nobody_lives(), recorder.recording():
        for first, last in ((1, steps), (steps + 1, steps + 1)):
            with launched(root / "run") as launch:
                for step in range(first, last + 1):
                    launch.save(step)
                    recorder.acknowledge(step)
                    launch.prune()
                launch.save_again(last)
    return recorder.told


def violations(told: Recording, states: Sequence[State], place: Path, most: int) -> list[str]:
    """What is broken in ``states``, each made below ``place``; stops at ``most``."""
    broken: list[str] = []
    with without_power_nobody_lives(), mock.patch.object(os, "fsync", lambda descriptor: None):
        for state in states:
            place.mkdir()
            told.materialise(state, place)
            try:
                check_survivors(place / "run", state.acknowledged, goes_on=False)
            except ViolationError as violation:
                broken.append(f"{violation}; {state}")
                if len(broken) >= most:
                    return broken
            finally:
                shutil.rmtree(place)
    return broken


def states_without(told: Recording, kind: str, most: int) -> list[State]:
    """``most`` of the states, drawn, that there may be only without the fsyncs of ``kind``; the late ones first."""
    known = set(told.states())
    new = [state for state in told.without(kind).states() if state not in known]
    chosen = random.Random(seed()).sample(new, min(most, len(new)))
    return sorted(chosen, key=lambda state: -len(state.acknowledged))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return recorded(tmp_path_factory.mktemp("power") / "disk")


def test_nothing_is_lost_with_the_power(told: Recording, tmp_path: Path):
    states = told.states()
    assert len(states) > 300, "the operations are no longer seen: the test tests nothing"
    chosen = random.Random(seed()).sample(states, min(STATES, len(states)))
    broken = violations(told, chosen, tmp_path / "disk", 3)
    record("F2", states=len(chosen), violations=len(broken))
    assert not broken, "\n".join(broken)


def test_every_kind_of_fsync_is_known(told: Recording):
    """A new one must be tried too."""
    kinds = {each.what for each in told.operations if isinstance(each, Synced)}
    assert {kind for kind in kinds if not kind.startswith("settings")} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_fsync_that_is_left_out_is_noticed(told: Recording, tmp_path: Path, kind: str):
    new = states_without(told, kind, WITHOUT)
    broken = violations(told.without(kind), new, tmp_path / "disk", NOTICED)
    record("F2", **{f"without the fsync of {kind}": {"states": len(new), "violations": len(broken)}})
    assert broken, f"in {len(new)} states more nothing is broken: the fsync of the {kind} is not needed"
