"""F14: the collector of garbage, on random trees with random references, leases, ages and damage, and in races.

What it may take is said a second time here, as sets and by exhaustion, and compared both ways: nothing that is needed
goes, and everything else that is old enough does.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import counts
import pytest
from synthetic_tree import DAY, add, elsewhere, flip_bit, gone, leased, prepared, random_records, record, refer

from megalrps.checkpoint import garbage
from megalrps.checkpoint.errors import MissingCheckpointError
from megalrps.checkpoint.garbage import Found, Inventory, collect, decide, prune
from megalrps.checkpoint.keeping import pin
from megalrps.checkpoint.leases import Lease, Leases, this_place
from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.names import hidden_name, path_of
from megalrps.checkpoint.references import Reference, References

GRACE_DAYS = 14.0
TREES = counts.count("random trees", 150, 1000)
TREES_ON_DISK = counts.count("random trees on a disk", 6, 60)
RACES = counts.count("races with a collector", 25, 300)
AGES = (-400.0, 0.0, 13.9, 14.1, 400.0)


def random_inventory(chance: random.Random) -> Inventory:
    """Everything that a directory may hold, at random; about every third has something damaged or lost."""
    records = random_records(chance)
    damaged = {name for name in records if chance.random() < chance.choice((0.0, 0.0, 0.15))}
    lost = {name for name in records if chance.random() < chance.choice((0.0, 0.0, 0.1))} - damaged
    usable = {name: value for name, value in records.items() if name not in damaged | lost}
    names = list(records)
    paths = sorted({value.path for value in records.values()})
    references = [
        Reference(kind, f"{kind}-{number}", chance.choice(names), "d", 0, "")
        for number in range(chance.randint(0, 4))
        for kind in [chance.choice(("forks", "releases", "pins"))]
        if names
    ]
    for path in paths:
        of_path = [name for name, value in records.items() if value.path == path]
        if chance.random() < 0.8:
            references.append(
                Reference("heads", path, chance.choice((of_path[-1], chance.choice(of_path))), "d", 0, "")
            )
    leases = tuple(
        Lease(path, 1, "x", this_place(), 0, tuple(chance.sample(names, min(len(names), chance.randint(0, 2)))), "")
        for path in [*paths, "v9"]
        if chance.random() < 0.15
    )
    kinds = dict.fromkeys(usable, "checkpoint") | dict.fromkeys(damaged, "damaged")
    found = [Found(kind, name, Path(name), chance.choice(AGES) * DAY, 1) for name, kind in kinds.items()]
    for kind in ("leftover", "set aside", "trash"):
        for name in [*names, "v9-00000001"]:
            if chance.random() < 0.1:
                found.append(Found(kind, name, Path(f"{kind} {name}"), chance.choice(AGES) * DAY, 1))
    return Inventory(Lineage(usable, dict.fromkeys(damaged, "damaged")), tuple(references), leases, tuple(found))


def needed(inventory: Inventory, keep: int) -> set[str]:
    """The names of the checkpoints that must stay, whatever their age: said anew, and without any order of work."""
    records, refused = inventory.lineage.records, inventory.lineage.refused
    named = {reference.checkpoint for reference in inventory.references}
    read = {name for lease in inventory.leases for name in lease.reads}
    held = {lease.path for lease in inventory.leases}
    heads = {r.name: r.checkpoint for r in inventory.references if r.kind == "heads" and r.checkpoint in records}
    stay = named | read
    for name in [*records, *refused]:
        path = records[name].path if name in records else path_of(name)
        newer = [n for n, r in records.items() if r.path == path and not r.permanent and name in records]
        newer = [n for n in newer if records[n].step > records[name].step]
        is_periodic = name in records and not records[name].permanent
        is_beyond = path in heads and name in records and records[name].step > records[heads[path]].step
        if path in held or path not in heads or is_beyond or (is_periodic and len(newer) < keep):
            stay.add(name)
    stay |= {each.name for each in inventory.found if each.kind in ("checkpoint", "damaged") and each.age < 14 * DAY}
    while True:
        more = {records[name].parent for name in stay if name in records} - {None}
        torn = (named | more | (read & refused.keys())) - records.keys()
        if torn:
            more |= {name for name, value in records.items() if value.permanent}
        if more <= stay:
            return stay
        stay |= more


def must_go(inventory: Inventory, keep: int) -> set[Path]:
    stay, held = needed(inventory, keep), {lease.path for lease in inventory.leases}
    going = set()
    for each in inventory.found:
        if each.kind in ("checkpoint", "damaged"):
            is_free = each.name not in stay
        else:
            is_free = each.kind == "trash" or path_of(each.name) not in held
        if is_free and each.age >= GRACE_DAYS * DAY:
            going.add(each.place)
    return going


def test_what_is_needed_stays_and_all_else_that_is_old_goes():
    chance = random.Random(counts.seed())
    went = stayed = wrongly_collected = wrongly_kept = 0
    for tree in range(TREES):
        inventory, keep = random_inventory(chance), chance.randint(0, 3)
        verdicts = decide(inventory, keep, GRACE_DAYS * DAY)
        going = {verdict.found.place for verdict in verdicts if verdict.goes}
        wanted = must_go(inventory, keep)
        wrongly_collected, wrongly_kept = wrongly_collected + len(going - wanted), wrongly_kept + len(wanted - going)
        assert going == wanted, f"tree {tree}, --faults-seed {counts.seed()}"
        assert len(verdicts) == len(inventory.found) and all(verdict.why for verdict in verdicts)
        went, stayed = went + len(going), stayed + len(inventory.found) - len(going)
    assert min(went, stayed) > TREES, "the trees are no test of both"
    counts.record("F14", random_trees=TREES, collected=went, kept=stayed)
    counts.record("F14", wrongly_collected=wrongly_collected, wrongly_kept=wrongly_kept)


def test_a_clock_that_jumps_removes_nothing_that_is_reachable():
    chance = random.Random(counts.seed())
    for _ in range(TREES):
        inventory = random_inventory(chance)
        old = replace(inventory, found=tuple(replace(each, age=each.age + 9e9) for each in inventory.found))
        verdicts = decide(old, 0, GRACE_DAYS * DAY)
        going = {each.found.name for each in verdicts if each.goes and each.found.kind == "checkpoint"}
        roots = {reference.checkpoint for reference in inventory.references}
        usable = roots & old.lineage.records.keys()
        assert not going & (usable | {ancestor for name in usable for ancestor in old.lineage.ancestors(name)})


def random_run(run: Path, chance: random.Random, began: float) -> References:
    """A random tree as files."""
    references = prepared(run)
    records = random_records(chance)
    for name, value in records.items():
        add(run / "checkpoints", value, age_days=chance.choice(AGES), now=began)
        if chance.random() < 0.3:
            refer(references, chance.choice(("forks", "pins")), name, name)
    for path in sorted({value.path for value in records.values()}):
        refer(references, "heads", path, [name for name, value in records.items() if value.path == path][-1])
        if chance.random() < 0.3:
            leased(references, path, place=chance.choice((this_place(), elsewhere(), gone())))
    for name in records:
        if chance.random() < 0.1:
            hidden = run / "checkpoints" / hidden_name(name, chance.choice(("partial", "trash", "refused")))
            hidden.mkdir()
            (hidden / "rank-00000.bin").write_bytes(b"half")
    return references


def test_what_is_decided_is_done_and_nothing_else(tmp_path: Path):
    chance = random.Random(counts.seed())
    moved, deleted, began = 0, 0, time.time()
    for tree in range(TREES_ON_DISK):
        run = tmp_path / str(tree)
        references, checkpoints = random_run(run, chance, began), run / "checkpoints"
        before = {place.name for place in checkpoints.iterdir()}
        for now in (began, began + 15 * DAY):  # the second time, what the first moved has lain long enough
            with references.locked():
                told = garbage.survey(run, references, now)
            going = must_go(told, 1)
            dry = collect(run, references, keep=1, grace=14 * DAY, now=now, apply=False)
            assert {verdict.found.place for verdict in dry if verdict.goes} == going
            assert {place.name for place in checkpoints.iterdir()} == before, "dry, and yet something is gone"
            collect(run, references, keep=1, grace=14 * DAY, now=now, apply=True)
            before -= {place.name for place in going if place.parent == checkpoints}
            assert {place.name for place in checkpoints.iterdir()} == before
            moved += sum(place.parent == checkpoints for place in going)
            deleted += sum(place.parent == run / "trash" for place in going)
            assert not any(place.exists() for place in going)
        assert sum(1 for _ in (run / "trash").glob("*")) == sum(p.parent == checkpoints for p in going)
    assert moved > TREES_ON_DISK / 2 and deleted > 0, "nothing was collected: the test tests nothing"


def old_fork(run: Path) -> References:
    """A fork that nothing refers to, old enough to go, whose parent goes with it; and a head beyond."""
    references, checkpoints = prepared(run), run / "checkpoints"
    parent = add(checkpoints, record("main", 2, "end"), age_days=99)
    fork = add(checkpoints, record("main", 4, "fork", parent), age_days=99)
    for step in (5, 6):
        add(checkpoints, record("main", step, "periodic", None), age_days=99)
    refer(references, "heads", "main", "main-00000006")
    assert fork == "main-00000004"
    return references


def pins(run: Path, references: References) -> None:
    pin(run / "checkpoints", references, "main-00000004", "wanted", "")


def starts_a_branch(run: Path, references: References) -> None:
    """As a launch does: the lease first, with what it reads; then it looks whether that is there."""
    Leases(references).acquire({"v1": ["main-00000004"]}, seconds=30.0)
    if not (run / "checkpoints" / "main-00000004").exists():
        raise MissingCheckpointError("gone before")


def collects(run: Path, references: References) -> None:
    collect(run, references, keep=1, grace=14 * DAY, now=time.time(), apply=True)


def prunes(run: Path, references: References) -> None:
    with Leases(references).acquire({"main": []}, seconds=30.0) as held:
        prune(run / "checkpoints", references, 1, held)


@pytest.mark.parametrize("needs", [pins, starts_a_branch])
def test_what_is_asked_for_while_a_collector_runs_is_kept_or_was_gone(
    tmp_path: Path, needs: Callable[[Path, References], None]
):
    chance = random.Random(counts.seed())
    outcomes = {True: 0, False: 0}
    for race in range(RACES):
        run = tmp_path / str(race)
        references = old_fork(run)
        outcomes[_race(run, references, collects, needs, chance)] += 1
        is_there = (run / "checkpoints" / "main-00000004").exists()
        assert is_there == (run / "checkpoints" / "main-00000002").exists(), "a chain was cut"
    assert min(outcomes.values()) > 0, f"no race: {outcomes}"
    counts.record("F14", **{f"races_of_a_collector_with_a_launch_that_{needs.__name__}": RACES})


def _race(
    run: Path,
    references: References,
    collector: Callable[[Path, References], None],
    needs: Callable[[Path, References], None],
    chance: random.Random,
    checkpoint: str = "main-00000004",
) -> bool:
    """Whether what needs ``checkpoint`` got it; then it is there when all is over."""
    got, errors = [], []
    # Half of them close together, half with the collector ahead, however busy the machine is.
    delays = (chance.uniform(0, chance.choice([0.004, 0.2])), chance.uniform(0, 0.004))

    def ask() -> None:
        time.sleep(delays[0])
        try:
            needs(run, references)
            got.append(True)
        except MissingCheckpointError:
            pass
        except BaseException as error:
            errors.append(error)

    def remove() -> None:
        time.sleep(delays[1])
        try:
            collector(run, references)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=each) for each in (ask, remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert bool(got) == (run / "checkpoints" / checkpoint).exists(), f"lost in a race, --faults-seed {counts.seed()}"
    return bool(got)


def pins_a_periodic_one(run: Path, references: References) -> None:
    pin(run / "checkpoints", references, "main-00000005", "wanted", "")


def test_what_is_pinned_while_a_launch_prunes_is_kept_or_was_gone(tmp_path: Path):
    chance = random.Random(counts.seed())
    outcomes = {True: 0, False: 0}
    for race in range(RACES):
        run = tmp_path / str(race)
        references = old_fork(run)
        outcomes[_race(run, references, prunes, pins_a_periodic_one, chance, "main-00000005")] += 1
    assert min(outcomes.values()) > 0, f"no race: {outcomes}"
    counts.record("F14", races_of_pruning_with_a_pin=RACES)


def test_nothing_is_collected_while_a_reference_cannot_be_read(tmp_path: Path):
    references = old_fork(tmp_path)
    flip_bit(tmp_path / "lineage" / "heads" / "main.json", 30)
    with pytest.raises(Exception, match="is damaged"):
        collects(tmp_path, references)
    assert not (tmp_path / "trash").exists()
