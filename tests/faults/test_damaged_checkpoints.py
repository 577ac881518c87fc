"""F4: a flipped bit, a page of zeros or a missing end in any file of a lineage is refused, and the parent is used.

Each case damages one file of a whole run, launches on it, and puts the file back. A shard's refusal names the tensors
in it; a head is made again from the checkpoints, what a person must decide about is refused by name.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from counts import count, record, seed
from damages import DAMAGES, Damage, rewrite
from small_runs import (
    KINDS,
    PATH,
    ViolationError,
    blank,
    check_launch,
    launched,
    name_of,
    require,
    state_of,
)

from megalrps.checkpoint.errors import CorruptCheckpointError, DamagedReferenceError, FencedError
from megalrps.errors import EXIT_DAMAGED, exit_status_of

CASES = count("F4", small=5, full=300)
"""Of each damage to each kind of file."""
STEPS = 5
HEAD, PARENT, FORK = name_of(STEPS), name_of(STEPS - 1), name_of(min(KINDS))


def make_run(root: Path) -> Path:
    """A run with a fork, and a head with a periodic parent."""
    with launched(root) as launch:
        for step in range(1, STEPS + 1):
            launch.save(step)
            launch.prune()
    return root


@contextmanager
def damaged(root: Path, file: str, content: bytes) -> Iterator[None]:
    """``file`` of the run with another ``content``; afterwards all is as it was."""
    spare = root.with_name("spare")
    shutil.copytree(root, spare)
    rewrite(root / file, content)
    try:
        yield
    finally:
        shutil.rmtree(root)
        spare.rename(root)


def check_falls_back(root: Path, file: str, words: list[str]) -> None:
    """A launch refuses HEAD by ``words`` and loads PARENT; the head follows; the name is free for the next save."""
    with launched(root) as launch:
        said = [*launch.said, *launch.lineage.refused.values()]
        loaded, tensors = launch.load()
        said += [str(refusal) for refusal in loaded.refused]
        require(loaded.manifest.name == PARENT, f"{loaded.manifest.name} was loaded instead of {PARENT}")
        require(_equal(tensors, state_of(STEPS - 1)), "the parent loads other bytes")
        require(any(all(word in line for word in words) for line in said), f"{words} are not named: {said}")
        require(all("\n" not in line for line in said), "a refusal is of several lines")
        assert launch.publisher is not None
        head = launch.publisher.references.read("heads", PATH)
        require(head is not None and head.checkpoint == PARENT, f"the head is at {head}")
        if name_of(STEPS) in launch.lineage.refused:
            launch.store.set_aside(HEAD)
        launch.save(STEPS)
        launch.store.verify(HEAD)


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


def check_shard(root: Path, damage: Damage, chance: random.Random) -> bool:
    """The shard of the head; whether the bytes are really others."""
    file = f"checkpoints/{HEAD}/rank-00000.bin"
    return _check_checkpoint(root, file, damage, chance, [HEAD, "rank-00000.bin", "s, x200, x3 and 1 more"])


def check_manifest(root: Path, damage: Damage, chance: random.Random) -> bool:
    """The manifest of the head."""
    return _check_checkpoint(root, f"checkpoints/{HEAD}/manifest.json", damage, chance, [HEAD, "manifest.json"])


def _check_checkpoint(root: Path, file: str, damage: Damage, chance: random.Random, words: list[str]) -> bool:
    whole = (root / file).read_bytes()
    content = damage(whole, chance)
    with damaged(root, file, content):
        if content != whole:
            check_falls_back(root, file, words)
    return content != whole


def check_reference(root: Path, damage: Damage, chance: random.Random) -> bool:
    """A head, which is made again and said so; or a fork's reference, which is refused by name."""
    file = f"lineage/{chance.choice(('heads/main', f'forks/{FORK}'))}.json"
    whole = (root / file).read_bytes()
    content = damage(whole, chance)
    if content == whole:
        return False
    with damaged(root, file, content):
        if "forks" in file:
            require_refused(root, file)
            (root / file).unlink()  # as the refusal says
        with launched(root) as launch:
            check_launch(launch, range(1, STEPS + 1))
            require("forks" in file or any(file in line for line in launch.said), f"not said: {launch.said}")
    return True


def check_lease(root: Path, damage: Damage, chance: random.Random) -> bool:
    """The lease of a launch that lives: nobody else gets in, and it commits nothing more by what it cannot read."""
    file = "lineage/leases/main.json"
    with launched(root) as holder:
        whole = (root / file).read_bytes()
        content = damage(whole, chance)
        if content == whole:
            return False
        with damaged(root, file, content):
            require_refused(root, file)
            names = holder.store.names()
            try:
                holder.save(STEPS + 1)
            except DamagedReferenceError:
                pass
            else:
                raise ViolationError("a launch has committed under a lease that cannot be read")
            require(holder.store.names() == names, "a refused save is visible")
    return True


def require_refused(root: Path, file: str) -> None:
    """A launch ends with the status of damage and one line that names ``file``."""
    try:
        with launched(root):
            raise ViolationError(f"a launch has used the damaged {file}")
    except DamagedReferenceError as refusal:
        require(exit_status_of(refusal) == EXIT_DAMAGED, f"status {exit_status_of(refusal)}")
        require(file in str(refusal) and "\n" not in str(refusal), f"the refusal does not name {file}: {refusal}")


CHECKS: dict[str, Callable[[Path, Damage, random.Random], bool]] = {
    "shard": check_shard,
    "manifest": check_manifest,
    "reference": check_reference,
    "lease": check_lease,
}
"""By the kind of file: raises ViolationError, or says whether the damage was one."""


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk keeps is not the question here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("damage") / "run")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", CHECKS)
def test_damage_is_refused(run: Path, kind: str, damage: Damage):
    refused, number = 0, 0
    while refused < CASES:
        refused += CHECKS[kind](run, damage, random.Random(f"{seed()} F4 {kind} {damage.__name__} {number}"))
        number += 1
        assert number < 2 * CASES + 10, "the damages are none"
    record("F4", **{f"{damage.__name__} in a {kind}": {"cases": refused, "refused": refused}})


def test_nothing_is_touched_before_the_refusal(run: Path):
    file = f"checkpoints/{HEAD}/rank-00000.bin"
    with damaged(run, file, (run / file).read_bytes()[:-1]), launched(run) as launch:
        tensors = blank()
        with pytest.raises(CorruptCheckpointError):
            launch.store.load(HEAD, tensors)
        assert not any(tensor.any() for tensor in tensors.values())


def test_a_damaged_fork_stops_a_launch_by_name(run: Path):
    """Nothing may take its place: what descends from it is another model."""
    file = f"checkpoints/{FORK}/manifest.json"
    with (
        damaged(run, file, b"{}"),
        pytest.raises(CorruptCheckpointError, match=f"forks/{FORK}") as refusal,
        launched(run),
    ):
        pass
    assert exit_status_of(refusal.value) == EXIT_DAMAGED


def check_lost_lease(root: Path) -> None:
    """A lease is removed by hand while its holder lives, who notices before it commits anything."""
    with launched(root) as holder:
        (root / "lineage/leases/main.json").unlink()
        with launched(root) as second:
            names = holder.store.names()
            try:
                holder.save(STEPS + 1)
            except FencedError:
                pass
            else:
                raise ViolationError("two launches write one path")
            require(holder.store.names() == names, "a refused save is visible")
            second.save(STEPS + 1)


def test_a_lost_lease_lets_one_writer_in(tmp_path: Path):
    check_lost_lease(make_run(tmp_path / "run"))
