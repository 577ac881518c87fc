"""F18: the checks of this folder notice what they are for: each of these defects is caught by one of them, at least.

The checks are the functions that the other tests call, here with a defect in the package, and without one they pass.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import count, record, seed
from damages import DAMAGES, flipped_bit
from deaths import POINTS
from defects import DEFECTS, seeded
from small_runs import ViolationError, acknowledged, check_survivors
from test_damaged_checkpoints import check_lost_lease, check_manifest, check_shard, make_run
from test_histories import BATCH, WINDOWS, played
from test_kills import Kill, run_to_death, save_and_die
from test_power_loss import recorded, violations
from tiny_job import SEQUENCE_LENGTH, TinyData, command, differing, make_data, tensors, trained, write_increment

from megalrps.config import parse_config
from megalrps.errors import PreemptedError

IS_FULL = count("F18", small=4, full=len(DEFECTS)) == len(DEFECTS)
STATES = count("F18 states", small=300, full=1000)
HISTORIES = 6
FLIPS = 60

Check = Callable[[Path, str | None], None]


def _die_with(defect: str | None, root: Path, log: Path, kill: Kill) -> None:
    with seeded(defect):
        save_and_die(0, root, log, kill)


def kills(place: Path, defect: str | None) -> None:
    """F1: death after each step of the protocol."""
    for number, point in enumerate(POINTS):
        root, log = place / str(number) / "run", place / str(number) / "log"
        run_to_death(root, _die_with, defect, root, log, Kill(1, 0, 6, point, 0.0))
        check_survivors(root, acknowledged(log))


def power_loss(place: Path, defect: str | None) -> None:
    """F2: loss of power at any moment."""
    with seeded(defect):
        told = recorded(place / "disk")
    states = told.states()
    chosen = random.Random(seed()).sample(states, min(STATES, len(states)))
    broken = violations(told, chosen, place / "lost", 1)
    if broken:
        raise ViolationError(broken[0])


def damage_of_shards(place: Path, defect: str | None) -> None:
    """F4: each damage to a shard."""
    root = make_run(place / "run")
    with seeded(defect):
        for number, damage in enumerate(DAMAGES):
            check_shard(root, damage, random.Random(number))


def damage_of_manifests(place: Path, defect: str | None) -> None:
    """F4: flipped bits of a manifest."""
    root = make_run(place / "run")
    with seeded(defect):
        for number in range(FLIPS):
            check_manifest(root, flipped_bit, random.Random(f"{seed()} {number}"))


def two_writers(place: Path, defect: str | None) -> None:
    """F4: a lease that is lost."""
    root = make_run(place / "run")
    with seeded(defect):
        check_lost_lease(root)


def histories(place: Path, defect: str | None) -> None:
    """Learning rates and sample ids of histories of launches on worlds of several sizes."""
    names = "abcd"[: len(WINDOWS)]
    tokens = [windows * SEQUENCE_LENGTH + 1 for windows in WINDOWS]
    data = TinyData(tuple(write_increment(place / n, n, t) for n, t in zip(names, tokens, strict=True)), ())
    base = parse_config(command(data, place / "run", "--global-batch-size", str(BATCH)))
    with seeded(defect):
        for number in range(HISTORIES):
            history = played(data, base, number)
            if history.wrong:
                raise ViolationError(history.wrong[0])


def resume(place: Path, defect: str | None) -> None:
    """F3: a run that is stopped and goes on ends in the same bits."""
    data = make_data(place / "data", [6])
    flags = ("--paradigm", "ptfs")
    whole = trained(command(data, place / "whole", *flags))
    with seeded(defect):
        with pytest.raises(PreemptedError):
            trained(command(data, place / "stopped", *flags, "--exit-interval", "3"))
        stopped = trained(command(data, place / "stopped", *flags))
    last = max(entry.name for entry in (whole / "checkpoints").iterdir())
    if differing(tensors(whole, last), tensors(stopped, last)):
        raise ViolationError("a resumed run ends in other bits")


CHECKS: dict[str, tuple[Check, ...]] = {
    "the shard is not synced": (power_loss,),
    "the manifest is not synced": (power_loss,),
    "the directory is not synced after the rename": (power_loss,),
    "acknowledged before the rename": (kills, power_loss),
    "the reference moves before the rename": (kills, power_loss),
    "no digest of shards is looked at": (damage_of_shards,),
    "the manifest's digest is not looked at": (damage_of_manifests,),
    "a taken name is removed and written again": (power_loss,),
    "the fence is not looked at": (two_writers,),
    "pruning spares no forks": (kills, power_loss),
    "samples by rank modulo ranks": (histories,),
    "learning rate one step late on resume": (histories, resume),
    "moments are not restored": (resume,),
}
"""The checks that are to catch each defect."""
QUICK = (
    "the reference moves before the rename",
    "no digest of shards is looked at",
    "the manifest's digest is not looked at",
    "the fence is not looked at",
)
"""The defects of a run of the whole suite."""


def catches(check: Check, place: Path, defect: str | None) -> str | None:
    """What the check says of the defect; None where it notices nothing."""
    place.mkdir()
    try:
        check(place, defect)
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"[:200]
    return None


@pytest.mark.parametrize("defect", DEFECTS if IS_FULL else QUICK)
def test_a_seeded_defect_is_caught(tmp_path: Path, defect: str):
    checks = CHECKS[defect] if IS_FULL else CHECKS[defect][:1]
    said = {check.__name__: catches(check, tmp_path / check.__name__, defect) for check in checks}
    caught = sorted(name for name, words in said.items() if words is not None)
    record("F18", **{defect: caught})
    assert caught, f"{defect}: noticed by none of {sorted(said)}"


ALL = (kills, power_loss, damage_of_shards, damage_of_manifests, two_writers, histories, resume)


@pytest.mark.parametrize("check", ALL if IS_FULL else [damage_of_shards, two_writers])
def test_without_a_defect_the_check_passes(tmp_path: Path, check: Check):
    """Or it would catch anything; in a run of the whole suite the checks' own tests say so of the others."""
    assert catches(check, tmp_path / "run", None) is None


def test_every_defect_has_its_checks():
    assert set(CHECKS) == set(DEFECTS) >= set(QUICK)
    assert len(DEFECTS) >= 12
